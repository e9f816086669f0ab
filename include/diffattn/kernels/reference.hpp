#pragma once

// The specification: differential and standard attention as the paper writes them, for float, double and long double.
// Plain loops, one whole n_q x n_k map at a time, no cleverness. Everything fast is tested against it.
//
//   attention_map      softmax(s·Q Kᵀ + bias)                                                   n_q x n_k
//   attention          softmax(s·Q Kᵀ + bias) V                                                 n_q x dv
//   diff_attention     (softmax(s·Q1 K1ᵀ + bias) − λ·softmax(s·Q2 K2ᵀ + bias)) V                n_q x dv   eq. (1)
//
// "Differential Transformer", Ye et al., arXiv 2410.05258; s is 1/sqrt(d) unless the options say otherwise. The softmax
// runs over the keys that the mask shows, and a row that sees none is 0. The difference is not renormalised: its rows
// sum to 1 − λ. λ is any number, or an n_q x 1 column with one for every query (DIFF V2).
//
//   softmax_statistics                                                                          n_q x 1 twice
//   attention_backward, diff_attention_backward       their gradients, by the chain rule from the same maps
//
// Shapes: q, q1, q2 (n_q x d) · k, k1, k2 (n_k x d) · v (n_k x dv). Any mismatch throws ShapeError.
// Cost: O(n_q·n_k·(d + dv)) time, O(n_q·n_k) memory.

#include <algorithm>
#include <cmath>
#include <limits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/gradients.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/kernels/softmax_statistics.hpp"

