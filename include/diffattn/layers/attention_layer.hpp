#pragma once

// How the attention layers (MultiheadAttention, MultiheadDiffAttention and its V2) are called; they differ in what they
// compute, not in this.
//
//   y = layer.forward(x);                     causal; or forward(x, mask), or (x, mask, lengths) for stacked sequences
//   y = layer.forward(x, cache);              the tokens that follow those in a KvCache
//   y = layer.forward(x, mask, tape);         or (x, mask, lengths, tape): keeps what backward needs
//   dx = layer.backward(dy, tape, grad);      from dy, the gradient of y
//   layer.forward_into(y, x, …, workspace, executor), backward_into(dx, …, workspace, executor)
//                                             into a matrix of yours, scratch and threads from you: after a first call
//                                             of the largest shape no heap allocation
//
// x, y, dx, dy: tokens x embed_dim. y must not overlap x, nor dx dy.
//
// Tapes    forward leaves on the tape x, the rotated queries and keys, values and what each head attended to, about
//          five times the size of x; scores are computed again. `grad` is a layer of the same configuration whose
//          parameters the gradients are added to: `Layer grad = zeros_like(layer)`. Several calls of backward on one
//          tape add up. λ_init is a constant and has no gradient. A tape may be used again, for any shape; it
//          allocates only when it grows. The parameters must not change between forward and backward, and what a
//          mask's bias reads in place must live until then.
// Errors   before any work. ShapeError for an x, y, dx or dy that does not fit, and for lengths that do not add up to
//          the rows of x. std::invalid_argument for a negative length, for a tape that no forward has filled, or the
//          forward of a layer of another configuration, and for a `grad` of another configuration.

#include <span>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/detail/remembered_mask.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/kv_cache.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

template <typename Scalar>
struct AttentionTape {
  Matrix<Scalar> x, q, k, v;  // q and k turned
  Matrix<Scalar> attended;    // what the heads give, before the head norm
  Matrix<Scalar> lambda;      // one a token and head, in DIFF V2
  std::vector<Index> lengths;
  RememberedMask mask;
  Index num_heads = 0;  // of the layer that filled it
  Index num_kv_heads = 0;
  bool filled = false;
};

}  // namespace detail

/// For a Layer that has config(), kName, same_shape(its own config, another), and
///
///   forward_sequences(y, x, mask, lengths, tape or null, workspace, executor)
///   forward_cached(y, x, cache, workspace, executor), which ends before the cache's commit
///   differentiate(dx, dy, tape, grad, workspace, executor)
template <typename Layer, typename Scalar>
class AttentionLayer {
 public:
  struct Tape : detail::AttentionTape<Scalar> {};

  /// y (n x embed_dim) for x (n x embed_dim), one sequence.
  template <AttentionMask Mask = CausalMask>
  Matrix<Scalar> forward(const Matrix<Scalar>& x, const Mask& mask = {}) const {
    const Index whole[] = {x.rows()};
    return forward(x, mask, whole);
  }

  /// Several sequences stacked in the rows of x: `lengths` says how many rows each has. None sees another.
  template <AttentionMask Mask>
  Matrix<Scalar> forward(const Matrix<Scalar>& x, const Mask& mask, std::span<const Index> lengths) const {
    Workspace workspace;
    Matrix<Scalar> y(x.rows(), layer().config().embed_dim);
    forward_into(y, x, mask, lengths, workspace);
    return y;
  }

