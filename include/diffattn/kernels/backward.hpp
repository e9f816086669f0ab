#pragma once

// The gradients of attention and of differential attention, from dout, the gradient of the output:
//
//   attention_backward(q, k, v, dout, mask, options)                             → {dq, dk, dv}
//   diff_attention_backward(q1, k1, q2, k2, v, lambda, dout, mask, options)      → {dq1, dk1, dq2, dk2, dv, dlambda}
//   attention_backward_into(gradients, q, k, v, dout, mask, options, workspace, executor)
//   diff_attention_backward_into(gradients, q1, k1, q2, k2, v, lambda, dout, mask, options, workspace, executor)
//   multihead_attention_backward_into(dq, dk, dv, q, k, v, dout, heads, mask, options, workspace, executor)
//   multihead_diff_attention_backward_into(dq, dk, dv, dlambda, q, k, v, lambda, dout, heads, mask, …)
//
// With A = P1 − λ·P2 (maps of eq. (1), Ye et al., arXiv 2410.05258), s the scale of the scores:
//   dV = Aᵀ dout · dA = dout Vᵀ · Dm = rowsum(Pm ∘ dA) · dS1 = P1 ∘ (dA − D1), dS2 = −λ·P2 ∘ (dA − D2)
//   dQm = s·dSm Km · dKm = s·dSmᵀ Qm · dλ = −Σ D2
//
// Shapes     every gradient has the shape of its operand; dout has the output's. Operands and layouts of several heads
//            are those of the forward functions: gradients of key and value heads that several query heads read are
//            summed, and so are those of keys that both maps share. dlambda is a number for a scalar λ (summed over
//            queries and heads), else a matrix like λ. `_into` resizes the matrices of `gradients` where they differ,
//            the multi-head functions write any strides. Results are overwritten, not added to.
// Masks      a hidden key gets no gradient from a query that does not see it, and gives none, whatever they hold; a row
//            that sees nothing has gradient 0.
// Errors     ShapeError and std::invalid_argument before any work. What a mask, a bias or an executor of yours throws,
//            and std::bad_alloc, reach the caller; the gradients then hold anything.
// Memory     a panel of 96 · n_k · (maps + 1) values a worker; packed keys and values of a head and their gradients a
//            worker. Threads as in attention.hpp: same bits for any number.
// Cost       2·n_q·n_k·(maps·3·d + 2·dv) FLOP a head over visible pairs: with dv = 2d, that of two standard heads.

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward/backward_schedule.hpp"
#include "diffattn/kernels/gradients.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

template <typename DQ, typename DK, typename DV, typename Q, typename K, typename V, typename G, AttentionMask Mask,
          Executor E = Serial>
void multihead_attention_backward_into(const Eigen::MatrixBase<DQ>& dq, const Eigen::MatrixBase<DK>& dk,
                                       const Eigen::MatrixBase<DV>& dv, const Eigen::MatrixBase<Q>& q,
                                       const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
                                       const Eigen::MatrixBase<G>& dout, Heads heads, const Mask& mask,
                                       const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  detail::check_scalars<Scalar, DQ, DK, DV, K, V, G>();
  constexpr const char* where = "multihead_attention_backward";
  heads = detail::checked_heads(where, heads);
  const Index n_q = q.rows(), n_k = k.rows();
  const Index d = detail::checked_width(where, "q", q.cols(), heads.num_heads);
  const Index width = detail::checked_width(where, "v", v.cols(), heads.num_kv_heads);
  detail::check_operand_sizes(where, q, k, v, heads.num_heads, width);
  detail::check_shape(where, "k", k, n_k, heads.num_kv_heads * d);
  detail::check_shape(where, "v", v, n_k, heads.num_kv_heads * width);
  detail::check_shape(where, "dout", dout, n_q, heads.num_heads * width);
  detail::check_shape(where, "dq", dq, n_q, q.cols());
  detail::check_shape(where, "dk", dk, n_k, k.cols());
  detail::check_shape(where, "dv", dv, n_k, v.cols());
  detail::check_mask(where, mask, heads.num_heads, n_q, n_k);

  const detail::Readable<Q> q_read(q.derived());
  const detail::Readable<K> k_read(k.derived());
  const detail::Readable<V> v_read(v.derived());
  const detail::Readable<G> dout_read(dout.derived());
  detail::HeadOperands<Scalar, 1> in;
  in.q[0] = detail::view_of(q_read);
  in.k[0] = detail::view_of(k_read);
  in.v = detail::view_of(v_read);
  in.heads = heads;
  in.d = in.q_step = in.k_step = d;
  in.dv = width;
  in.scale = detail::scale_of<Scalar>(options, d);
  detail::HeadGradients<Scalar, 1> grad;
  grad.dout = detail::view_of(dout_read);
  grad.dq[0] = detail::writable_view_of(dq);
  grad.dk[0] = detail::writable_view_of(dk);
  grad.dv = detail::writable_view_of(dv);
  detail::run_heads_backward(in, grad, static_cast<Scalar*>(nullptr), mask, workspace, executor);
}

