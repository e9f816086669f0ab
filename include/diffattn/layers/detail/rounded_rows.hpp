#pragma once

// Queries, keys and values of a layer, rounded to bfloat16: what attention multiplies where the layer's arithmetic is
// bfloat16 (arithmetic.hpp).

#include <Eigen/Core>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/row_blocks.hpp"
#include "diffattn/core/simd_pairs.hpp"
#include "diffattn/core/workspace.hpp"

namespace diffattn::inline v0_1::detail {

/// A rounded copy of rows that lie one after another, in memory of the workspace's open frame.
template <Executor E>
MatrixMap<Eigen::bfloat16> rounded_rows(const MatrixMap<float>& rows, Workspace& workspace, E& executor) {
  constexpr Index kLanes = simd::kLanes<float>;
  auto* const to = workspace.take<Eigen::bfloat16>(rows.size());
  for_each_row_block(rows.rows(), executor, [&](Index row, Index count) {
    const Index end = (row + count) * rows.cols();
    Index i = row * rows.cols();
    for (; i + kLanes <= end; i += kLanes) simd::store_as(to + i, simd::loadu(rows.data() + i));
    for (; i < end; ++i) to[i] = static_cast<Eigen::bfloat16>(rows.data()[i]);
  });
  return {to, rows.rows(), rows.cols()};
}

}  // namespace diffattn::inline v0_1::detail
