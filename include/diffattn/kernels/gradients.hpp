#pragma once

// Where the backward functions put their gradients: one for every operand, of its shape. Matrices of their own, which
// are resized, for one head and many; or, for many, views of yours. Under a mask with a learned bias (learned_bias.hpp)
// the functions return the structs with kBias, which have one more: dbias, of the shape of the bias's table. Given one
// without it, they leave out that gradient, and what it costs.

#include <optional>
#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

/// Of standard attention, H heads and G of keys and values; H = G = 1 for one head.
template <typename Scalar, bool kBias = false>
struct AttentionGradients {
  Matrix<Scalar> dq;  ///< n_q x H·d
  Matrix<Scalar> dk;  ///< n_k x G·d
  Matrix<Scalar> dv;  ///< n_k x G·dv
};

/// The same with that of a learned bias.
template <typename Scalar>
struct AttentionGradients<Scalar, true> {
  Matrix<Scalar> dq;     ///< n_q x H·d
  Matrix<Scalar> dk;     ///< n_k x G·d
  Matrix<Scalar> dv;     ///< n_k x G·dv
  Matrix<Scalar> dbias;  ///< H x columns of the table
};

/// Of one differential head. Lambda: the type of λ as it was given, a number or a column with one for every query.
template <typename Scalar, typename Lambda, bool kBias = false>
struct DiffAttentionGradients {
  using LambdaGradient = std::conditional_t<detail::is_scalar_lambda<Lambda>, Scalar, Vector<Scalar>>;

  Matrix<Scalar> dq1;           ///< n_q x d
  Matrix<Scalar> dk1;           ///< n_k x d
  Matrix<Scalar> dq2;           ///< n_q x d
  Matrix<Scalar> dk2;           ///< n_k x d
  Matrix<Scalar> dv;            ///< n_k x dv
  LambdaGradient dlambda = {};  ///< a number, or n_q x 1
};

/// The same with that of a learned bias.
template <typename Scalar, typename Lambda>
struct DiffAttentionGradients<Scalar, Lambda, true> {
  using LambdaGradient = std::conditional_t<detail::is_scalar_lambda<Lambda>, Scalar, Vector<Scalar>>;

  Matrix<Scalar> dq1;           ///< n_q x d
  Matrix<Scalar> dk1;           ///< n_k x d
  Matrix<Scalar> dq2;           ///< n_q x d
  Matrix<Scalar> dk2;           ///< n_k x d
  Matrix<Scalar> dv;            ///< n_k x dv
  LambdaGradient dlambda = {};  ///< a number, or n_q x 1
  Matrix<Scalar> dbias;         ///< 1 x columns of the table
};

/// Of H differential heads and G of keys and values, maps side by side as in the operands.
template <typename Scalar, typename Lambda, bool kBias = false>
struct MultiheadDiffAttentionGradients {
  using LambdaGradient = std::conditional_t<detail::is_scalar_lambda<Lambda>, Scalar, Matrix<Scalar>>;

  Matrix<Scalar> dq;            ///< n_q x 2H·d
  Matrix<Scalar> dk;            ///< n_k x 2G·d, or G·d where both maps share their keys
  Matrix<Scalar> dv;            ///< n_k x G·dv
  LambdaGradient dlambda = {};  ///< a number, summed over queries and heads, or n_q x H
};

/// The same with that of a learned bias.
template <typename Scalar, typename Lambda>
struct MultiheadDiffAttentionGradients<Scalar, Lambda, true> {
  using LambdaGradient = std::conditional_t<detail::is_scalar_lambda<Lambda>, Scalar, Matrix<Scalar>>;

  Matrix<Scalar> dq;            ///< n_q x 2H·d
  Matrix<Scalar> dk;            ///< n_k x 2G·d, or G·d where both maps share their keys
  Matrix<Scalar> dv;            ///< n_k x G·dv
  LambdaGradient dlambda = {};  ///< a number, summed over queries and heads, or n_q x H
  Matrix<Scalar> dbias;         ///< H x columns of the table
};

