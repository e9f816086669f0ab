#pragma once

// AttentionLayer: the one driver of all attention layers. MultiheadAttention, MultiheadDiffAttention and its V2 are it,
// each with a variant of its own (attention_variant.hpp): they differ in what they compute, not in how they are called.
//
//   y = layer.forward(x);                     causal; or forward(x, mask), or (x, mask, lengths) for stacked sequences
//   y = layer.forward(x, cache);              the tokens that follow those in a KvCache; or forward(x, cache, mask)
//   y = layer.forward(x, caches);             the newest token of many sequences (batched_attention.hpp)
//   y = layer.forward(x, mask, tape);         or (x, mask, lengths, tape): keeps what backward needs
//   dx = layer.backward(dy, tape, grad);      from dy, the gradient of y
//   dx = layer.backward(dy, tape, grad, dbias);      the gradient of the mask's learned bias is added to dbias
//   y = layer.forward_cross(x, memory);       keys and values from elsewhere: cross_attention.hpp
//   layer.forward_into(y, x, …, workspace, executor), backward_into(dx, …, workspace, executor)
//                                             into a matrix of yours, scratch and threads from you: after a first call
//                                             of the largest shape no heap allocation
//
// x, y, dx, dy: tokens x embed_dim, of the layer's scalar, either storage order and any strides; an expression without
// memory of its own is evaluated once. y must not overlap x, nor dx dy. A call without a workspace uses its thread's,
// as attention() does.
//
// Tapes    forward leaves on the tape x, the rotated queries and keys, values and what each head attended to, about
//          five times the size of x; scores are computed again. `grad` is a layer of the same configuration whose
//          parameters the gradients are added to: `Layer grad = zeros_like(layer)`. Several calls of backward on one
//          tape add up. λ_init is a constant and has no gradient. A tape may be used again, for any shape; it
//          allocates only when it grows. The parameters must not change between forward and backward, and what a
//          mask's bias reads in place must live until then.
// Errors   before any work. ShapeError for an x, y, dx or dy that does not fit, and for lengths that do not add up to
//          the rows of x. std::invalid_argument for a negative length, for a tape that no forward has filled, or the
//          forward of a layer of another configuration, and for a `grad` of another configuration. What a mask says
//          of itself.
// Threads  const functions may be called from several threads, each with a workspace of its own.

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/attention_variant.hpp"
#include "diffattn/layers/batched_attention.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/kv_cache.hpp"
#include "diffattn/layers/sequences.hpp"

namespace diffattn::inline v0_1 {

template <typename Variant>
class AttentionLayer : public BatchedAttention<Variant> {
  using Passes = BatchedAttention<Variant>;
  using Passes::config_;

 public:
  using Scalar = typename Variant::Scalar;
  using Config = typename Variant::Config;
  using Tape = typename Passes::Tape;

  /// Projections start as nn.Linear does, the variant's own parameters as it says. Throws std::invalid_argument for a
  /// configuration that cannot be.
  explicit AttentionLayer(const Config& config)
      : Passes(detail::checked_attention_config(Variant::kName, Variant::kQueryMaps, config)) {
    Initializer random(config.seed);
    for (auto* projection : {&this->q_proj, &this->k_proj, &this->v_proj}) projection->initialize(random);
    Variant::initialize(random);
  }

  using Passes::forward, Passes::forward_into;  // with a batch of caches: batched_attention.hpp

  /// The configuration, with what was left to its default filled in.
  const Config& config() const { return config_; }

  /// y (n x embed_dim) for x (n x embed_dim), one sequence.
  template <typename X, AttentionMask Mask = CausalMask>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x, const Mask& mask = {}) const {
    return forward(x, mask, {x.rows()});
  }

