#pragma once

// What the backward functions return: one gradient for every operand, of its shape.

#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar>
struct AttentionGradients {
  Matrix<Scalar> dq;  ///< n_q x d
  Matrix<Scalar> dk;  ///< n_k x d
  Matrix<Scalar> dv;  ///< n_k x dv
};

/// Lambda: the type of λ as it was given, a number or a column with one for every query.
template <typename Scalar, typename Lambda>
struct DiffAttentionGradients {
  using LambdaGradient = std::conditional_t<detail::is_scalar_lambda<Lambda>, Scalar, Vector<Scalar>>;

  Matrix<Scalar> dq1;           ///< n_q x d
  Matrix<Scalar> dk1;           ///< n_k x d
  Matrix<Scalar> dq2;           ///< n_q x d
  Matrix<Scalar> dk2;           ///< n_k x d
  Matrix<Scalar> dv;            ///< n_k x dv
  LambdaGradient dlambda = {};  ///< a number, or n_q x 1
};

}  // namespace diffattn::inline v0_1
