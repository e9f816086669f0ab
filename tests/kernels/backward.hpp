#pragma once

// The backward kernels behind one call operator, and what they must return: reference.hpp in long double, with the mask
// as a dense matrix of biases from its definition (oracle.hpp).

#include <array>

#include "diffattn/kernels/backward.hpp"
#include "kernels/oracle.hpp"
#include "support/tolerances.hpp"

namespace support {

/// dq1, dk1, dq2, dk2, dv and dλ as a column; standard attention leaves those of the second map and λ empty.
template <typename Scalar>
using Gradients = std::array<Matrix<Scalar>, 6>;
inline constexpr std::array<const char*, 6> kGradientNames = {"dq1", "dk1", "dq2", "dk2", "dv", "dlambda"};

template <typename Scalar, typename Lambda>
Gradients<Scalar> as_array(const diffattn::DiffAttentionGradients<Scalar, Lambda>& x) {
  Matrix<Scalar> dlambda;
  if constexpr (std::is_arithmetic_v<Lambda>) {
    dlambda = Matrix<Scalar>::Constant(1, 1, x.dlambda);
  } else {
    dlambda = x.dlambda;
  }
  return {x.dq1, x.dk1, x.dq2, x.dk2, x.dv, dlambda};
}

template <typename Scalar>
Gradients<Scalar> as_array(const diffattn::AttentionGradients<Scalar>& x) {
  return {x.dq, x.dk, {}, {}, x.dv, {}};
}

struct AttentionBackward {
  template <typename Scalar, typename Mask = FullMask, typename E = diffattn::Serial>
  Gradients<Scalar> operator()(const Operands<Scalar>& x, const Matrix<Scalar>& dout, const Mask& mask = {},
                               const AttentionOptions& options = {}, E&& executor = {}) const {
    diffattn::AttentionGradients<Scalar> result;
    diffattn::Workspace workspace;
    diffattn::attention_backward_into(result, x.q1, x.k1, x.v, dout, erase<Scalar>(mask), options, workspace, executor);
    return as_array(result);
  }

  template <typename Scalar, typename Mask>
  static Gradients<Scalar> reference(const Operands<Scalar>& x, const Matrix<Scalar>& dout, const Mask& mask,
                                     const AttentionOptions& options = {}) {
    return as_array(diffattn::reference::attention_backward(x.q1, x.k1, x.v, dout, mask, options));
  }
};

/// λ is the first of the operands', as a scalar.
struct DiffAttentionBackward {
  template <typename Scalar, typename Mask = FullMask, typename E = diffattn::Serial>
  Gradients<Scalar> operator()(const Operands<Scalar>& x, const Matrix<Scalar>& dout, const Mask& mask = {},
                               const AttentionOptions& options = {}, E&& executor = {}) const {
    diffattn::DiffAttentionGradients<Scalar, Scalar> result;
    diffattn::Workspace workspace;
    diffattn::diff_attention_backward_into(result, x.q1, x.k1, x.q2, x.k2, x.v, lambda(x), dout, erase<Scalar>(mask),
                                           options, workspace, executor);
    return as_array(result);
  }

  template <typename Scalar, typename Mask>
  static Gradients<Scalar> reference(const Operands<Scalar>& x, const Matrix<Scalar>& dout, const Mask& mask,
                                     const AttentionOptions& options = {}) {
    return as_array(
        diffattn::reference::diff_attention_backward(x.q1, x.k1, x.q2, x.k2, x.v, lambda(x), dout, mask, options));
  }

  template <typename Scalar>
  static Scalar lambda(const Operands<Scalar>& x) {
    return x.lambda.size() == 0 ? Scalar(0) : x.lambda(0);
  }
};

struct DiffAttentionPerRowBackward {
  template <typename Scalar, typename Mask = FullMask, typename E = diffattn::Serial>
  Gradients<Scalar> operator()(const Operands<Scalar>& x, const Matrix<Scalar>& dout, const Mask& mask = {},
                               const AttentionOptions& options = {}, E&& executor = {}) const {
    diffattn::DiffAttentionGradients<Scalar, Vector<Scalar>> result;
    diffattn::Workspace workspace;
    diffattn::diff_attention_backward_into(result, x.q1, x.k1, x.q2, x.k2, x.v, x.lambda, dout, erase<Scalar>(mask),
                                           options, workspace, executor);
    return as_array(result);
  }

  template <typename Scalar, typename Mask>
  static Gradients<Scalar> reference(const Operands<Scalar>& x, const Matrix<Scalar>& dout, const Mask& mask,
                                     const AttentionOptions& options = {}) {
    return as_array(
        diffattn::reference::diff_attention_backward(x.q1, x.k1, x.q2, x.k2, x.v, x.lambda, dout, mask, options));
  }
};

template <typename To, typename Scalar>
Operands<To> cast(const Operands<Scalar>& x) {
  return {x.q1.template cast<To>(), x.k1.template cast<To>(), x.q2.template cast<To>(),
          x.k2.template cast<To>(), x.v.template cast<To>(),  x.lambda.template cast<To>()};
}

/// The exact gradients under a dense bias, -inf where a key is hidden.
template <typename Kernel, typename Scalar>
Gradients<Exact> expect_gradients(const Kernel&, const Operands<Scalar>& x, const Matrix<Scalar>& dout,
                                  const Matrix<Exact>& bias, const AttentionOptions& options = {}) {
  const Matrix<Exact> exact_dout = dout.template cast<Exact>();
  return Kernel::reference(cast<Exact>(x), exact_dout, with_bias(FullMask{}, MatrixBias(bias)), options);
}

/// |a − b| / |b| of each gradient (Frobenius); absolute where b is 0. dλ of a scalar λ is a sum that cancels: what its
/// error is relative to is `lambda_magnitude`, the sum without signs.
template <typename Scalar>
double gradient_error(const Gradients<Scalar>& a, const Gradients<Exact>& b, Exact lambda_magnitude = 0) {
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i].rows() != b[i].rows() || a[i].cols() != b[i].cols()) return std::numeric_limits<double>::infinity();
    if (a[i].size() == 0) continue;
    const Exact norm = i == 5 && lambda_magnitude != 0 ? lambda_magnitude : b[i].norm();
    const Exact error = (a[i].template cast<Exact>() - b[i]).norm();
    const auto relative = static_cast<double>(norm == 0 ? error : error / norm);
    worst = relative <= worst ? worst : relative;  // keeps a NaN
  }
  return worst;
}

template <typename Scalar>
bool identical(const Gradients<Scalar>& a, const Gradients<Scalar>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!identical(a[i], b[i])) return false;
  }
  return true;
}

}  // namespace support
