#pragma once

// Differential attention and its gradients as a good Eigen user writes them: score matrices, Eigen's own products and
// exponential. Queries come in panels of rows: under a causal mask a panel leaves out the keys that none of its rows
// sees, which takes half the time of whole matrices and less than Eigen's triangular products; and without a mask it
// is not slower, because its scores stay in the cache.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

#include "diffattn/core/matrix.hpp"

namespace bench {

using diffattn::Index;
using diffattn::Matrix;
using diffattn::Vector;

/// Queries of a panel: the fastest of 48, 64, 96, 128, 192 and 256 for most shapes, and close to it for the others.
inline constexpr Index kPanelRows = 96;

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

/// Calls visit(first, panel) for every panel of a head: queries from row `first` on and the keys that the last of them
/// sees.
template <typename Scalar, typename Visit>
void for_each_panel(const PlainHead<Scalar>& head, bool causal, const Visit& visit) {
  const Index n_q = head.q1.rows(), n_k = head.k1.rows();
  for (Index first = 0; first < n_q; first += kPanelRows) {
    const Index rows = std::min(kPanelRows, n_q - first), seen = causal ? first + rows + n_k - n_q : n_k;
    visit(first,
          PlainHead<Scalar>{head.q1.middleRows(first, rows), head.k1.topRows(seen), head.q2.middleRows(first, rows),
                            head.k2.topRows(seen), head.v.topRows(seen), head.lambda});
  }
}

/// P1 and P2 of a panel (queries x keys).
template <typename Scalar>
struct PlainMaps {
  PlainMaps(const PlainHead<Scalar>& panel, bool causal)
      : p1(plain_softmax(panel.q1, panel.k1, causal)), p2(plain_softmax(panel.q2, panel.k2, causal)) {}
  Matrix<Scalar> p1, p2;
};

/// out (n_q x d_v) = (P1 − λ·P2) v. The maps of every panel go to `kept`, if there is one.
template <typename Scalar>
void plain_diff_attention_into(PlainResult<Scalar> out, const PlainHead<Scalar>& head, bool causal,
                               std::vector<PlainMaps<Scalar>>* kept = nullptr) {
  if (kept != nullptr) kept->clear();
  for_each_panel(head, causal, [&](Index first, const PlainHead<Scalar>& panel) {
    PlainMaps<Scalar> maps(panel, causal);
    out.middleRows(first, panel.q1.rows()).noalias() = (maps.p1 - panel.lambda * maps.p2) * panel.v;
    if (kept != nullptr) kept->push_back(std::move(maps));
  });
}

template <typename Scalar>
Matrix<Scalar> plain_diff_attention(const Matrix<Scalar>& q1, const Matrix<Scalar>& k1, const Matrix<Scalar>& q2,
                                    const Matrix<Scalar>& k2, const Matrix<Scalar>& v, Scalar lambda, bool causal) {
  if (q1.rows() <= kPanelRows) {  // views of the operands would cost small problems a tenth of their time
    Matrix<Scalar> map = plain_softmax(q1, k1, causal);
    map -= lambda * plain_softmax(q2, k2, causal);
    return map * v;
  }
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

/// Where the gradients of a head, or of a panel of it, go.
template <typename Scalar>
struct PlainHeadGradients {
  PlainResult<Scalar> dq1, dk1, dq2, dk2, dv;
};

/// Overwrites the gradients of a panel's queries and adds to those of its keys and values, from dout (queries x d_v);
/// the maps are used up. Returns the panel's part of the gradient of λ.
template <typename Scalar>
Scalar plain_panel_backward(PlainHeadGradients<Scalar> to, const PlainHead<Scalar>& panel,
                            const typename PlainHead<Scalar>::Operand& dout, PlainMaps<Scalar> maps) {
  const Scalar scale = 1 / std::sqrt(static_cast<Scalar>(panel.q1.cols()));
  const Matrix<Scalar> map = maps.p1 - panel.lambda * maps.p2, dmap = dout * panel.v.transpose();
  to.dv.noalias() += map.transpose() * dout;
  plain_softmax_backward<Scalar>(maps.p1, dmap, scale);
  const Scalar dlambda = -plain_softmax_backward<Scalar>(maps.p2, dmap, -panel.lambda * scale);
  to.dq1.noalias() = maps.p1 * panel.k1;
  to.dq2.noalias() = maps.p2 * panel.k2;
  to.dk1.noalias() += maps.p1.transpose() * panel.q1;
  to.dk2.noalias() += maps.p2.transpose() * panel.q2;
  return dlambda;
}

/// The same for a whole head. Uses up the maps that forward has kept; without any, computes them again.
template <typename Scalar>
Scalar plain_diff_attention_backward_into(PlainHeadGradients<Scalar> to, const PlainHead<Scalar>& head,
                                          const typename PlainHead<Scalar>::Operand& dout, bool causal,
                                          std::vector<PlainMaps<Scalar>>* kept = nullptr) {
  Scalar dlambda = 0;
  for_each_panel(head, causal, [&](Index first, const PlainHead<Scalar>& panel) {
    const Index rows = panel.q1.rows(), seen = panel.k1.rows();
    const auto at = static_cast<std::size_t>(first / kPanelRows);
    dlambda +=
        plain_panel_backward<Scalar>({to.dq1.middleRows(first, rows), to.dk1.topRows(seen),
                                      to.dq2.middleRows(first, rows), to.dk2.topRows(seen), to.dv.topRows(seen)},
                                     panel, dout.middleRows(first, rows),
                                     kept == nullptr ? PlainMaps<Scalar>(panel, causal) : std::move((*kept)[at]));
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