  /// Several sequences stacked in the rows of x: `lengths` says how many rows each has. None sees another.
  template <typename X, AttentionMask Mask>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x, const Mask& mask, const SequenceLengths& lengths) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> y(x.rows(), config_.embed_dim);
    forward_into(y, x, mask, lengths, workspace);
    return y;
  }

  /// y for the tokens that follow those in `cache`, which joins them: the same numbers whether a prompt comes whole, in
  /// chunks or token by token. The mask is that of all tokens ever fed, as if they stood in one piece: CausalMask, or
  /// any other, with or without a bias. The cache's window, if it has one, is joined with both().
  template <typename X, typename Storage, AttentionMask Mask = CausalMask>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x, KvCache<Storage>& cache, const Mask& mask = {}) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> y(x.rows(), config_.embed_dim);
    forward_into(y, x, cache, mask, workspace);
    return y;
  }

  /// y for one sequence; fills the tape.
  template <typename X, AttentionMask Mask>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x, const Mask& mask, Tape& tape) const {
    return forward(x, mask, {x.rows()}, tape);
  }

  /// y for several sequences; fills the tape.
  template <typename X, AttentionMask Mask>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x, const Mask& mask, const SequenceLengths& lengths,
                         Tape& tape) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> y(x.rows(), config_.embed_dim);
    forward_into(y, x, mask, lengths, tape, workspace);
    return y;
  }

  /// dx (n x embed_dim) from dy (n x embed_dim); the gradients of the parameters are added to those of `grad`.
  template <typename DY>
  Matrix<Scalar> backward(const Eigen::MatrixBase<DY>& dy, const Tape& tape, AttentionLayer& grad) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> dx(tape.x.rows(), tape.x.cols());
    backward_into(dx, dy, tape, grad, workspace);
    return dx;
  }

  /// The same, and the gradient of the mask's learned bias (learned_bias.hpp) is added to dbias, which has the shape of
  /// its table. Throws std::invalid_argument if the mask had none.
  template <typename DY, typename DB>
  Matrix<Scalar> backward(const Eigen::MatrixBase<DY>& dy, const Tape& tape, AttentionLayer& grad,
                          const Eigen::MatrixBase<DB>& dbias) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> dx(tape.x.rows(), tape.x.cols());
    backward_into(dx, dy, tape, grad, dbias, workspace);
    return dx;
  }

  /// forward(x, mask) into y.
  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                    Workspace& workspace, E&& executor = {}) const {
    forward_into(y, x, mask, {x.rows()}, workspace, executor);
  }

  /// forward(x, mask, lengths) into y.
  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                    const SequenceLengths& lengths, Workspace& workspace, E&& executor = {}) const {
    detail::with_others(executor, Variant::kName, 1, [&] {
      Passes::check_sequences(y, x, mask, lengths, executor);
      const detail::Readable<X> x_read(x.derived());
      Passes::attend_to_sequences(Passes::output_of(y), Passes::input_of(x_read), mask, lengths, nullptr, workspace,
                                  executor);
    });
  }

  /// forward(x, cache) into y.
  template <typename Y, typename X, typename Storage, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, KvCache<Storage>& cache,
                    Workspace& workspace, E&& executor = {}) const {
    forward_into(y, x, cache, CausalMask{}, workspace, executor);
  }

  /// forward(x, cache, mask) into y.
  template <typename Y, typename X, typename Storage, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, KvCache<Storage>& cache,
                    const Mask& mask, Workspace& workspace, E&& executor = {}) const {
    detail::with_others(executor, Variant::kName, 1, [&] {
      if constexpr (spreads_sequences<E> && !spreads_caches<E>) {
        Passes::check_sequences(y, x, mask, {x.rows()}, executor);
        Passes::check_prefill(cache);
        const detail::Readable<X> x_read(x.derived());
        Passes::prefill(Passes::output_of(y), Passes::input_of(x_read), cache, mask, workspace, executor);
      } else {
        Passes::check_tokens(y, x);
        if (x.rows() == 0 && !spreads_caches<E>) return;
        const Index all_tokens = Passes::position_of(executor, cache) + x.rows();
        detail::check_mask(Variant::kName, mask, config_.num_heads, x.rows(), all_tokens);
        const detail::Readable<X> x_read(x.derived());
        Passes::attend_to_cache(Passes::output_of(y), Passes::input_of(x_read), cache, mask, workspace, executor);
      }
    });
  }

  /// forward(x, mask, tape) into y.
  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask, Tape& tape,
                    Workspace& workspace, E&& executor = {}) const {
    forward_into(y, x, mask, {x.rows()}, tape, workspace, executor);
  }

  /// forward(x, mask, lengths, tape) into y.
  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                    const SequenceLengths& lengths, Tape& tape, Workspace& workspace, E&& executor = {}) const {
    tape.filled = false;  // until forward has come to its end
    detail::with_others(executor, Variant::kName, 1, [&] {
      Passes::check_sequences(y, x, mask, lengths, executor);
      Passes::record(tape, x, mask, lengths);
      Passes::attend_to_sequences(Passes::output_of(y), Passes::input_of(tape.x), mask, lengths, &tape, workspace,
                                  executor);
    });
    tape.filled = true;
  }

  /// backward(dy, tape, grad) into dx.
  template <typename DX, typename DY, Executor E = Serial>
  void backward_into(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape,
                     AttentionLayer& grad, Workspace& workspace, E&& executor = {}) const {
    detail::with_others(executor, Variant::kName, 1, [&] {
      Passes::check_backward(dx, dy, tape, grad, executor);
      const detail::Readable<DY> dy_read(dy.derived());
      Passes::differentiate(Passes::output_of(dx), nullptr, Passes::input_of(dy_read), tape, grad, {}, workspace,
                            executor);
    });
  }

  /// Throws what backward(dy, tape, grad, dbias) would say of this dbias.
  template <typename DB>
  void check_bias_gradient(const Eigen::MatrixBase<DB>& dbias, const Tape& tape) const {
    Passes::checked_bias_gradient(dbias, tape);
  }

  /// backward(dy, tape, grad, dbias) into dx.
  template <typename DX, typename DY, typename DB, Executor E = Serial>
  void backward_into(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape,
                     AttentionLayer& grad, const Eigen::MatrixBase<DB>& dbias, Workspace& workspace,
                     E&& executor = {}) const {
    detail::with_others(executor, Variant::kName, 1, [&] {
      Passes::check_backward(dx, dy, tape, grad, executor);
      const auto to_bias = Passes::checked_bias_gradient(dbias, tape);
      const detail::Readable<DY> dy_read(dy.derived());
      Passes::differentiate(Passes::output_of(dx), nullptr, Passes::input_of(dy_read), tape, grad, to_bias, workspace,
                            executor);
    });
  }
};

}  // namespace diffattn::inline v0_1
