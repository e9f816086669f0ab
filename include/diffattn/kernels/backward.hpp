#pragma once

// The gradients of attention and of differential attention, from dout, the gradient of the output:
//
//   attention_backward(q, k, v, dout, mask, options)                             → {dq, dk, dv}
//   diff_attention_backward(q1, k1, q2, k2, v, lambda, dout, mask, options)      → {dq1, dk1, dq2, dk2, dv, dlambda}
//   multihead_attention_backward(q, k, v, dout, heads, mask, options)            → {dq, dk, dv}
//   multihead_diff_attention_backward(q, k, v, lambda, dout, heads, mask, …)     → {dq, dk, dv, dlambda}
//   …_into(gradients, …the same…, mask, options, workspace, executor)            into a struct of gradients.hpp
//
// mask, options, workspace and executor can be left out, from the right: FullMask{}, {}, the thread's, Serial.
//
// With A = P1 − λ·P2 (maps of eq. (1), Ye et al., arXiv 2410.05258), s the scale of the scores:
//   dV = Aᵀ dout · dA = dout Vᵀ · Dm = rowsum(Pm ∘ dA) · dS1 = P1 ∘ (dA − D1), dS2 = −λ·P2 ∘ (dA − D2)
//   dQm = s·dSm Km · dKm = s·dSmᵀ Qm · dλ = −Σ D2
// Heads h that share Q2, and so P2: dS2 = P2 ∘ Σ_h −λ_h·(dA_h − D2_h), which meets K2 and Q2 once.
//
// Shapes     every gradient has the shape of its operand; dout has the output's. Operands and layouts of several heads
//            are those of the forward functions: gradients of key and value heads that several query heads read are
//            summed, and so are those of keys that both maps share and of queries of noise that several heads share.
//            dlambda is a number for a scalar λ (summed over queries and heads), else a matrix like λ. `_into` resizes
//            the matrices of `gradients` where they differ; several heads also write to matrices of yours, of any
//            strides: {dq, dk, dv} or {dq, dk, dv, dlambda} in the place of `gradients`. Results are overwritten, not
//            added to.
// Masks      a hidden key gets no gradient from a query that does not see it, and gives none, whatever they hold; a row
//            that sees nothing has gradient 0.
// Biases     Under a mask with a learned bias (learned_bias.hpp) there is one more, dbias, of the shape of its table:
//            what is returned has it, {dq, dk, dv, dbias} or {dq, dk, dv, dlambda, dbias} may name a matrix for it.
// Errors     ShapeError and std::invalid_argument before any work. What a mask, a bias or an executor of yours throws,
//            and std::bad_alloc, reach the caller; the gradients then hold anything.
// Memory     a panel of 96 · n_k · (maps + 1) values a worker, 96 · n_k more where heads share P2; packed keys and
//            values of a head and their gradients a worker. Threads as in attention.hpp: same bits for any number.
// Cost       2·n_q·n_k·(maps·3·d + 2·dv) FLOP a head over visible pairs: with dv = 2d, that of two standard heads. Of r
//            heads that share P2, r − 1 save 3·d of the 6·d: 31/40 for r = 4.

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward/backward_schedule.hpp"
#include "diffattn/kernels/detail/backward/gradient_views.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/gradients.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

/// The gradients of attention(): q (n_q x d), k (n_k x d), v (n_k x dv), dout (n_q x dv) → {dq, dk, dv}. Throws
/// ShapeError.
template <typename Q, typename K, typename V, typename G, AttentionMask Mask = FullMask>
AttentionGradients<typename Q::Scalar, has_learned_bias<Mask>> attention_backward(
    const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
    const Eigen::MatrixBase<G>& dout, const Mask& mask = {}, const AttentionOptions& options = {}) {
  AttentionGradients<typename Q::Scalar, has_learned_bias<Mask>> gradients;
  attention_backward_into(gradients, q, k, v, dout, mask, options);
  return gradients;
}

/// The gradients of diff_attention(), eq. (1): q1, q2 (n_q x d), k1, k2 (n_k x d), v (n_k x dv), dout (n_q x dv),
/// lambda a number or n_q x 1 → {dq1, dk1, dq2, dk2, dv, dlambda}. Throws ShapeError.
template <typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda, typename G,
          AttentionMask Mask = FullMask>
