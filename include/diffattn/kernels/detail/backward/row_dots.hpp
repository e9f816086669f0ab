#pragma once

// Σ weight · dA of each row, for a chunk of keys.

#include "diffattn/core/simd.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

/// dots[r] = Σ weight · dA over the columns of row r, rows `stride` apart.
template <typename Scalar>
void set_dots(Scalar* dots, const Scalar* weights, const Scalar* da, Index stride, Index rows,
              const KeyRange& columns) {
  for (Index r = 0; r < rows; ++r) {
    auto dot = simd::broadcast(Scalar(0));
    for (Index c = r * stride + columns.begin; c < r * stride + columns.end; c += simd::kLanes<Scalar>) {
      dot = simd::fma(simd::load(weights + c), simd::load(da + c), dot);
    }
    dots[r] = simd::reduce_add(dot);
  }
}

}  // namespace diffattn::inline v0_1::detail
