#pragma once

// λ as the kernels read it: one number for all, or one for every query row and head, in place.

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1::detail {

/// λ for every query row and head: one value for all, or a matrix of them read in place.
template <typename Scalar>
struct LambdaView {
  Scalar constant = 0;
  StridedView<const Scalar> values{};  // rows x heads; no data when λ is constant

  Scalar operator()(Index row, Index head) const { return values.data == nullptr ? constant : values(row, head); }
};

template <typename Lambda>
struct ReadableLambdaOf {
  using Type = Readable<Lambda>;
};
template <typename Lambda>
requires is_scalar_lambda<Lambda>
struct ReadableLambdaOf<Lambda> {
  using Type = const Lambda;
};
/// Readable, for a λ that may be a plain number.
template <typename Lambda>
using ReadableLambda = typename ReadableLambdaOf<Lambda>::Type;

template <typename Scalar, typename Lambda>
LambdaView<Scalar> lambda_view(const Lambda& lambda) {
  if constexpr (is_scalar_lambda<Lambda>) {
    return {static_cast<Scalar>(lambda), {}};
  } else {
    return {Scalar(0), view_of(lambda)};
  }
}

}  // namespace diffattn::inline v0_1::detail