namespace diffattn::inline v0_1::reference {

/// s·q·k + bias of query i and key j, which the mask shows.
template <typename Q, typename K, typename Mask, typename Scalar>
Scalar score(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k, Index i, Index j, const Mask& mask,
             Scalar scale) {
  Scalar dot = 0;
  for (Index c = 0; c < q.cols(); ++c) dot += q(i, c) * k(j, c);
  if constexpr (detail::HasBias<Mask>) {
    // A visible key is a score like any other, however low.
    const Scalar bias = detail::bias_of<Scalar>(mask, 0, i, j, q.rows(), k.rows());
    return std::max(dot * scale + bias, std::numeric_limits<Scalar>::lowest());
  } else {
    return dot * scale;
  }
}

/// P = softmax(s·Q Kᵀ + bias), row by row. A masked key has weight 0, and so has every key of a row that sees none.
template <typename Q, typename K, typename Mask = FullMask>
Matrix<typename Q::Scalar> attention_map(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                         const Mask& mask = {}, const AttentionOptions& options = {}) {
  using Scalar = typename Q::Scalar;
  const Index n_q = q.rows(), n_k = k.rows();
  detail::check_shape("attention_map", "k", k, n_k, q.cols());
  detail::check_mask("attention_map", mask, 1, n_q, n_k);
  const Scalar scale = detail::scale_of<Scalar>(options, q.cols());

  Matrix<Scalar> p = Matrix<Scalar>::Zero(n_q, n_k);
  for (Index i = 0; i < n_q; ++i) {
    const auto [begin, end] = mask.visible_keys(i, n_q, n_k);
    const auto visible = [&](Index j) { return detail::bias_shows(mask, 0, i, j, n_q, n_k); };

    Scalar max = -std::numeric_limits<Scalar>::infinity();
    for (Index j = begin; j < end; ++j) {
      if (!visible(j)) continue;
      p(i, j) = score(q, k, i, j, mask, scale);
      if (p(i, j) > max) max = p(i, j);
    }
    if (max == -std::numeric_limits<Scalar>::infinity()) max = 0;  // no weight anywhere: exp gives zeros, or NaN

    Scalar sum = 0;
    for (Index j = begin; j < end; ++j) {
      if (!visible(j)) continue;
      p(i, j) = std::exp(p(i, j) - max);
      sum += p(i, j);
    }
    if (sum != 0) p.row(i) /= sum;
  }
  return p;
}

/// (m, l) of every row, n_q x 1 each: its largest score, and Σ exp(score − m) over the keys it sees; −inf and 0 for a
/// row that sees none. What is left of the softmax once P is forgotten (softmax_statistics.hpp).
template <typename Q, typename K, typename Mask = FullMask>
SoftmaxStatistics<typename Q::Scalar> softmax_statistics(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                                         const Mask& mask = {}, const AttentionOptions& options = {}) {
  using Scalar = typename Q::Scalar;
  const Index n_q = q.rows(), n_k = k.rows();
  detail::check_shape("softmax_statistics", "k", k, n_k, q.cols());
  detail::check_mask("softmax_statistics", mask, 1, n_q, n_k);
  const Scalar scale = detail::scale_of<Scalar>(options, q.cols());
  SoftmaxStatistics<Scalar> statistics;
  statistics.m = Matrix<Scalar>::Constant(n_q, 1, -std::numeric_limits<Scalar>::infinity());
  statistics.l = Matrix<Scalar>::Zero(n_q, 1);
  for (Index i = 0; i < n_q; ++i) {
    const auto for_each_key = [&](auto&& f) {
      const auto [begin, end] = mask.visible_keys(i, n_q, n_k);
      for (Index j = begin; j < end; ++j) {
        if (detail::bias_shows(mask, 0, i, j, n_q, n_k)) f(score(q, k, i, j, mask, scale));
      }
    };
    Scalar &m = statistics.m(i, 0), &l = statistics.l(i, 0);
    for_each_key([&](Scalar s) { m = s > m ? s : m; });
    const Scalar base = m == -std::numeric_limits<Scalar>::infinity() ? Scalar(0) : m;
    for_each_key([&](Scalar s) { l += std::exp(s - base); });
  }
  return statistics;
}

/// A V, leaving out the keys that the mask hides: 0 · NaN would not be 0.
template <typename Scalar, typename V, typename Mask>
Matrix<Scalar> apply_map(const Matrix<Scalar>& a, const Eigen::MatrixBase<V>& v, const Mask& mask) {
  const Index n_q = a.rows(), n_k = a.cols();
  Matrix<Scalar> out = Matrix<Scalar>::Zero(n_q, v.cols());
  for (Index i = 0; i < n_q; ++i) {
    const auto [begin, end] = mask.visible_keys(i, n_q, n_k);
    for (Index j = begin; j < end; ++j) {
      if (detail::bias_shows(mask, 0, i, j, n_q, n_k)) out.row(i) += a(i, j) * v.row(j);
    }
  }
  return out;
}

/// P V: q (n_q x d), k (n_k x d), v (n_k x dv) → n_q x dv. Throws ShapeError.
template <typename Q, typename K, typename V, typename Mask = FullMask>
Matrix<typename Q::Scalar> attention(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                     const Eigen::MatrixBase<V>& v, const Mask& mask = {},
                                     const AttentionOptions& options = {}) {
  detail::check_shape("attention", "k", k, k.rows(), q.cols());
  detail::check_shape("attention", "v", v, k.rows(), v.cols());
  return apply_map(attention_map(q, k, mask, options), v, mask);
}

/// (P1 − λ·P2) V, eq. (1): shapes as diff_attention() in kernels/diff_attention.hpp. Throws ShapeError.
template <typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda, typename Mask = FullMask>
Matrix<typename Q1::Scalar> diff_attention(const Eigen::MatrixBase<Q1>& q1, const Eigen::MatrixBase<K1>& k1,
                                           const Eigen::MatrixBase<Q2>& q2, const Eigen::MatrixBase<K2>& k2,
                                           const Eigen::MatrixBase<V>& v, const Lambda& lambda, const Mask& mask = {},
                                           const AttentionOptions& options = {}) {
  using Scalar = typename Q1::Scalar;
  const Index n_q = q1.rows(), n_k = k1.rows(), d = q1.cols();
  detail::check_shape("diff_attention", "k1", k1, n_k, d);
  detail::check_shape("diff_attention", "q2", q2, n_q, d);
  detail::check_shape("diff_attention", "k2", k2, n_k, d);
  detail::check_shape("diff_attention", "v", v, n_k, v.cols());

  const Matrix<Scalar> p1 = attention_map(q1, k1, mask, options);
  const Matrix<Scalar> p2 = attention_map(q2, k2, mask, options);
  Matrix<Scalar> difference(n_q, n_k);
  if constexpr (detail::is_scalar_lambda<Lambda>) {
    difference = p1 - static_cast<Scalar>(lambda) * p2;
  } else {
    detail::check_shape("diff_attention", "lambda", lambda, n_q, 1);
    difference = p1 - lambda.asDiagonal() * p2;
  }
  return apply_map(difference, v, mask);
}

/// Calls f(i, j) for every query i and key j that it sees.
template <typename Mask, typename F>
void for_each_visible(Index n_q, Index n_k, const Mask& mask, F&& f) {
  for (Index i = 0; i < n_q; ++i) {
    const auto [begin, end] = mask.visible_keys(i, n_q, n_k);
    for (Index j = begin; j < end; ++j) {
      if (detail::bias_shows(mask, 0, i, j, n_q, n_k)) f(i, j);
    }
  }
}

/// dA = dout·Vᵀ, 0 where the mask hides a key.
template <typename Scalar, typename V, typename G, typename Mask>
Matrix<Scalar> map_gradient(const Eigen::MatrixBase<V>& v, const Eigen::MatrixBase<G>& dout, const Mask& mask) {
  Matrix<Scalar> da = Matrix<Scalar>::Zero(dout.rows(), v.rows());
  for_each_visible(dout.rows(), v.rows(), mask, [&](Index i, Index j) {
    for (Index c = 0; c < v.cols(); ++c) da(i, j) += dout(i, c) * v(j, c);
  });
  return da;
}

/// dV = Aᵀ·dout.
template <typename Scalar, typename G, typename Mask>
Matrix<Scalar> value_gradient(const Matrix<Scalar>& a, const Eigen::MatrixBase<G>& dout, const Mask& mask) {
  Matrix<Scalar> dv = Matrix<Scalar>::Zero(a.cols(), dout.cols());
  for_each_visible(a.rows(), a.cols(), mask, [&](Index i, Index j) { dv.row(j) += a(i, j) * dout.row(i); });
  return dv;
}

/// From the map P and the gradient dP = factor·dA of each row: dS = P∘(dP − rowsum(P∘dP)), dQ = s·dS K, dK = s·dSᵀ Q.
/// Returns rowsum(P∘dA).
template <typename Scalar, typename Q, typename K, typename Mask>
Vector<Scalar> softmax_backward(Matrix<Scalar>& dq, Matrix<Scalar>& dk, const Eigen::MatrixBase<Q>& q,
                                const Eigen::MatrixBase<K>& k, const Matrix<Scalar>& p, const Matrix<Scalar>& da,
                                const Vector<Scalar>& factor, const Mask& mask, Scalar scale) {
  Vector<Scalar> sum = Vector<Scalar>::Zero(p.rows());
  for_each_visible(p.rows(), p.cols(), mask, [&](Index i, Index j) { sum[i] += p(i, j) * da(i, j); });
  dq = Matrix<Scalar>::Zero(q.rows(), q.cols());
  dk = Matrix<Scalar>::Zero(k.rows(), k.cols());
  for_each_visible(p.rows(), p.cols(), mask, [&](Index i, Index j) {
    const Scalar ds = factor[i] * p(i, j) * (da(i, j) - sum[i]);
    dq.row(i) += scale * ds * k.row(j);
    dk.row(j) += scale * ds * q.row(i);
  });
  return sum;
}

/// dQ, dK and dV of attention() from dout (n_q x dv). Throws ShapeError.
template <typename Q, typename K, typename V, typename G, typename Mask = FullMask>
AttentionGradients<typename Q::Scalar> attention_backward(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                                          const Eigen::MatrixBase<V>& v,
                                                          const Eigen::MatrixBase<G>& dout, const Mask& mask = {},
                                                          const AttentionOptions& options = {}) {
  using Scalar = typename Q::Scalar;
  detail::check_shape("attention_backward", "v", v, k.rows(), v.cols());
  detail::check_shape("attention_backward", "dout", dout, q.rows(), v.cols());
  const Matrix<Scalar> p = attention_map(q, k, mask, options);
  const Matrix<Scalar> da = map_gradient<Scalar>(v, dout, mask);
  AttentionGradients<Scalar> grad;
  grad.dv = value_gradient(p, dout, mask);
  softmax_backward<Scalar>(grad.dq, grad.dk, q, k, p, da, Vector<Scalar>::Ones(q.rows()), mask,
                           detail::scale_of<Scalar>(options, q.cols()));
  return grad;
}

/// dQ1, dK1, dQ2, dK2, dV and dλ of diff_attention() from dout (n_q x dv). Throws ShapeError.
template <typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda, typename G,
          typename Mask = FullMask>
DiffAttentionGradients<typename Q1::Scalar, Lambda> diff_attention_backward(
    const Eigen::MatrixBase<Q1>& q1, const Eigen::MatrixBase<K1>& k1, const Eigen::MatrixBase<Q2>& q2,
    const Eigen::MatrixBase<K2>& k2, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
    const Eigen::MatrixBase<G>& dout, const Mask& mask = {}, const AttentionOptions& options = {}) {
  using Scalar = typename Q1::Scalar;
  const Index n_q = q1.rows(), n_k = k1.rows(), d = q1.cols();
  detail::check_shape("diff_attention_backward", "q2", q2, n_q, d);
  detail::check_shape("diff_attention_backward", "k2", k2, n_k, d);
  detail::check_shape("diff_attention_backward", "v", v, n_k, v.cols());
  detail::check_shape("diff_attention_backward", "dout", dout, n_q, v.cols());
  Vector<Scalar> lambda_rows(n_q);
  if constexpr (detail::is_scalar_lambda<Lambda>) {
    lambda_rows.setConstant(static_cast<Scalar>(lambda));
  } else {
    detail::check_shape("diff_attention_backward", "lambda", lambda, n_q, 1);
    lambda_rows = lambda;
  }

  const Matrix<Scalar> p1 = attention_map(q1, k1, mask, options), p2 = attention_map(q2, k2, mask, options);
  const Matrix<Scalar> da = map_gradient<Scalar>(v, dout, mask);
  const Scalar scale = detail::scale_of<Scalar>(options, d);
  DiffAttentionGradients<Scalar, Lambda> grad;
  grad.dv = value_gradient<Scalar>(p1 - lambda_rows.asDiagonal() * p2, dout, mask);
  softmax_backward<Scalar>(grad.dq1, grad.dk1, q1, k1, p1, da, Vector<Scalar>::Ones(n_q), mask, scale);
  const Vector<Scalar> second = softmax_backward<Scalar>(grad.dq2, grad.dk2, q2, k2, p2, da, -lambda_rows, mask, scale);
  if constexpr (detail::is_scalar_lambda<Lambda>) {
    grad.dlambda = -second.sum();
  } else {
    grad.dlambda = -second;
  }
  return grad;
}

}  // namespace diffattn::inline v0_1::reference
