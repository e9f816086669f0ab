#pragma once

// Work on the rows of a matrix, spread over threads: each task takes a block of rows.

#include <algorithm>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"

namespace diffattn::inline v0_1::detail {

/// Calls f(first, count) for blocks of up to 64 rows that together are [0, rows), each in a task of the executor.
template <Executor E, typename F>
void for_each_row_block(Index rows, E& executor, F&& f) {
  constexpr Index kRows = 64;
  executor.run((rows + kRows - 1) / kRows,
               [&](Index task, Index /*worker*/) { f(task * kRows, std::min(kRows, rows - task * kRows)); });
}

/// to += from, for matrices of the same size whose rows follow each other without gaps.
template <typename To, typename From, Executor E>
void add_rows(Eigen::MatrixBase<To>& to, const Eigen::MatrixBase<From>& from, E& executor) {
  auto* const sums = to.derived().data();
  const auto* const values = from.derived().data();
  for_each_row_block(to.rows(), executor, [&](Index row, Index count) {
    for (Index i = row * to.cols(); i < (row + count) * to.cols(); ++i) sums[i] += values[i];
  });
}

}  // namespace diffattn::inline v0_1::detail