DiffAttentionGradients<typename Q1::Scalar, Lambda, has_learned_bias<Mask>> diff_attention_backward(
    const Eigen::MatrixBase<Q1>& q1, const Eigen::MatrixBase<K1>& k1, const Eigen::MatrixBase<Q2>& q2,
    const Eigen::MatrixBase<K2>& k2, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
    const Eigen::MatrixBase<G>& dout, const Mask& mask = {}, const AttentionOptions& options = {}) {
  DiffAttentionGradients<typename Q1::Scalar, Lambda, has_learned_bias<Mask>> gradients;
  diff_attention_backward_into(gradients, q1, k1, q2, k2, v, lambda, dout, mask, options);
  return gradients;
}

/// The gradients of multihead_attention(), operands as there, dout (n_q x H·dv) → {dq, dk, dv}. Throws ShapeError, and
/// std::invalid_argument for heads that cannot be grouped.
template <typename Q, typename K, typename V, typename G, AttentionMask Mask = FullMask>
AttentionGradients<typename Q::Scalar, has_learned_bias<Mask>> multihead_attention_backward(
    const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
    const Eigen::MatrixBase<G>& dout, Heads heads, const Mask& mask = {}, const AttentionOptions& options = {}) {
  AttentionGradients<typename Q::Scalar, has_learned_bias<Mask>> gradients;
  multihead_attention_backward_into(gradients, q, k, v, dout, heads, mask, options);
  return gradients;
}

/// The gradients of multihead_diff_attention(), operands as there, dout (n_q x H·dv) → {dq, dk, dv, dlambda}. Throws
/// ShapeError, and std::invalid_argument for heads that cannot be grouped.
template <typename Q, typename K, typename V, typename Lambda, typename G, AttentionMask Mask = FullMask>
MultiheadDiffAttentionGradients<typename Q::Scalar, Lambda, has_learned_bias<Mask>> multihead_diff_attention_backward(
    const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
    const Eigen::MatrixBase<G>& dout, Heads heads, const Mask& mask = {}, const AttentionOptions& options = {}) {
  MultiheadDiffAttentionGradients<typename Q::Scalar, Lambda, has_learned_bias<Mask>> gradients;
  multihead_diff_attention_backward_into(gradients, q, k, v, lambda, dout, heads, mask, options);
  return gradients;
}

namespace detail {

/// `gradients`: what gradient_views() takes.
template <typename Gradients, typename Q, typename K, typename V, typename G, typename Mask, Executor E>
void run_attention_backward(const char* where, Gradients& gradients, const Eigen::MatrixBase<Q>& q,
                            const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
                            const Eigen::MatrixBase<G>& dout, Heads heads, const Mask& mask,
                            const AttentionOptions& options, Workspace& workspace, E& executor) {
  using Scalar = typename Q::Scalar;
  check_result_scalar<Scalar, G>();
  const auto operands = operands_of<Scalar>(where, q, k, v, operand("dout", dout), heads, mask, options);
  const AttentionGradientViews<Scalar> to = gradient_views(where, gradients, operands.sizes);
  const Readable<G> dout_read(dout.derived());
  HeadGradients<Scalar, 1> grad(operands.in, view_of(dout_read));
  grad.of_q[0] = to.dq;
  grad.of_k[0] = to.dk;
  grad.of_v = to.dv;
  grad.of_bias = bias_gradient_view<Scalar>(where, gradients, mask);
  run_heads_backward(operands.in, grad, mask, workspace, executor);
}

/// Runs `in` and turns D of the second map into dλ: dlambda is 1 x 1 for a λ that is one number.
template <typename Lambda, typename Scalar, typename Mask, Executor E>
void run_diff_backward(const HeadOperands<Scalar, 2>& in, HeadGradients<Scalar, 2>& grad,
                       const StridedView<Scalar>& dlambda, const Mask& mask, Workspace& workspace, E& executor) {
  const Index n_q = in.n_q(), num_heads = in.heads.num_heads;
  const auto frame = workspace.frame();
  grad.d2 = workspace.take<Scalar>(num_heads * n_q);
  run_heads_backward(in, grad, mask, workspace, executor);
  if constexpr (is_scalar_lambda<Lambda>) {
    Scalar sum = 0;
    for (Index i = 0; i < num_heads * n_q; ++i) sum -= grad.d2[i];
    dlambda(0, 0) = sum;
  } else {
    for (Index i = 0; i < n_q; ++i) {
      for (Index head = 0; head < num_heads; ++head) dlambda(i, head) = -grad.second_dots(head)[i];
    }
  }
}

template <typename Gradients, typename Q, typename K, typename V, typename Lambda, typename G, typename Mask,
          Executor E>
void run_multihead_diff_backward(Gradients& gradients, const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                 const Eigen::MatrixBase<V>& v, const Lambda& lambda, const Eigen::MatrixBase<G>& dout,
                                 Heads heads, const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                 E& executor) {
  using Scalar = typename Q::Scalar;
  constexpr const char* where = "multihead_diff_attention_backward";
  check_result_scalar<Scalar, G>();
  const auto operands = operands_of<Scalar>(where, q, k, v, lambda, operand("dout", dout), heads, mask, options);
  const CallSizes& sizes = operands.sizes;
  const DiffAttentionGradientViews<Scalar> to = gradient_views<Lambda>(where, gradients, sizes);
  const Readable<G> dout_read(dout.derived());
  HeadGradients<Scalar, 2> grad(operands.in, view_of(dout_read));
  spread_queries(grad.of_q, to.dq, sizes);
  spread_maps(grad.of_k, to.dk, sizes.key_maps, sizes.d);
  grad.of_v = to.dv;
  grad.of_bias = bias_gradient_view<Scalar>(where, gradients, mask);
  run_diff_backward<Lambda>(operands.in, grad, to.dlambda, mask, workspace, executor);
}

}  // namespace detail

