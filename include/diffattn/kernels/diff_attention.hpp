#pragma once

// Differential attention, eq. (1) of "Differential Transformer" (Ye et al., arXiv 2410.05258):
//
//   (softmax(s·Q1 K1ᵀ + bias) − λ·softmax(s·Q2 K2ᵀ + bias)) V,      s = 1/sqrt(d) unless the options say otherwise
//
//   diff_attention(q1, k1, q2, k2, v, lambda, mask, options)        → n_q x dv        one head
//   diff_attention_into(out, q1, k1, q2, k2, v, lambda, mask, options, workspace, executor)
//   multihead_diff_attention_into(out, q, k, v, lambda, heads, mask, options, workspace, executor)
//
// Shapes     q1, q2 (n_q x d) · k1, k2 (n_k x d) · v (n_k x dv) → out (n_q x dv); any d, dv >= 1 (dv need not be 2d).
//            Multi-head: q (n_q x 2H·d), packed head 2h is Q1_h and 2h+1 is Q2_h; k (n_k x 2G·d) likewise, or
//            (n_k x G·d) when both maps share their keys (DIFF V2); v (n_k x G·dv) → out (n_q x H·dv). That is
//            the layout of the official multihead_flashdiff_*.py and, shared, of multihead_flashdiffv2.py.
// λ          any number, negative and above 1 included; or one for every query, n_q x 1 (n_q x H for several heads).
//            The difference is not renormalised: the rows of P1 − λ·P2 sum to 1 − λ.
// Operands, masks, errors, memory, threads: as attention.hpp says, and a panel of 2 · 48 · n_k scores a worker besides.
// Cost       4·n_q·n_k·d + 2·n_q·n_k·dv FLOP a head over visible keys: with dv = 2d, that of two standard heads.

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/forward/differential_block.hpp"
#include "diffattn/kernels/detail/forward/head_schedule.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

template <typename Out, typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda,
          AttentionMask Mask, Executor E = Serial>
void diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q1>& q1,
                         const Eigen::MatrixBase<K1>& k1, const Eigen::MatrixBase<Q2>& q2,
                         const Eigen::MatrixBase<K2>& k2, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                         const Mask& mask, const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  using Scalar = typename Q1::Scalar;
  detail::check_scalars<Scalar, Out, K1, Q2, K2, V>();
  constexpr const char* where = "diff_attention";
  const Index n_q = q1.rows(), n_k = k1.rows(), d = detail::checked_width(where, "q1", q1.cols(), 1);
  detail::check_operand_sizes(where, q1, k1, v, 1, v.cols());
  detail::check_shape(where, "k1", k1, n_k, d);
  detail::check_shape(where, "q2", q2, n_q, d);
  detail::check_shape(where, "k2", k2, n_k, d);
  detail::check_shape(where, "v", v, n_k, detail::checked_width(where, "v", v.cols(), 1));
  detail::check_shape(where, "out", out, n_q, v.cols());
  detail::check_mask(where, mask, 1, n_q, n_k);

  const detail::Readable<Q1> q1_read(q1.derived());
  const detail::Readable<K1> k1_read(k1.derived());
  const detail::Readable<Q2> q2_read(q2.derived());
  const detail::Readable<K2> k2_read(k2.derived());
  const detail::Readable<V> v_read(v.derived());
  const detail::ReadableLambda<Lambda> lambda_read(lambda);
  detail::HeadOperands<Scalar, 2> in;
  in.out = detail::writable_view_of(out);
  in.q[0] = detail::view_of(q1_read);
  in.q[1] = detail::view_of(q2_read);
  in.k[0] = detail::view_of(k1_read);
  in.k[1] = detail::view_of(k2_read);
  in.v = detail::view_of(v_read);
  in.lambda = detail::lambda_view<Scalar>(where, lambda_read, n_q, 1);
  in.d = in.q_step = in.k_step = d;
  in.dv = v.cols();
  in.scale = detail::scale_of<Scalar>(options, d);
  detail::run_heads<detail::DifferentialBlock<Scalar>>(in, mask, workspace, executor);
}

template <typename Out, typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda,
          AttentionMask Mask = FullMask>
void diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q1>& q1,
                         const Eigen::MatrixBase<K1>& k1, const Eigen::MatrixBase<Q2>& q2,
                         const Eigen::MatrixBase<K2>& k2, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                         const Mask& mask = {}, const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  diff_attention_into(out, q1, k1, q2, k2, v, lambda, mask, options, workspace);
}

template <typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda,
          AttentionMask Mask = FullMask>
Matrix<typename Q1::Scalar> diff_attention(const Eigen::MatrixBase<Q1>& q1, const Eigen::MatrixBase<K1>& k1,
                                           const Eigen::MatrixBase<Q2>& q2, const Eigen::MatrixBase<K2>& k2,
                                           const Eigen::MatrixBase<V>& v, const Lambda& lambda, const Mask& mask = {},
                                           const AttentionOptions& options = {}) {
  Matrix<typename Q1::Scalar> out(q1.rows(), v.cols());
  diff_attention_into(out, q1, k1, q2, k2, v, lambda, mask, options);
  return out;
}

template <typename Out, typename Q, typename K, typename V, typename Lambda, AttentionMask Mask, Executor E = Serial>
void multihead_diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                                   const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                                   Heads heads, const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                   E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  detail::check_scalars<Scalar, Out, K, V>();
  constexpr const char* where = "multihead_diff_attention";
  heads = detail::checked_heads(where, heads);
  const Index n_q = q.rows(), n_k = k.rows();
  const Index d = detail::checked_width(where, "q", q.cols(), 2 * heads.num_heads);
  const Index dv = detail::checked_width(where, "v", v.cols(), heads.num_kv_heads);
  detail::check_operand_sizes(where, q, k, v, heads.num_heads, dv);
  const bool shared_keys = k.cols() == heads.num_kv_heads * d;
  if (!shared_keys) detail::check_shape(where, "k", k, n_k, 2 * heads.num_kv_heads * d);
  detail::check_shape(where, "v", v, n_k, heads.num_kv_heads * dv);
  detail::check_shape(where, "out", out, n_q, heads.num_heads * dv);
  detail::check_mask(where, mask, heads.num_heads, n_q, n_k);

  const detail::Readable<Q> q_read(q.derived());
  const detail::Readable<K> k_read(k.derived());
  const detail::Readable<V> v_read(v.derived());
  const detail::ReadableLambda<Lambda> lambda_read(lambda);
  detail::HeadOperands<Scalar, 2> in;
  in.out = detail::writable_view_of(out);
  for (Index map = 0; map < 2; ++map) {
    const Index key_map = shared_keys ? 0 : map;
    in.q[map] = detail::view_of(q_read).middle_cols(map * d, q.cols() - map * d);
    in.k[map] = detail::view_of(k_read).middle_cols(key_map * d, k.cols() - key_map * d);
  }
  in.v = detail::view_of(v_read);
  in.lambda = detail::lambda_view<Scalar>(where, lambda_read, n_q, heads.num_heads);
  in.heads = heads;
  in.d = d;
  in.dv = dv;
  in.q_step = 2 * d;
  in.k_step = shared_keys ? d : 2 * d;
  in.scale = detail::scale_of<Scalar>(options, d);
  detail::run_heads<detail::DifferentialBlock<Scalar>>(in, mask, workspace, executor);
}

}  // namespace diffattn::inline v0_1