/// The gradients of standard attention in matrices of yours, of any strides: {dq, dk, dv}, or {dq, dk, dv, dbias} for
/// that of a learned bias too.
template <typename Scalar>
struct AttentionGradientViews {
  template <typename DQ, typename DK, typename DV>
  AttentionGradientViews(const Eigen::DenseBase<DQ>& dq_, const Eigen::DenseBase<DK>& dk_,
                         const Eigen::DenseBase<DV>& dv_)
      : dq(detail::writable_view_of(dq_)), dk(detail::writable_view_of(dk_)), dv(detail::writable_view_of(dv_)) {}
  template <typename DQ, typename DK, typename DV, typename DBias>
  AttentionGradientViews(const Eigen::DenseBase<DQ>& dq_, const Eigen::DenseBase<DK>& dk_,
                         const Eigen::DenseBase<DV>& dv_, const Eigen::DenseBase<DBias>& dbias_)
      : AttentionGradientViews(dq_, dk_, dv_) {
    dbias = detail::writable_view_of(dbias_);
  }

  StridedView<Scalar> dq;
  StridedView<Scalar> dk;
  StridedView<Scalar> dv;
  std::optional<StridedView<Scalar>> dbias;
};

/// The same of differential attention: {dq, dk, dv, dlambda}, with a number for dlambda when λ is one; or
/// {dq, dk, dv, dlambda, dbias}.
template <typename Scalar>
struct DiffAttentionGradientViews {
  template <typename DQ, typename DK, typename DV>
  DiffAttentionGradientViews(const Eigen::DenseBase<DQ>& dq_, const Eigen::DenseBase<DK>& dk_,
                             const Eigen::DenseBase<DV>& dv_, Scalar& dlambda_)
      : dq(detail::writable_view_of(dq_)),
        dk(detail::writable_view_of(dk_)),
        dv(detail::writable_view_of(dv_)),
        dlambda{&dlambda_, 1, 1, 1, 1} {}
  template <typename DQ, typename DK, typename DV, typename DLambda>
  DiffAttentionGradientViews(const Eigen::DenseBase<DQ>& dq_, const Eigen::DenseBase<DK>& dk_,
                             const Eigen::DenseBase<DV>& dv_, const Eigen::DenseBase<DLambda>& dlambda_)
      : dq(detail::writable_view_of(dq_)),
        dk(detail::writable_view_of(dk_)),
        dv(detail::writable_view_of(dv_)),
        dlambda(detail::writable_view_of(dlambda_)) {}
  template <typename DQ, typename DK, typename DV, typename DBias>
  DiffAttentionGradientViews(const Eigen::DenseBase<DQ>& dq_, const Eigen::DenseBase<DK>& dk_,
                             const Eigen::DenseBase<DV>& dv_, Scalar& dlambda_, const Eigen::DenseBase<DBias>& dbias_)
      : DiffAttentionGradientViews(dq_, dk_, dv_, dlambda_) {
    dbias = detail::writable_view_of(dbias_);
  }
  template <typename DQ, typename DK, typename DV, typename DLambda, typename DBias>
  DiffAttentionGradientViews(const Eigen::DenseBase<DQ>& dq_, const Eigen::DenseBase<DK>& dk_,
                             const Eigen::DenseBase<DV>& dv_, const Eigen::DenseBase<DLambda>& dlambda_,
                             const Eigen::DenseBase<DBias>& dbias_)
      : DiffAttentionGradientViews(dq_, dk_, dv_, dlambda_) {
    dbias = detail::writable_view_of(dbias_);
  }

  StridedView<Scalar> dq;
  StridedView<Scalar> dk;
  StridedView<Scalar> dv;
  StridedView<Scalar> dlambda;
  std::optional<StridedView<Scalar>> dbias;
};

}  // namespace diffattn::inline v0_1
