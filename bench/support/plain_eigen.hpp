#pragma once

// Attention as a good Eigen user writes it: whole score matrices, Eigen's own products and exponential.

#include <cmath>
#include <limits>

#include "diffattn/core/matrix.hpp"

namespace bench {

using diffattn::Index;
using diffattn::Matrix;

template <typename Scalar>
Matrix<Scalar> plain_softmax(const Matrix<Scalar>& q, const Matrix<Scalar>& k, bool causal) {
  Matrix<Scalar> p = q * k.transpose();
  p *= 1 / std::sqrt(static_cast<Scalar>(q.cols()));
  for (Index i = 0; i < p.rows(); ++i) {
    const Index seen = causal ? i + 1 + k.rows() - q.rows() : k.rows();
    auto row = p.row(i).head(seen).array();
    row = (row - row.maxCoeff()).exp();
    row /= row.sum();
    p.row(i).tail(k.rows() - seen).setZero();
  }
  return p;
}

template <typename Scalar>
Matrix<Scalar> plain_diff_attention(const Matrix<Scalar>& q1, const Matrix<Scalar>& k1, const Matrix<Scalar>& q2,
                                    const Matrix<Scalar>& k2, const Matrix<Scalar>& v, Scalar lambda, bool causal) {
  Matrix<Scalar> map = plain_softmax(q1, k1, causal);
  map -= lambda * plain_softmax(q2, k2, causal);
  return map * v;
}

template <typename Scalar>
struct PlainGradients {
  Matrix<Scalar> dq1, dk1, dq2, dk2, dv;
  Scalar dlambda;
};

template <typename Scalar>
PlainGradients<Scalar> plain_diff_attention_backward(const Matrix<Scalar>& q1, const Matrix<Scalar>& k1,
                                                     const Matrix<Scalar>& q2, const Matrix<Scalar>& k2,
                                                     const Matrix<Scalar>& v, Scalar lambda, const Matrix<Scalar>& dout,
                                                     bool causal) {
  const Scalar scale = 1 / std::sqrt(static_cast<Scalar>(q1.cols()));
  const Matrix<Scalar> p1 = plain_softmax(q1, k1, causal), p2 = plain_softmax(q2, k2, causal);
  const Matrix<Scalar> da = dout * v.transpose(), a = p1 - lambda * p2;
  const diffattn::Vector<Scalar> d1 = p1.cwiseProduct(da).rowwise().sum(), d2 = p2.cwiseProduct(da).rowwise().sum();
  Matrix<Scalar> ds1 = p1.array() * (da.colwise() - d1).array();
  Matrix<Scalar> ds2 = p2.array() * (da.colwise() - d2).array() * -lambda;
  ds1 *= scale;
  ds2 *= scale;
  return {ds1 * k1, ds1.transpose() * q1, ds2 * k2, ds2.transpose() * q2, a.transpose() * dout, -d2.sum()};
}

}  // namespace bench
