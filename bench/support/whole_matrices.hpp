#pragma once

// Differential attention and its gradients as one writes them first with Eigen: the formulas, on whole score matrices.
// plain_eigen.hpp, which goes by panels, is faster and what kernels are compared with; this is what code that follows
// the paper pays, and what figures "against plain Eigen" usually mean.

#include <cmath>

#include "support/plain_eigen.hpp"

namespace bench {

template <typename Scalar>
Matrix<Scalar> softmax_of_rows(const Matrix<Scalar>& scores) {
  const Vector<Scalar> max = scores.rowwise().maxCoeff();
  Matrix<Scalar> p = (scores.colwise() - max).array().exp();
  const Vector<Scalar> sum = p.rowwise().sum();
  p.array().colwise() /= sum.array();
  return p;
}

/// (P1 − λ·P2) v, without a mask.
template <typename Scalar>
Matrix<Scalar> whole_diff_attention(const Matrix<Scalar>& q1, const Matrix<Scalar>& k1, const Matrix<Scalar>& q2,
                                    const Matrix<Scalar>& k2, const Matrix<Scalar>& v, Scalar lambda) {
  const Scalar scale = 1 / std::sqrt(static_cast<Scalar>(q1.cols()));
  const Matrix<Scalar> p1 = softmax_of_rows<Scalar>(scale * q1 * k1.transpose());
  const Matrix<Scalar> p2 = softmax_of_rows<Scalar>(scale * q2 * k2.transpose());
  return (p1 - lambda * p2) * v;
}

/// The gradients from dout, that of the output.
template <typename Scalar>
PlainGradients<Scalar> whole_diff_attention_backward(const Matrix<Scalar>& q1, const Matrix<Scalar>& k1,
                                                     const Matrix<Scalar>& q2, const Matrix<Scalar>& k2,
                                                     const Matrix<Scalar>& v, Scalar lambda,
                                                     const Matrix<Scalar>& dout) {
  const Scalar scale = 1 / std::sqrt(static_cast<Scalar>(q1.cols()));
  const Matrix<Scalar> p1 = softmax_of_rows<Scalar>(scale * q1 * k1.transpose());
  const Matrix<Scalar> p2 = softmax_of_rows<Scalar>(scale * q2 * k2.transpose());
  const Matrix<Scalar> da = dout * v.transpose();
  const Vector<Scalar> d1 = p1.cwiseProduct(da).rowwise().sum(), d2 = p2.cwiseProduct(da).rowwise().sum();
  const Matrix<Scalar> ds1 = scale * p1.cwiseProduct(da.colwise() - d1);
  const Matrix<Scalar> ds2 = -lambda * scale * p2.cwiseProduct(da.colwise() - d2);
  return {ds1 * k1, ds1.transpose() * q1, ds2 * k2, ds2.transpose() * q2, (p1 - lambda * p2).transpose() * dout,
          -d2.sum()};
}

}  // namespace bench
