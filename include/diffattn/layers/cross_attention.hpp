#pragma once

// Cross-attention, which every attention layer has (AttentionLayer derives from CrossAttention): queries come from x,
// keys and values from another sequence, the memory. An encoder's output, an image, a retrieved text.
//
//   y = layer.forward_cross(x, memory);                     all of the memory is seen; or (x, memory, mask)
//   y = layer.forward_cross(x, memory, mask, lengths, memory_lengths);
//                                                           stacked sequences, each with its own part of the memory
//   layer.write_memory(memory, cache);                      its keys and values, once, to a KvCache;
//   y = layer.forward_cross(x, cache);                      for many calls, each reads them: or (x, cache, mask)
//   y = layer.forward_cross(x, memory, mask, tape);         or (x, memory, mask, lengths, memory_lengths, tape)
//   auto [dx, dmemory] = layer.backward_cross(dy, tape, grad);     or (dy, tape, grad, dbias), as backward
//   layer.forward_cross_into(y, x, …, workspace, executor), backward_cross_into(dx, dmemory, …, workspace, executor)
//
// Shapes   x, y, dx, dy: n_q x embed_dim. memory, dmemory: n_k x embed_dim, n_k is free; 0 rows are a memory of which
//          nothing is seen. Either storage order, any strides. y must not overlap x or memory, nor dx or dmemory dy.
// Masks    FullMask unless another is given. Masks and biases are asked about n_q queries and n_k keys: PaddingMask{n}
//          shows the first n rows of the memory, a MatrixBias is n_q x n_k. What is aligned, a CausalMask for one, is
//          so at the bottom right.
// Rotary   if configured turns queries and keys, the positions of both counted from 0, in every call: token by token, a
//          layer that has it gives other numbers than at once.
// Caches   what is written to the same cache again stands behind what is there, as if the memory had come in one piece.
//          forward_cross adds nothing. A cache serves one layer, and any number of x: copies of it share its pages.
// Tapes    as attention_layer.hpp says. One that forward has filled is refused by backward_cross, and the other way.
// Errors   before any work. ShapeError for a matrix or lengths that do not fit, and for a cache of another layer;
//          std::invalid_argument for a tape or a grad that do not fit, for a cache with a window, which would drop what
//          it should keep, and for one to which no memory was written. What a mask says of itself.
// Cost     that of forward with n_q · n_k pairs; with a cache, without the projections of the memory.

#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/detail/attention_arguments.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/kv_cache.hpp"
#include "diffattn/layers/sequences.hpp"

namespace diffattn::inline v0_1 {

/// What backward_cross returns.
template <typename Scalar>
struct CrossGradients {
  Matrix<Scalar> dx;       ///< n_q x embed_dim
  Matrix<Scalar> dmemory;  ///< n_k x embed_dim
};

template <typename Variant>
class CrossAttention : public detail::AttentionArguments<Variant> {
  using Passes = detail::AttentionArguments<Variant>;

 public:
  using Scalar = typename Variant::Scalar;
  using Tape = typename Passes::Tape;

  /// y (n_q x embed_dim) for queries from x (n_q x embed_dim) and keys and values from memory (n_k x embed_dim).
  template <typename X, typename M, AttentionMask Mask = FullMask>
  Matrix<Scalar> forward_cross(const Eigen::MatrixBase<X>& x, const Eigen::MatrixBase<M>& memory,
                               const Mask& mask = {}) const {
    return forward_cross(x, memory, mask, {x.rows()}, {memory.rows()});
  }

  /// Several sequences stacked in the rows of x, and as many in those of the memory: each sees its own.
  template <typename X, typename M, AttentionMask Mask>
  Matrix<Scalar> forward_cross(const Eigen::MatrixBase<X>& x, const Eigen::MatrixBase<M>& memory, const Mask& mask,
                               const SequenceLengths& lengths, const SequenceLengths& memory_lengths) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> y(x.rows(), config_.embed_dim);
    forward_cross_into(y, x, memory, mask, lengths, memory_lengths, workspace);
    return y;
  }