template <typename Scalar, typename Q, typename K, typename V, typename G, AttentionMask Mask, Executor E = Serial>
void attention_backward_into(AttentionGradients<Scalar>& gradients, const Eigen::MatrixBase<Q>& q,
                             const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
                             const Eigen::MatrixBase<G>& dout, const Mask& mask, const AttentionOptions& options,
                             Workspace& workspace, E&& executor = {}) {
  constexpr const char* where = "attention_backward";
  detail::check_operand_sizes(where, q, k, v, 1, v.cols());
  detail::check_shape(where, "k", k, k.rows(), detail::checked_width(where, "q", q.cols(), 1));
  detail::check_shape(where, "v", v, k.rows(), detail::checked_width(where, "v", v.cols(), 1));
  detail::check_shape(where, "dout", dout, q.rows(), v.cols());
  detail::check_mask(where, mask, 1, q.rows(), k.rows());
  gradients.dq.resize(q.rows(), q.cols());
  gradients.dk.resize(k.rows(), k.cols());
  gradients.dv.resize(v.rows(), v.cols());
  multihead_attention_backward_into(gradients.dq, gradients.dk, gradients.dv, q, k, v, dout, Heads{}, mask, options,
                                    workspace, executor);
}

template <typename Q, typename K, typename V, typename G, AttentionMask Mask = FullMask>
AttentionGradients<typename Q::Scalar> attention_backward(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                                          const Eigen::MatrixBase<V>& v,
                                                          const Eigen::MatrixBase<G>& dout, const Mask& mask = {},
                                                          const AttentionOptions& options = {}) {
  AttentionGradients<typename Q::Scalar> gradients;
  Workspace workspace;
  attention_backward_into(gradients, q, k, v, dout, mask, options, workspace);
  return gradients;
}

namespace detail {

/// Runs `in` and turns D of the second map into dλ: a number, or a matrix written at any strides.
template <typename Scalar, typename DLambda, typename Mask, Executor E>
void run_diff_backward(const HeadOperands<Scalar, 2>& in, const HeadGradients<Scalar, 2>& grad, DLambda& dlambda,
                       const Mask& mask, Workspace& workspace, E& executor) {
  const Index n_q = in.q[0].rows, num_heads = in.heads.num_heads;
  const auto frame = workspace.frame();
  auto* const d2 = workspace.take<Scalar>(num_heads * n_q);
  run_heads_backward(in, grad, d2, mask, workspace, executor);
  if constexpr (std::is_same_v<DLambda, Scalar>) {
    Scalar sum = 0;
    for (Index i = 0; i < num_heads * n_q; ++i) sum -= d2[i];
    dlambda = sum;
  } else {
    const StridedView<Scalar> to = writable_view_of(dlambda);
    for (Index i = 0; i < n_q; ++i) {
      for (Index head = 0; head < num_heads; ++head) to(i, head) = -d2[head * n_q + i];
    }
  }
}

/// dlambda must be a Scalar for a scalar λ, else a matrix of its shape.
template <typename Scalar, typename Lambda, typename DLambda>
void check_lambda_gradient(const char* where, const DLambda& dlambda, Index rows, Index heads) {
  static_assert(is_scalar_lambda<Lambda> == std::is_arithmetic_v<DLambda>,
                "diffattn: dlambda must be a number for a scalar lambda, and a matrix for one with rows");
  if constexpr (!is_scalar_lambda<Lambda>) check_shape(where, "dlambda", dlambda, rows, heads);
}

}  // namespace detail

