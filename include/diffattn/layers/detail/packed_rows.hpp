#pragma once

// Matrices of any strides for code that works on rows which lie one after another in memory.

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/workspace.hpp"

namespace diffattn::inline v0_1::detail {

template <typename T>
bool has_packed_rows(const StridedView<T>& view) {
  return (view.col_stride == 1 || view.cols <= 1) && (view.row_stride == view.cols || view.rows <= 1);
}

/// The rows of a matrix, one after another: where they are, or a copy in the workspace, as long as its frame is open.
template <typename Scalar>
const Scalar* packed_rows(const StridedView<const Scalar>& from, Workspace& workspace) {
  if (has_packed_rows(from)) return from.data;
  auto* const copy = workspace.take<Scalar>(from.rows * from.cols);
  for (Index i = 0; i < from.rows; ++i) {
    for (Index j = 0; j < from.cols; ++j) copy[i * from.cols + j] = from(i, j);
  }
  return copy;
}

/// Calls compute(rows), which writes the rows of `to` one after another: where they belong, or beside them first.
template <typename Scalar, typename F>
void write_packed_rows(const StridedView<Scalar>& to, Workspace& workspace, F&& compute) {
  if (has_packed_rows(to)) return compute(to.data);
  const auto frame = workspace.frame();
  auto* const rows = workspace.take<Scalar>(to.rows * to.cols);
  compute(rows);
  for (Index i = 0; i < to.rows; ++i) {
    for (Index j = 0; j < to.cols; ++j) to(i, j) = rows[i * to.cols + j];
  }
}

}  // namespace diffattn::inline v0_1::detail
