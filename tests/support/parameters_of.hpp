#pragma once

#include <string_view>
#include <vector>

#include "diffattn/layers/parameters.hpp"

namespace support {

/// All parameters of a model, a gradient or an optimizer, one after the other, to be compared as a whole.
template <typename Model>
std::vector<double> parameters_of(const Model& model) {
  std::vector<double> values;
  diffattn::visit_parameters(model, [&](std::string_view /*name*/, const auto& p) {
    for (diffattn::Index i = 0; i < p.size(); ++i) values.push_back(static_cast<double>(p.data()[i]));
  });
  return values;
}

}  // namespace support