template <typename DQ, typename DK, typename DV, typename DLambda, typename Q, typename K, typename V, typename Lambda,
          typename G, AttentionMask Mask, Executor E = Serial>
void multihead_diff_attention_backward_into(const Eigen::MatrixBase<DQ>& dq, const Eigen::MatrixBase<DK>& dk,
                                            const Eigen::MatrixBase<DV>& dv, DLambda&& dlambda,
                                            const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                            const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                                            const Eigen::MatrixBase<G>& dout, Heads heads, const Mask& mask,
                                            const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  detail::check_scalars<Scalar, DQ, DK, DV, K, V, G>();
  constexpr const char* where = "multihead_diff_attention_backward";
  heads = detail::checked_heads(where, heads);
  const Index n_q = q.rows(), n_k = k.rows();
  const Index d = detail::checked_width(where, "q", q.cols(), 2 * heads.num_heads);
  const Index width = detail::checked_width(where, "v", v.cols(), heads.num_kv_heads);
  detail::check_operand_sizes(where, q, k, v, heads.num_heads, width);
  const bool shared_keys = k.cols() == heads.num_kv_heads * d;
  if (!shared_keys) detail::check_shape(where, "k", k, n_k, 2 * heads.num_kv_heads * d);
  detail::check_shape(where, "v", v, n_k, heads.num_kv_heads * width);
  detail::check_shape(where, "dout", dout, n_q, heads.num_heads * width);
  detail::check_shape(where, "dq", dq, n_q, q.cols());
  detail::check_shape(where, "dk", dk, n_k, k.cols());
  detail::check_shape(where, "dv", dv, n_k, v.cols());
  detail::check_lambda_gradient<Scalar, Lambda>(where, dlambda, n_q, heads.num_heads);
  detail::check_mask(where, mask, heads.num_heads, n_q, n_k);

  const detail::Readable<Q> q_read(q.derived());
  const detail::Readable<K> k_read(k.derived());
  const detail::Readable<V> v_read(v.derived());
  const detail::Readable<G> dout_read(dout.derived());
  const detail::ReadableLambda<Lambda> lambda_read(lambda);
  detail::HeadOperands<Scalar, 2> in;
  detail::HeadGradients<Scalar, 2> grad;
  for (Index map = 0; map < 2; ++map) {
    const Index key_map = shared_keys ? 0 : map;
    in.q[map] = detail::view_of(q_read).middle_cols(map * d, q.cols() - map * d);
    in.k[map] = detail::view_of(k_read).middle_cols(key_map * d, k.cols() - key_map * d);
    grad.dq[map] = detail::writable_view_of(dq).middle_cols(map * d, q.cols() - map * d);
    grad.dk[map] = detail::writable_view_of(dk).middle_cols(key_map * d, k.cols() - key_map * d);
  }
  in.v = detail::view_of(v_read);
  in.lambda = detail::lambda_view<Scalar>(where, lambda_read, n_q, heads.num_heads);
  in.heads = heads;
  in.d = d;
  in.dv = width;
  in.q_step = 2 * d;
  in.k_step = shared_keys ? d : 2 * d;
  in.scale = detail::scale_of<Scalar>(options, d);
  grad.dout = detail::view_of(dout_read);
  grad.dv = detail::writable_view_of(dv);
  detail::run_diff_backward(in, grad, dlambda, mask, workspace, executor);
}

template <typename Scalar, typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda, typename G,
          AttentionMask Mask, Executor E = Serial>
