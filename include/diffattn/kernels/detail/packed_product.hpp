#pragma once

// Products of packed matrices, which is what a linear layer and its gradients are made of.
//
// Depth is taken kDepth steps at a time, so that a strip and a group stay in the nearest caches; a task is a block of
// the result. Blocks do not depend on the number of threads, so neither does the result.

#include <algorithm>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/packed.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar>
struct ProductBlock {
  static constexpr Index kDepth = 256;                     // of one pass over a tile
  static constexpr Index kRows = 8 * Tile<Scalar>::kRows;  // that share a strip
  static constexpr Index kCols = 8 * Tile<Scalar>::kCols;  // of one task
};

/// y = rows · strips + bias (one value a column, or null), or y += rows · strips.
template <typename Scalar, Executor E>
void multiply_packed(const StridedView<Scalar>& y, const Scalar* rows, const Scalar* strips, Index depth,
                     const Scalar* bias, Store store, Workspace& workspace, E& executor) {
  using Block = ProductBlock<Scalar>;
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  const auto frame = workspace.frame();
  auto* const sums = workspace.take<Scalar>(executor.concurrency() * Block::kRows * Block::kCols);
  const Index col_blocks = divide_up(y.cols, Block::kCols);
  executor.run(divide_up(y.rows, Block::kRows) * col_blocks, [&](Index task, Index worker) {
    const Index row = task / col_blocks * Block::kRows, col = task % col_blocks * Block::kCols;
    const Index row_end = std::min(row + Block::kRows, y.rows), col_end = std::min(col + Block::kCols, y.cols);
    Scalar* const block = sums + worker * Block::kRows * Block::kCols;  // [strip][group][kRows][kCols]
    for (Index k = 0; k == 0 || k < depth; k += Block::kDepth) {
      Scalar* at = block;
      for (Index c = col; c < col_end; c += kCols) {
        for (Index r = row; r < row_end; r += kRows, at += kRows * kCols) {
          const LeftOperand<Scalar> a{rows + r * depth + k * kRows, 1, kRows};
          add_product(at, kCols, k != 0, a, strips + c * depth + k * kCols, std::min(Block::kDepth, depth - k),
                      row_end - r, col_end - c);
        }
      }
    }
    const Scalar* at = block;
    for (Index c = col; c < col_end; c += kCols) {
      const Index present = std::min(kCols, col_end - c);
      for (Index r = row; r < row_end; ++r, at += kCols) {
        Scalar* const to = &y(r, c);
        if (store == Store::add) {
          for (Index i = 0; i < present; ++i) to[i * y.col_stride] += at[i];
        } else if (bias == nullptr) {
          for (Index i = 0; i < present; ++i) to[i * y.col_stride] = at[i];
        } else {
          for (Index i = 0; i < present; ++i) to[i * y.col_stride] = at[i] + bias[c + i];
        }
      }
      at += (round_up(row_end - row, kRows) - (row_end - row)) * kCols;
    }
  });
}

/// y (m x n) = a (m x k) · b (k x n), or y += a · b. Any strides; rows of b ought to be contiguous, and of a either its
/// rows or its columns.
template <typename Scalar, Executor E>
void matmul(const StridedView<Scalar>& y, const StridedView<const Scalar>& a, const StridedView<const Scalar>& b,
            Store store, Workspace& workspace, E& executor) {
  using Block = ProductBlock<Scalar>;
  const Index depth = a.cols;
  if (y.rows == 0 || y.cols == 0) return;
  const auto frame = workspace.frame();
  auto* const rows = workspace.take<Scalar>(packed_rows_size<Scalar>(y.rows, depth));
  auto* const strips = workspace.take<Scalar>(packed_strips_size<Scalar>(y.cols, depth));
  const Index row_blocks = divide_up(y.rows, Block::kRows), col_blocks = divide_up(y.cols, Block::kCols);
  executor.run(row_blocks + col_blocks, [&](Index task, Index /*worker*/) {
    if (task < row_blocks) {
      const Index row = task * Block::kRows;
      pack_rows(rows + row * depth, a.middle_rows(row, std::min(Block::kRows, y.rows - row)), Scalar(1));
    } else {
      const Index col = (task - row_blocks) * Block::kCols;
      pack_columns(strips + col * depth, depth, b.middle_cols(col, std::min(Block::kCols, y.cols - col)));
    }
  });
  multiply_packed(y, rows, strips, depth, static_cast<const Scalar*>(nullptr), store, workspace, executor);
}

}  // namespace diffattn::inline v0_1::detail
