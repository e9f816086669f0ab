#pragma once

// Standard scaled dot-product attention: softmax(s·Q Kᵀ + bias) V, s = 1/sqrt(d) unless the options say otherwise.
//
//   attention(q, k, v, mask, options)                     → n_q x dv            one head
//   multihead_attention(q, k, v, heads, mask, options)    → n_q x H·dv          H heads, side by side in the columns
//   attention_into(out, q, k, v, mask, options, workspace, executor)            the same, into your matrix
//   multihead_attention_into(out, q, k, v, heads, mask, options, workspace, executor)
//
// mask, options, workspace and executor can be left out, from the right: FullMask{}, {}, the thread's, Serial.
//
// Shapes     q (n_q x d) · k (n_k x d) · v (n_k x dv) → out (n_q x dv); any n_q, n_k >= 0, any d, dv >= 1.
//            Multi-head: q (n_q x H·d) · k (n_k x G·d) · v (n_k x G·dv) → out (n_q x H·dv).
// Operands   any dense Eigen expression of float or double, either storage order, any strides; one without memory of
//            its own is evaluated once. `out` is written in place, must have its shape, and must not overlap an
//            operand.
// bfloat16   q, k and v may be of Eigen::bfloat16, all three, and `out` then of that or of float. Products are added up
//            in float, scores, softmax and sums are float's, and weights are rounded once, before they meet v: up to
//            2^-8 of each weight. A CPU with AVX512_BF16 takes about 0.6 of float's time (it takes subnormal numbers
//            for 0); others widen, and take about as long as for float. There are no gradients of it.
// Masks      mask.hpp. A query that sees no key gives exactly 0; what a masked key or value holds never matters.
// Errors     ShapeError, std::invalid_argument; before any work, and nothing has been written. What a mask, a bias or
//            an executor of yours throws, and std::bad_alloc, reach the caller; `out` then holds anything.
// Memory     O((n_k + rows)·(d + dv)), a packed copy of the keys and values of one head at a time (of more heads with a
//            parallel executor). Taken from `workspace`; a workspace that has seen the shape before is not grown. A
//            call without one uses its thread's, which keeps up to 1 MB.
// Threads    as many as the executor has; the result is bitwise the same for any number.
// Cost       2·n_q·n_k·(d + dv) FLOP a head over the keys that are visible: whole chunks outside the mask are skipped.

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/forward/head_schedule.hpp"
#include "diffattn/kernels/detail/forward/standard_block.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

/// softmax(s·q kᵀ) v: q (n_q x d), k (n_k x d), v (n_k x dv) → n_q x dv. Throws ShapeError.
template <typename Q, typename K, typename V, AttentionMask Mask = FullMask>
Matrix<typename Q::Scalar> attention(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                     const Eigen::MatrixBase<V>& v, const Mask& mask = {},
                                     const AttentionOptions& options = {}) {
  Matrix<typename Q::Scalar> out(q.rows(), v.cols());
  attention_into(out, q, k, v, mask, options);
  return out;
}

/// H = heads.num_heads heads and G = heads.num_kv_heads of keys and values, side by side: q (n_q x H·d), k (n_k x G·d),
/// v (n_k x G·dv) → n_q x H·dv. Throws ShapeError, and std::invalid_argument for heads that cannot be grouped.
template <typename Q, typename K, typename V, AttentionMask Mask = FullMask>
Matrix<typename Q::Scalar> multihead_attention(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                               const Eigen::MatrixBase<V>& v, Heads heads, const Mask& mask = {},
                                               const AttentionOptions& options = {}) {
  Matrix<typename Q::Scalar> out(q.rows(), detail::output_cols("attention", heads, detail::operand("v", v)));
  multihead_attention_into(out, q, k, v, heads, mask, options);
  return out;
}

/// attention(), written to `out`, which must be n_q x dv.
template <typename Out, typename Q, typename K, typename V, AttentionMask Mask = FullMask>
void attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                    const Eigen::MatrixBase<V>& v, const Mask& mask = {}, const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  attention_into(out, q, k, v, mask, options, workspace);
}

/// attention(), with scratch from `workspace`, on the threads of `executor`.
template <typename Out, typename Q, typename K, typename V, AttentionMask Mask, Executor E = Serial>
void attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                    const Eigen::MatrixBase<V>& v, const Mask& mask, const AttentionOptions& options,
                    Workspace& workspace, E&& executor = {}) {
  multihead_attention_into(out, q, k, v, Heads{1, 1}, mask, options, workspace, executor);
}

/// multihead_attention(), written to `out`, which must be n_q x H·dv.
template <typename Out, typename Q, typename K, typename V, AttentionMask Mask = FullMask>
void multihead_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                              const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v, Heads heads,
                              const Mask& mask = {}, const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  multihead_attention_into(out, q, k, v, heads, mask, options, workspace);
}

/// multihead_attention(), with scratch from `workspace`, on the threads of `executor`.
template <typename Out, typename Q, typename K, typename V, AttentionMask Mask, Executor E = Serial>
void multihead_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                              const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v, Heads heads,
                              const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                              E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  using Result = typename Out::Scalar;
  detail::check_output_scalar<Scalar, Out>();
  auto operands = detail::operands_of<Result>("attention", q, k, v, detail::operand("out", out), heads, mask, options);
  operands.in.out = detail::writable_view_of(out);
  detail::run_heads<detail::StandardBlock<Scalar, Result>>(operands.in, mask, workspace, executor);
}

}  // namespace diffattn::inline v0_1