/// attention_backward(), into `gradients`, which are resized where they have another shape.
template <typename Scalar, bool kBias, typename Q, typename K, typename V, typename G, AttentionMask Mask = FullMask>
void attention_backward_into(AttentionGradients<Scalar, kBias>& gradients, const Eigen::MatrixBase<Q>& q,
                             const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
                             const Eigen::MatrixBase<G>& dout, const Mask& mask = {},
                             const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  attention_backward_into(gradients, q, k, v, dout, mask, options, workspace);
}

/// attention_backward(), with scratch from `workspace`, on the threads of `executor`.
template <typename Scalar, bool kBias, typename Q, typename K, typename V, typename G, AttentionMask Mask,
          Executor E = Serial>
void attention_backward_into(AttentionGradients<Scalar, kBias>& gradients, const Eigen::MatrixBase<Q>& q,
                             const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
                             const Eigen::MatrixBase<G>& dout, const Mask& mask, const AttentionOptions& options,
                             Workspace& workspace, E&& executor = {}) {
  detail::check_gradient_scalar<Scalar, Q>();
  detail::run_attention_backward("attention_backward", gradients, q, k, v, dout, Heads{1, 1}, mask, options, workspace,
                                 executor);
}

/// multihead_attention_backward(), into `gradients`, which are resized where they have another shape.
template <typename Scalar, bool kBias, typename Q, typename K, typename V, typename G, AttentionMask Mask = FullMask>
void multihead_attention_backward_into(AttentionGradients<Scalar, kBias>& gradients, const Eigen::MatrixBase<Q>& q,
                                       const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
                                       const Eigen::MatrixBase<G>& dout, Heads heads, const Mask& mask = {},
                                       const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  multihead_attention_backward_into(gradients, q, k, v, dout, heads, mask, options, workspace);
}

/// multihead_attention_backward(), with scratch from `workspace`, on the threads of `executor`.
template <typename Scalar, bool kBias, typename Q, typename K, typename V, typename G, AttentionMask Mask,
          Executor E = Serial>
void multihead_attention_backward_into(AttentionGradients<Scalar, kBias>& gradients, const Eigen::MatrixBase<Q>& q,
                                       const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
                                       const Eigen::MatrixBase<G>& dout, Heads heads, const Mask& mask,
                                       const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  detail::check_gradient_scalar<Scalar, Q>();
  detail::run_attention_backward("multihead_attention_backward", gradients, q, k, v, dout, heads, mask, options,
                                 workspace, executor);
}

/// The same into matrices of yours: {dq, dk, dv}, of the shapes of q, k and v, any strides.
template <typename Q, typename K, typename V, typename G, AttentionMask Mask, Executor E = Serial>
void multihead_attention_backward_into(const AttentionGradientViews<typename Q::Scalar>& gradients,
                                       const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                       const Eigen::MatrixBase<V>& v, const Eigen::MatrixBase<G>& dout, Heads heads,
                                       const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                       E&& executor = {}) {
  detail::run_attention_backward("multihead_attention_backward", gradients, q, k, v, dout, heads, mask, options,
                                 workspace, executor);
}

