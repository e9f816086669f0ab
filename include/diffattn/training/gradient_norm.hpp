#pragma once

// The norm of a whole gradient, and clipping by it (Pascanu et al., arXiv 1211.5063), as
// torch.nn.utils.clip_grad_norm_ does it: if the norm of all parameters together exceeds max_norm, all of them are
// multiplied by max_norm / (norm + 1e-6).
//
// A gradient is any object that visit_parameters visits. Squares are added up in double, in an order that follows from
// the sizes of the parameters alone: the same bits for any executor.

#include <cmath>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/layers/parameters.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

template <typename Scalar>
double sum_of_squares(const Scalar* values, Index count) {
  constexpr Index kLanes = 16;  // sums side by side
  double sums[kLanes] = {};
  const Index whole = count / kLanes * kLanes;
  for (Index i = 0; i < whole; i += kLanes) {
    for (Index lane = 0; lane < kLanes; ++lane) {
      const auto value = static_cast<double>(values[i + lane]);
      sums[lane] += value * value;
    }
  }
  for (Index i = whole; i < count; ++i) {
    sums[i - whole] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  }
  double all = 0;
  for (const double sum : sums) all += sum;
  return all;
}

}  // namespace detail

/// The Euclidean norm of all parameters of `gradient` as one vector, with work spread over `executor`. Infinite or NaN
/// if an entry is.
template <typename Model, Executor E = Serial>
double gradient_norm(const Model& gradient, E&& executor = {}) {
  std::vector<double> squares;
  detail::for_each_piece(
      gradient, executor, [&](std::size_t pieces) { squares.resize(pieces); },
      [&](Index piece, const auto* values, Index count) {
        squares[static_cast<std::size_t>(piece)] = detail::sum_of_squares(values, count);
      });
  double all = 0;
  for (const double square : squares) all += square;
  return std::sqrt(all);
}

/// Scales `gradient` down to `max_norm` if it is longer, and returns the norm that it had. A gradient whose norm is not
/// finite stays as it is: check what is returned. Throws std::invalid_argument unless max_norm is positive, and
/// std::bad_alloc; the gradient is then as before.
template <typename Model, Executor E = Serial>
double clip_gradient_norm(Model& gradient, double max_norm, E&& executor = {}) {
  if (!(max_norm > 0)) detail::throw_invalid({"clip_gradient_norm: max_norm must be positive"});
  const double norm = gradient_norm(gradient, executor);
  const double factor = max_norm / (norm + 1e-6);
  if (std::isfinite(norm) && factor < 1) {
    detail::for_each_piece(
        gradient, executor, [](std::size_t /*pieces*/) {},
        [&](Index /*piece*/, auto* values, Index count) {
          const auto scale = static_cast<std::remove_reference_t<decltype(*values)>>(factor);
          for (Index i = 0; i < count; ++i) values[i] *= scale;
        });
  }
  return norm;
}

}  // namespace diffattn::inline v0_1