void diff_attention_backward_into(DiffAttentionGradients<Scalar, Lambda>& gradients, const Eigen::MatrixBase<Q1>& q1,
                                  const Eigen::MatrixBase<K1>& k1, const Eigen::MatrixBase<Q2>& q2,
                                  const Eigen::MatrixBase<K2>& k2, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                                  const Eigen::MatrixBase<G>& dout, const Mask& mask, const AttentionOptions& options,
                                  Workspace& workspace, E&& executor = {}) {
  detail::check_scalars<Scalar, Q1, K1, Q2, K2, V, G>();
  constexpr const char* where = "diff_attention_backward";
  const Index n_q = q1.rows(), n_k = k1.rows(), d = detail::checked_width(where, "q1", q1.cols(), 1);
  detail::check_operand_sizes(where, q1, k1, v, 1, v.cols());
  detail::check_shape(where, "k1", k1, n_k, d);
  detail::check_shape(where, "q2", q2, n_q, d);
  detail::check_shape(where, "k2", k2, n_k, d);
  detail::check_shape(where, "v", v, n_k, detail::checked_width(where, "v", v.cols(), 1));
  detail::check_shape(where, "dout", dout, n_q, v.cols());
  detail::check_mask(where, mask, 1, n_q, n_k);

  const detail::Readable<Q1> q1_read(q1.derived());
  const detail::Readable<K1> k1_read(k1.derived());
  const detail::Readable<Q2> q2_read(q2.derived());
  const detail::Readable<K2> k2_read(k2.derived());
  const detail::Readable<V> v_read(v.derived());
  const detail::Readable<G> dout_read(dout.derived());
  const detail::ReadableLambda<Lambda> lambda_read(lambda);
  detail::HeadOperands<Scalar, 2> in;
  in.q[0] = detail::view_of(q1_read);
  in.q[1] = detail::view_of(q2_read);
  in.k[0] = detail::view_of(k1_read);
  in.k[1] = detail::view_of(k2_read);
  in.v = detail::view_of(v_read);
  in.lambda = detail::lambda_view<Scalar>(where, lambda_read, n_q, 1);
  in.d = in.q_step = in.k_step = d;
  in.dv = v.cols();
  in.scale = detail::scale_of<Scalar>(options, d);

  gradients.dq1.resize(n_q, d);
  gradients.dk1.resize(n_k, d);
  gradients.dq2.resize(n_q, d);
  gradients.dk2.resize(n_k, d);
  gradients.dv.resize(n_k, v.cols());
  if constexpr (!detail::is_scalar_lambda<Lambda>) gradients.dlambda.resize(n_q);
  detail::HeadGradients<Scalar, 2> grad;
  grad.dout = detail::view_of(dout_read);
  grad.dq[0] = detail::writable_view_of(gradients.dq1);
  grad.dq[1] = detail::writable_view_of(gradients.dq2);
  grad.dk[0] = detail::writable_view_of(gradients.dk1);
  grad.dk[1] = detail::writable_view_of(gradients.dk2);
  grad.dv = detail::writable_view_of(gradients.dv);
  detail::run_diff_backward(in, grad, gradients.dlambda, mask, workspace, executor);
}

template <typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda, typename G,
          AttentionMask Mask = FullMask>
DiffAttentionGradients<typename Q1::Scalar, Lambda> diff_attention_backward(
    const Eigen::MatrixBase<Q1>& q1, const Eigen::MatrixBase<K1>& k1, const Eigen::MatrixBase<Q2>& q2,
    const Eigen::MatrixBase<K2>& k2, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
    const Eigen::MatrixBase<G>& dout, const Mask& mask = {}, const AttentionOptions& options = {}) {
  DiffAttentionGradients<typename Q1::Scalar, Lambda> gradients;
  Workspace workspace;
  diff_attention_backward_into(gradients, q1, k1, q2, k2, v, lambda, dout, mask, options, workspace);
  return gradients;
}

}  // namespace diffattn::inline v0_1
