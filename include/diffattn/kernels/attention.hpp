#pragma once

// Standard scaled dot-product attention: softmax(s·Q Kᵀ + bias) V, s = 1/sqrt(d) unless the options say otherwise.
//
//   attention(q, k, v, mask, options)                → n_q x dv                       one head
//   attention_into(out, q, k, v, mask, options, workspace, executor)                  the same, into your matrix
//   multihead_attention_into(out, q, k, v, heads, mask, options, workspace, executor) heads side by side in the columns
//
// Shapes     q (n_q x d) · k (n_k x d) · v (n_k x dv) → out (n_q x dv); any n_q, n_k >= 0, any d, dv >= 1.
//            Multi-head: q (n_q x H·d) · k (n_k x G·d) · v (n_k x G·dv) → out (n_q x H·dv).
// Operands   any dense Eigen expression of float or double, either storage order, any strides; one without memory of
//            its own is evaluated once. `out` is written in place, must have its shape, and must not overlap an
//            operand.
// Masks      mask.hpp. A query that sees no key gives exactly 0; what a masked key or value holds never matters.
// Errors     ShapeError, std::invalid_argument; before any work, and nothing has been written. What a mask, a bias or
// an
//            executor of yours throws, and std::bad_alloc, reach the caller; `out` then holds anything.
// Memory     O((n_k + rows)·(d + dv)), a packed copy of the keys and values of one head at a time (of more heads with a
//            parallel executor). Taken from `workspace`; a workspace that has seen the shape before is not grown. A
//            call without one uses its thread's, which keeps up to 1 MB.
// Threads    as many as the executor has; the result is bitwise the same for any number.
// Cost       2·n_q·n_k·(d + dv) FLOP a head over the keys that are visible: whole chunks outside the mask are skipped.

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/forward/head_schedule.hpp"
#include "diffattn/kernels/detail/forward/standard_block.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

template <typename Out, typename Q, typename K, typename V, AttentionMask Mask, Executor E = Serial>
void multihead_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                              const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v, Heads heads,
                              const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                              E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  detail::check_scalars<Scalar, Out, K, V>();
  constexpr const char* where = "attention";
  heads = detail::checked_heads(where, heads);
  const Index n_q = q.rows(), n_k = k.rows();
  const Index d = detail::checked_width(where, "q", q.cols(), heads.num_heads);
  const Index dv = detail::checked_width(where, "v", v.cols(), heads.num_kv_heads);
  detail::check_operand_sizes(where, q, k, v, heads.num_heads, dv);
  detail::check_shape(where, "k", k, n_k, heads.num_kv_heads * d);
  detail::check_shape(where, "v", v, n_k, heads.num_kv_heads * dv);
  detail::check_shape(where, "out", out, n_q, heads.num_heads * dv);
  detail::check_mask(where, mask, heads.num_heads, n_q, n_k);

  const detail::Readable<Q> q_read(q.derived());
  const detail::Readable<K> k_read(k.derived());
  const detail::Readable<V> v_read(v.derived());
  detail::HeadOperands<Scalar, 1> in;
  in.out = detail::writable_view_of(out);
  in.q[0] = detail::view_of(q_read);
  in.k[0] = detail::view_of(k_read);
  in.v = detail::view_of(v_read);
  in.heads = heads;
  in.d = in.q_step = in.k_step = d;
  in.dv = dv;
  in.scale = detail::scale_of<Scalar>(options, d);
  detail::run_heads<detail::StandardBlock<Scalar>>(in, mask, workspace, executor);
}

template <typename Out, typename Q, typename K, typename V, AttentionMask Mask, Executor E = Serial>
void attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                    const Eigen::MatrixBase<V>& v, const Mask& mask, const AttentionOptions& options,
                    Workspace& workspace, E&& executor = {}) {
  multihead_attention_into(out, q, k, v, Heads{1, 1}, mask, options, workspace, executor);
}

template <typename Out, typename Q, typename K, typename V, AttentionMask Mask = FullMask>
void attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                    const Eigen::MatrixBase<V>& v, const Mask& mask = {}, const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  attention_into(out, q, k, v, mask, options, workspace);
}

template <typename Q, typename K, typename V, AttentionMask Mask = FullMask>
Matrix<typename Q::Scalar> attention(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                     const Eigen::MatrixBase<V>& v, const Mask& mask = {},
                                     const AttentionOptions& options = {}) {
  Matrix<typename Q::Scalar> out(q.rows(), v.cols());
  attention_into(out, q, k, v, mask, options);
  return out;
}

}  // namespace diffattn::inline v0_1