/// diff_attention_backward(), into `gradients`, which are resized where they have another shape.
template <typename Scalar, bool kBias, typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda,
          typename G, AttentionMask Mask = FullMask>
void diff_attention_backward_into(DiffAttentionGradients<Scalar, Lambda, kBias>& gradients,
                                  const Eigen::MatrixBase<Q1>& q1, const Eigen::MatrixBase<K1>& k1,
                                  const Eigen::MatrixBase<Q2>& q2, const Eigen::MatrixBase<K2>& k2,
                                  const Eigen::MatrixBase<V>& v, const Lambda& lambda, const Eigen::MatrixBase<G>& dout,
                                  const Mask& mask = {}, const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  diff_attention_backward_into(gradients, q1, k1, q2, k2, v, lambda, dout, mask, options, workspace);
}

/// diff_attention_backward(), with scratch from `workspace`, on the threads of `executor`.
template <typename Scalar, bool kBias, typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda,
          typename G, AttentionMask Mask, Executor E = Serial>
void diff_attention_backward_into(DiffAttentionGradients<Scalar, Lambda, kBias>& gradients,
                                  const Eigen::MatrixBase<Q1>& q1, const Eigen::MatrixBase<K1>& k1,
                                  const Eigen::MatrixBase<Q2>& q2, const Eigen::MatrixBase<K2>& k2,
                                  const Eigen::MatrixBase<V>& v, const Lambda& lambda, const Eigen::MatrixBase<G>& dout,
                                  const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                  E&& executor = {}) {
  detail::check_gradient_scalar<Scalar, Q1>();
  detail::check_result_scalar<Scalar, G>();
  const auto operands = detail::operands_of<Scalar>("diff_attention_backward", q1, k1, q2, k2, v, lambda,
                                                    detail::operand("dout", dout), mask, options);
  const detail::Readable<G> dout_read(dout.derived());
  detail::HeadGradients<Scalar, 2> grad(operands.in, detail::view_of(dout_read));
  detail::set_gradients(grad, gradients, operands.sizes);
  grad.of_bias = detail::bias_gradient_view<Scalar>("diff_attention_backward", gradients, mask);
  const StridedView<Scalar> dlambda = detail::resized_lambda_gradient(gradients, operands.sizes);
  detail::run_diff_backward<Lambda>(operands.in, grad, dlambda, mask, workspace, executor);
}

/// multihead_diff_attention_backward(), into `gradients`, which are resized where they have another shape.
template <typename Scalar, bool kBias, typename Q, typename K, typename V, typename Lambda, typename G,
          AttentionMask Mask = FullMask>
void multihead_diff_attention_backward_into(MultiheadDiffAttentionGradients<Scalar, Lambda, kBias>& gradients,
                                            const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                            const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                                            const Eigen::MatrixBase<G>& dout, Heads heads, const Mask& mask = {},
                                            const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  multihead_diff_attention_backward_into(gradients, q, k, v, lambda, dout, heads, mask, options, workspace);
}

/// multihead_diff_attention_backward(), with scratch from `workspace`, on the threads of `executor`.
template <typename Scalar, bool kBias, typename Q, typename K, typename V, typename Lambda, typename G,
          AttentionMask Mask, Executor E = Serial>
void multihead_diff_attention_backward_into(MultiheadDiffAttentionGradients<Scalar, Lambda, kBias>& gradients,
                                            const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                            const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                                            const Eigen::MatrixBase<G>& dout, Heads heads, const Mask& mask,
                                            const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  detail::check_gradient_scalar<Scalar, Q>();
  detail::run_multihead_diff_backward(gradients, q, k, v, lambda, dout, heads, mask, options, workspace, executor);
}

/// The same into matrices of yours: {dq, dk, dv, dlambda}, of the shapes of q, k, v and λ, any strides; dlambda is a
/// number for a λ that is one.
template <typename Q, typename K, typename V, typename Lambda, typename G, AttentionMask Mask, Executor E = Serial>
void multihead_diff_attention_backward_into(const DiffAttentionGradientViews<typename Q::Scalar>& gradients,
                                            const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                            const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                                            const Eigen::MatrixBase<G>& dout, Heads heads, const Mask& mask,
                                            const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  detail::run_multihead_diff_backward(gradients, q, k, v, lambda, dout, heads, mask, options, workspace, executor);
}

}  // namespace diffattn::inline v0_1
