#pragma once

#include "diffattn/kernels/detail/basement.hpp"
#include "diffattn/layers/nowhere.hpp"
#include "diffattn/layers/other_half.hpp"

namespace diffattn {

inline void shows_detail(const detail::Basement& basement = {}) { use(basement); }

class Private {
  detail::Basement hides_it();
};

}  // namespace diffattn
