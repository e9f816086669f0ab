#pragma once

// The norm of a whole gradient, and clipping by it (Pascanu et al., arXiv 1211.5063), as
// torch.nn.utils.clip_grad_norm_ does it: if the norm of all parameters together exceeds max_norm, all of them are
// multiplied by max_norm / (norm + 1e-6).
//
// A gradient is any object that visit_parameters visits. Squares are added up in double, in a fixed order.

#include <cmath>
#include <functional>
#include <string_view>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/layers/parameters.hpp"

namespace diffattn::inline v0_1 {

/// The Euclidean norm of all parameters of `gradient` as one vector. Infinite or NaN if an entry is.
template <typename Model>
double gradient_norm(const Model& gradient) {
  double squares = 0;
  visit_parameters(gradient, [&](std::string_view /*name*/, const auto& parameter) {
    // Sixteen sums side by side, one a lane: their order follows from the size alone.
    constexpr Index kLanes = 16;
    double sums[kLanes] = {};
    const auto* const values = parameter.data();
    const Index whole = parameter.size() / kLanes * kLanes;
    for (Index i = 0; i < whole; i += kLanes) {
      for (Index lane = 0; lane < kLanes; ++lane) {
        const auto value = static_cast<double>(values[i + lane]);
        sums[lane] += value * value;
      }
    }
    for (Index i = whole; i < parameter.size(); ++i) {
      sums[i - whole] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }
    for (const double sum : sums) squares += sum;
  });
  return std::sqrt(squares);
}

/// Scales `gradient` down to `max_norm` if it is longer, and returns the norm that it had. A gradient whose norm is not
/// finite stays as it is: check what is returned. Throws std::invalid_argument unless max_norm is positive, and
/// std::bad_alloc; the gradient is then as before.
template <typename Model>
double clip_gradient_norm(Model& gradient, double max_norm) {
  if (!(max_norm > 0)) detail::throw_invalid({"clip_gradient_norm: max_norm must be positive"});
  const double norm = gradient_norm(gradient);
  const double factor = max_norm / (norm + 1e-6);
  if (std::isfinite(norm) && factor < 1) {
    // Visiting makes names, for which there may be no memory: it is over before the first parameter changes.
    std::vector<std::function<void()>> scalings;
    visit_parameters(gradient, [&](std::string_view /*name*/, auto& parameter) {
      scalings.push_back([&parameter, factor] {
        parameter *= static_cast<typename std::remove_reference_t<decltype(parameter)>::Scalar>(factor);
      });
    });
    for (const auto& scale : scalings) scale();
  }
  return norm;
}

}  // namespace diffattn::inline v0_1