  /// y for the tokens that follow those in `cache`: appends them, and each attends to all up to itself (or to the last
  /// `window`, if the cache has one). The same numbers whether a prompt comes whole, in chunks or token by token.
  template <typename Storage>
  Matrix<Scalar> forward(const Matrix<Scalar>& x, KvCache<Storage>& cache) const {
    Workspace workspace;
    Matrix<Scalar> y(x.rows(), layer().config().embed_dim);
    forward_into(y, x, cache, workspace);
    return y;
  }

  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                    Workspace& workspace, E&& executor = {}) const {
    const Index whole[] = {x.rows()};
    forward_into(y, x, mask, whole, workspace, executor);
  }

  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                    std::span<const Index> lengths, Workspace& workspace, E&& executor = {}) const {
    check_sequences(y, x, lengths);
    layer().forward_sequences(y, x, mask, lengths, nullptr, workspace, executor);
  }

  template <typename Y, typename X, typename Storage, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, KvCache<Storage>& cache,
                    Workspace& workspace, E&& executor = {}) const {
    check_tokens(y, x);
    if (x.rows() == 0) return;
    layer().forward_cached(y, x, cache, workspace, executor);
    cache.commit(x.rows());
  }

  /// y (n x embed_dim) for x (n x embed_dim), one sequence; fills the tape.
  template <AttentionMask Mask>
  Matrix<Scalar> forward(const Matrix<Scalar>& x, const Mask& mask, Tape& tape) const {
    const Index whole[] = {x.rows()};
    return forward(x, mask, whole, tape);
  }

  template <AttentionMask Mask>
  Matrix<Scalar> forward(const Matrix<Scalar>& x, const Mask& mask, std::span<const Index> lengths, Tape& tape) const {
    Workspace workspace;
    Matrix<Scalar> y(x.rows(), layer().config().embed_dim);
    forward_into(y, x, mask, lengths, tape, workspace);
    return y;
  }

  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask, Tape& tape,
                    Workspace& workspace, E&& executor = {}) const {
    const Index whole[] = {x.rows()};
    forward_into(y, x, mask, whole, tape, workspace, executor);
  }

  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                    std::span<const Index> lengths, Tape& tape, Workspace& workspace, E&& executor = {}) const {
    check_sequences(y, x, lengths);
    begin(tape, x, mask, lengths);
    layer().forward_sequences(y, x, mask, lengths, &tape, workspace, executor);
    tape.filled = true;
  }

  /// dx; the gradients of the parameters are added to those of `grad`.
  Matrix<Scalar> backward(const Matrix<Scalar>& dy, const Tape& tape, Layer& grad) const {
    Workspace workspace;
    Matrix<Scalar> dx(tape.x.rows(), tape.x.cols());
    backward_into(dx, dy, tape, grad, workspace);
    return dx;
  }

  template <typename DX, typename DY, Executor E = Serial>
  void backward_into(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape, Layer& grad,
                     Workspace& workspace, E&& executor = {}) const {
    constexpr const char* where = Layer::kName;
    if (!tape.filled) detail::throw_invalid({where, ": backward needs a tape that forward(x, mask, tape) has filled"});
    const auto& config = layer().config();
    const auto& other = grad.config();
    if (tape.x.cols() != config.embed_dim || tape.q.cols() != layer().q_proj.weight.rows() ||
        tape.num_heads != config.num_heads || tape.num_kv_heads != config.num_kv_heads) {
      detail::throw_invalid({where, ": the tape was filled by a layer of another configuration"});
    }
    if (other.embed_dim != config.embed_dim || other.num_heads != config.num_heads ||
        other.num_kv_heads != config.num_kv_heads || other.bias != config.bias || !Layer::same_shape(config, other)) {
      detail::throw_invalid({where, ": grad must be a layer of the same configuration"});
    }
    detail::check_shape(where, "dy", dy, tape.x.rows(), config.embed_dim);
    detail::check_shape(where, "dx", dx, tape.x.rows(), tape.x.cols());
    layer().differentiate(dx, dy, tape, grad, workspace, executor);
  }

 protected:
  /// A matrix of n x cols on the tape or, without one, in the workspace.
  static MatrixMap<Scalar> part(Tape* tape, Matrix<Scalar> detail::AttentionTape<Scalar>::*member, Index n, Index cols,
                                Workspace& workspace) {
    if (tape == nullptr) return MatrixMap<Scalar>(workspace.take<Scalar>(n * cols), n, cols);
    (tape->*member).resize(n, cols);
    return MatrixMap<Scalar>((tape->*member).data(), n, cols);
  }

 private:
  template <typename Y, typename X>
  void check_tokens(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x) const {
    detail::check_shape(Layer::kName, "x", x, x.rows(), layer().config().embed_dim);
    detail::check_shape(Layer::kName, "y", y, x.rows(), layer().config().embed_dim);
  }

  template <typename Y, typename X>
  void check_sequences(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x,
                       std::span<const Index> lengths) const {
    check_tokens(y, x);
    detail::check_lengths(Layer::kName, lengths, x.rows());
  }

  /// Notes what backward needs to know of a call of forward; what forward computes it writes on the tape itself.
  template <typename X, typename Mask>
  void begin(Tape& tape, const Eigen::MatrixBase<X>& x, const Mask& mask, std::span<const Index> lengths) const {
    tape.filled = false;  // until forward has come to its end
    detail::keep(tape.x, x);
    tape.lengths.assign(lengths.begin(), lengths.end());
    tape.mask.remember(mask);
    tape.num_heads = layer().config().num_heads;
    tape.num_kv_heads = layer().config().num_kv_heads;
  }

  const Layer& layer() const { return static_cast<const Layer&>(*this); }
};

}  // namespace diffattn::inline v0_1