  /// y for queries from x and the memory that write_memory has put into the cache, which stays as it is.
  template <typename X, typename Storage, AttentionMask Mask = FullMask>
  Matrix<Scalar> forward_cross(const Eigen::MatrixBase<X>& x, const KvCache<Storage>& cache,
                               const Mask& mask = {}) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> y(x.rows(), config_.embed_dim);
    forward_cross_into(y, x, cache, mask, workspace);
    return y;
  }

  /// Appends the keys and values of a memory (n_k x embed_dim) to the cache. Whatever is thrown, the cache is as before.
  template <typename M, typename Storage>
  void write_memory(const Eigen::MatrixBase<M>& memory, KvCache<Storage>& cache) const {
    detail::ThreadWorkspace workspace;
    write_memory(memory, cache, workspace);
  }

  /// y for one sequence; fills the tape.
  template <typename X, typename M, AttentionMask Mask>
  Matrix<Scalar> forward_cross(const Eigen::MatrixBase<X>& x, const Eigen::MatrixBase<M>& memory, const Mask& mask,
                               Tape& tape) const {
    return forward_cross(x, memory, mask, {x.rows()}, {memory.rows()}, tape);
  }

  /// y for several sequences; fills the tape.
  template <typename X, typename M, AttentionMask Mask>
  Matrix<Scalar> forward_cross(const Eigen::MatrixBase<X>& x, const Eigen::MatrixBase<M>& memory, const Mask& mask,
                               const SequenceLengths& lengths, const SequenceLengths& memory_lengths,
                               Tape& tape) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> y(x.rows(), config_.embed_dim);
    forward_cross_into(y, x, memory, mask, lengths, memory_lengths, tape, workspace);
    return y;
  }

  /// dx and dmemory from dy (n_q x embed_dim); the gradients of the parameters are added to those of `grad`.
  template <typename DY>
  CrossGradients<Scalar> backward_cross(const Eigen::MatrixBase<DY>& dy, const Tape& tape, CrossAttention& grad) const {
    detail::ThreadWorkspace workspace;
    CrossGradients<Scalar> to{Matrix<Scalar>(tape.x.rows(), tape.x.cols()),
                              Matrix<Scalar>(tape.memory.rows(), tape.memory.cols())};
    backward_cross_into(to.dx, to.dmemory, dy, tape, grad, workspace);
    return to;
  }

  /// The same, and the gradient of the mask's learned bias (learned_bias.hpp) is added to dbias, which has the shape of
  /// its table. Throws std::invalid_argument if the mask had none.
  template <typename DY, typename DB>
  CrossGradients<Scalar> backward_cross(const Eigen::MatrixBase<DY>& dy, const Tape& tape, CrossAttention& grad,
                                        const Eigen::MatrixBase<DB>& dbias) const {
    detail::ThreadWorkspace workspace;
    CrossGradients<Scalar> to{Matrix<Scalar>(tape.x.rows(), tape.x.cols()),
                              Matrix<Scalar>(tape.memory.rows(), tape.memory.cols())};
    backward_cross_into(to.dx, to.dmemory, dy, tape, grad, dbias, workspace);
    return to;
  }

  /// forward_cross(x, memory, mask) into y.
  template <typename Y, typename X, typename M, AttentionMask Mask, Executor E = Serial>
  void forward_cross_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x,
                          const Eigen::MatrixBase<M>& memory, const Mask& mask, Workspace& workspace,
                          E&& executor = {}) const {
    forward_cross_into(y, x, memory, mask, {x.rows()}, {memory.rows()}, workspace, executor);
  }

  /// forward_cross(x, memory, mask, lengths, memory_lengths) into y.
  template <typename Y, typename X, typename M, AttentionMask Mask, Executor E = Serial>
  void forward_cross_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x,
                          const Eigen::MatrixBase<M>& memory, const Mask& mask, const SequenceLengths& lengths,
                          const SequenceLengths& memory_lengths, Workspace& workspace, E&& executor = {}) const {
    Passes::check_sequences(y, x, memory, mask, lengths, memory_lengths);
    const detail::Readable<X> x_read(x.derived());
    const detail::Readable<M> memory_read(memory.derived());
    Passes::attend_to_memory(Passes::output_of(y), Passes::input_of(x_read), Passes::input_of(memory_read), mask,
                             lengths, memory_lengths, nullptr, workspace, executor);
  }

  /// forward_cross(x, cache) into y.
  template <typename Y, typename X, typename Storage, Executor E = Serial>
  void forward_cross_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const KvCache<Storage>& cache,
                          Workspace& workspace, E&& executor = {}) const {
    forward_cross_into(y, x, cache, FullMask{}, workspace, executor);
  }

  /// forward_cross(x, cache, mask) into y.
  template <typename Y, typename X, typename Storage, AttentionMask Mask, Executor E = Serial>
  void forward_cross_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const KvCache<Storage>& cache,
                          const Mask& mask, Workspace& workspace, E&& executor = {}) const {
    Passes::check_tokens(y, x);
    Passes::check_written(cache);
    detail::check_mask(Variant::kName, mask, config_.num_heads, x.rows(), cache.position());
    const detail::Readable<X> x_read(x.derived());
    Passes::attend_to_kept(Passes::output_of(y), Passes::input_of(x_read), cache, mask, workspace, executor);
  }

  /// write_memory(memory, cache) with scratch from the workspace, on the threads of the executor.
  template <typename M, typename Storage, Executor E = Serial>
  void write_memory(const Eigen::MatrixBase<M>& memory, KvCache<Storage>& cache, Workspace& workspace,
                    E&& executor = {}) const {
    Passes::check_memory(memory);
    Passes::check_memory_cache(cache);
    const detail::Readable<M> memory_read(memory.derived());
    Passes::append_memory(Passes::input_of(memory_read), cache, workspace, executor);
  }

  /// forward_cross(x, memory, mask, tape) into y.
  template <typename Y, typename X, typename M, AttentionMask Mask, Executor E = Serial>
  void forward_cross_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x,
                          const Eigen::MatrixBase<M>& memory, const Mask& mask, Tape& tape, Workspace& workspace,
                          E&& executor = {}) const {
    forward_cross_into(y, x, memory, mask, {x.rows()}, {memory.rows()}, tape, workspace, executor);
  }

  /// forward_cross(x, memory, mask, lengths, memory_lengths, tape) into y.
  template <typename Y, typename X, typename M, AttentionMask Mask, Executor E = Serial>
  void forward_cross_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x,
                          const Eigen::MatrixBase<M>& memory, const Mask& mask, const SequenceLengths& lengths,
                          const SequenceLengths& memory_lengths, Tape& tape, Workspace& workspace,
                          E&& executor = {}) const {
    tape.filled = false;  // until forward_cross has come to its end
    Passes::check_sequences(y, x, memory, mask, lengths, memory_lengths);
    Passes::record(tape, x, memory, mask, lengths, memory_lengths);
    Passes::attend_to_memory(Passes::output_of(y), Passes::input_of(tape.x), Passes::input_of(tape.memory), mask,
                             lengths, memory_lengths, &tape, workspace, executor);
    tape.filled = true;
  }

  /// backward_cross(dy, tape, grad) into dx and dmemory.
  template <typename DX, typename DM, typename DY, Executor E = Serial>
  void backward_cross_into(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DM>& dmemory,
                           const Eigen::MatrixBase<DY>& dy, const Tape& tape, CrossAttention& grad,
                           Workspace& workspace, E&& executor = {}) const {
    check_backward_cross(dx, dmemory, dy, tape, grad);
    const detail::Readable<DY> dy_read(dy.derived());
    const auto dmemory_map = Passes::output_of(dmemory);
    Passes::differentiate(Passes::output_of(dx), &dmemory_map, Passes::input_of(dy_read), tape, grad, {}, workspace,
                          executor);
  }

  /// backward_cross(dy, tape, grad, dbias) into dx and dmemory.
  template <typename DX, typename DM, typename DY, typename DB, Executor E = Serial>
  void backward_cross_into(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DM>& dmemory,
                           const Eigen::MatrixBase<DY>& dy, const Tape& tape, CrossAttention& grad,
                           const Eigen::MatrixBase<DB>& dbias, Workspace& workspace, E&& executor = {}) const {
    check_backward_cross(dx, dmemory, dy, tape, grad);
    const auto to_bias = Passes::checked_bias_gradient(dbias, tape);
    const detail::Readable<DY> dy_read(dy.derived());
    const auto dmemory_map = Passes::output_of(dmemory);
    Passes::differentiate(Passes::output_of(dx), &dmemory_map, Passes::input_of(dy_read), tape, grad, to_bias,
                          workspace, executor);
  }

 protected:
  using Passes::config_, Passes::Passes;

 private:
  template <typename DX, typename DM, typename DY>
  void check_backward_cross(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DM>& dmemory,
                            const Eigen::MatrixBase<DY>& dy, const Tape& tape, const CrossAttention& grad) const {
    static_assert(std::is_same_v<typename DM::Scalar, Scalar>,
                  "diffattn: dmemory must have the scalar type of the layer; convert with .template cast<>()");
    Passes::check_backward(dx, dy, tape, grad, true);
    detail::check_shape(Variant::kName, "dmemory", dmemory, tape.memory.rows(), config_.embed_dim);
  }
};

}  // namespace diffattn::inline v0_1
