#pragma once

// Differential attention and its gradients as a good Eigen user writes them: score matrices, Eigen's own products and
// exponential. Queries come in panels of rows: under a causal mask a panel leaves out the keys that none of its rows
// sees, which takes half the time of whole matrices and less than Eigen's triangular products; and without a mask it
// is not slower, because its scores stay in the cache.

#include <algorithm>
#include <cmath>

#include "diffattn/core/matrix.hpp"

namespace bench {

using diffattn::Index;
using diffattn::Matrix;
using diffattn::Vector;

/// Queries of a panel: the fastest of 48, 64, 96, 128, 192 and 256 for most shapes, and close to it for the others.
inline constexpr Index kPanelRows = 96;

/// Calls visit(first, rows, seen) for every panel: queries first … first + rows − 1, the last of which sees the keys
/// 0 … seen − 1.
template <typename Visit>
void for_each_panel(Index n_q, Index n_k, bool causal, const Visit& visit) {
  for (Index first = 0; first < n_q; first += kPanelRows) {
    const Index rows = std::min(kPanelRows, n_q - first);
    visit(first, rows, causal ? first + rows + n_k - n_q : n_k);
  }
}

/// softmax(q kᵀ / √d) (n_q x n_k); if causal, the last query sees all keys and each one before it one less.
template <typename Q, typename K, typename Scalar = typename Q::Scalar>
Matrix<Scalar> plain_softmax(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k, bool causal) {
  Matrix<Scalar> p(q.rows(), k.rows());
  p.noalias() = (1 / std::sqrt(static_cast<Scalar>(q.cols())) * q) * k.transpose();
  for (Index i = 0; i < p.rows(); ++i) {
    const Index seen = causal ? i + 1 + k.rows() - q.rows() : k.rows();
    auto row = p.row(i).head(seen).array();
    row = (row - row.maxCoeff()).exp();
    row *= 1 / row.sum();
    p.row(i).tail(k.rows() - seen).setZero();
  }
  return p;
}

/// One head anywhere in memory: q1, q2 (n_q x d), k1, k2 (n_k x d), v (n_k x d_v).
template <typename Scalar>
struct PlainHead {
  using Operand = Eigen::Ref<const Matrix<Scalar>, 0, Eigen::OuterStride<>>;
  Operand q1, k1, q2, k2, v;
  Scalar lambda;
};

template <typename Scalar>
using PlainResult = Eigen::Ref<Matrix<Scalar>, 0, Eigen::OuterStride<>>;

/// out (n_q x d_v) = (P1 − λ·P2) v.
template <typename Scalar>
void plain_diff_attention_into(PlainResult<Scalar> out, const PlainHead<Scalar>& head, bool causal) {
  for_each_panel(head.q1.rows(), head.k1.rows(), causal, [&](Index first, Index rows, Index seen) {
    Matrix<Scalar> map = plain_softmax(head.q1.middleRows(first, rows), head.k1.topRows(seen), causal);
    map -= head.lambda * plain_softmax(head.q2.middleRows(first, rows), head.k2.topRows(seen), causal);
    out.middleRows(first, rows).noalias() = map * head.v.topRows(seen);
  });
}

template <typename Scalar>
Matrix<Scalar> plain_diff_attention(const Matrix<Scalar>& q1, const Matrix<Scalar>& k1, const Matrix<Scalar>& q2,
                                    const Matrix<Scalar>& k2, const Matrix<Scalar>& v, Scalar lambda, bool causal) {
  Matrix<Scalar> out(q1.rows(), v.cols());
  plain_diff_attention_into<Scalar>(out, {q1, k1, q2, k2, v, lambda}, causal);
  return out;
}

template <typename Scalar>
struct PlainGradients {
  Matrix<Scalar> dq1, dk1, dq2, dk2, dv;
  Scalar dlambda;
};

/// Turns probabilities p (n_q x n_k) into the gradient of their scores times `factor`, in place, from dp, the gradient
/// of p: factor · p ∘ (dp − rowsum(p ∘ dp)). Returns the sum of p ∘ dp.
template <typename Scalar>
Scalar plain_softmax_backward(Matrix<Scalar>& p, const Matrix<Scalar>& dp, Scalar factor) {
  const Vector<Scalar> sums = p.cwiseProduct(dp).rowwise().sum();
  p.array() *= (dp.colwise() - sums).array() * factor;
  return sums.sum();
}

/// Where the gradients of a head go: those of queries are overwritten, those of keys and values added to.
template <typename Scalar>
struct PlainHeadGradients {
  PlainResult<Scalar> dq1, dk1, dq2, dk2, dv;
};

/// From dout (n_q x d_v), the gradient of the output. Returns that of λ.
template <typename Scalar>
Scalar plain_diff_attention_backward_into(PlainHeadGradients<Scalar> to, const PlainHead<Scalar>& head,
                                          const typename PlainHead<Scalar>::Operand& dout, bool causal) {
  const Scalar scale = 1 / std::sqrt(static_cast<Scalar>(head.q1.cols()));
  Scalar dlambda = 0;
  for_each_panel(head.q1.rows(), head.k1.rows(), causal, [&](Index first, Index rows, Index seen) {
    const auto q1 = head.q1.middleRows(first, rows), q2 = head.q2.middleRows(first, rows);
    const auto k1 = head.k1.topRows(seen), k2 = head.k2.topRows(seen), v = head.v.topRows(seen);
    const auto dpanel = dout.middleRows(first, rows);
    Matrix<Scalar> p1 = plain_softmax(q1, k1, causal), p2 = plain_softmax(q2, k2, causal);
    const Matrix<Scalar> map = p1 - head.lambda * p2, dmap = dpanel * v.transpose();
    to.dv.topRows(seen).noalias() += map.transpose() * dpanel;
    plain_softmax_backward<Scalar>(p1, dmap, scale);
    dlambda -= plain_softmax_backward<Scalar>(p2, dmap, -head.lambda * scale);
    to.dq1.middleRows(first, rows).noalias() = p1 * k1;
    to.dq2.middleRows(first, rows).noalias() = p2 * k2;
    to.dk1.topRows(seen).noalias() += p1.transpose() * q1;
    to.dk2.topRows(seen).noalias() += p2.transpose() * q2;
  });
  return dlambda;
}

template <typename Scalar>
PlainGradients<Scalar> plain_diff_attention_backward(const Matrix<Scalar>& q1, const Matrix<Scalar>& k1,
                                                     const Matrix<Scalar>& q2, const Matrix<Scalar>& k2,
                                                     const Matrix<Scalar>& v, Scalar lambda, const Matrix<Scalar>& dout,
                                                     bool causal) {
  const auto zero = [](const Matrix<Scalar>& like) -> Matrix<Scalar> {
    return Matrix<Scalar>::Zero(like.rows(), like.cols());
  };
  PlainGradients<Scalar> to{zero(q1), zero(k1), zero(q2), zero(k2), zero(v), 0};
  to.dlambda = plain_diff_attention_backward_into<Scalar>({to.dq1, to.dk1, to.dq2, to.dk2, to.dv},
                                                          {q1, k1, q2, k2, v, lambda}, dout, causal);
  return to;
}

}  // namespace bench
