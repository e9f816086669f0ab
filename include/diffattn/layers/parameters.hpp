#pragma once

// The one list of a layer's parameters and their names.
//
//   visit_parameters(layer, [](std::string_view name, auto& parameter) { … });
//
// Names are the official state-dict keys (q_proj.weight, lambda_q1, subln.weight, …), in the order in which the
// official code declares them. A parameter is a Matrix<Scalar>, or a Vector<Scalar> where PyTorch has rank 1; const if
// the layer is. Saving, loading, counting and optimising all go through this function.

#include <string>
#include <string_view>
#include <type_traits>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

/// Calls visit(name, parameter) for every parameter. A layer lists its own in a static member visit(self, visitor).
template <typename Layer, typename Visitor>
void visit_parameters(Layer& layer, Visitor&& visitor) {
  std::remove_const_t<Layer>::visit(layer, visitor);
}

/// How many numbers a layer learns.
template <typename Layer>
Index parameter_count(const Layer& layer) {
  Index count = 0;
  visit_parameters(layer, [&](std::string_view /*name*/, const auto& parameter) { count += parameter.size(); });
  return count;
}

/// Sets every parameter to 0: an object for gradients to be added to.
template <typename Layer>
void set_zero(Layer& layer) {
  visit_parameters(layer, [](std::string_view /*name*/, auto& parameter) { parameter.setZero(); });
}

/// A layer of the same configuration with every parameter 0.
template <typename Layer>
Layer zeros_like(const Layer& layer) {
  Layer zeros = layer;
  set_zero(zeros);
  return zeros;
}

namespace detail {

/// Visits the parameters of a part of a layer, their names prefixed with "<part>.".
template <typename Part, typename Visitor>
void visit_part(std::string_view part_name, Part& part, Visitor& visitor) {
  visit_parameters(part, [&](std::string_view name, auto& parameter) {
    visitor(std::string_view(std::string(part_name).append(".").append(name)), parameter);
  });
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
