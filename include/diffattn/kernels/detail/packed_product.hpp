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
  static constexpr Index kCols = 4 * Tile<Scalar>::kCols;  // of one task
};

/// One block of a product: y, at most ProductBlock rows and columns, from the packed rows and strips that it begins
/// with. `sums` has room for a whole block.
template <typename Scalar>
void multiply_block(const StridedView<Scalar>& y, const Scalar* rows, const Scalar* strips, Index depth,
                    const Scalar* bias, Store store, Scalar* sums) {
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols, kDepth = ProductBlock<Scalar>::kDepth;
  for (Index k = 0; k == 0 || k < depth; k += kDepth) {
    Scalar* at = sums;  // [strip][group][kRows][kCols]
    for (Index c = 0; c < y.cols; c += kCols) {
      for (Index r = 0; r < y.rows; r += kRows, at += kRows * kCols) {
        const LeftOperand<Scalar> a{rows + r * depth + k * kRows, 1, kRows};
        add_product(at, kCols, k != 0, a, strips + c * depth + k * kCols, std::min(kDepth, depth - k), y.rows - r,
                    y.cols - c);
      }
    }
  }
  const Scalar* at = sums;
  for (Index c = 0; c < y.cols; c += kCols) {
    const Index present = std::min(kCols, y.cols - c);
    for (Index r = 0; r < y.rows; ++r, at += kCols) {
      Scalar* const to = &y(r, c);
      if (store == Store::add) {
        for (Index i = 0; i < present; ++i) to[i * y.col_stride] += at[i];
      } else if (bias == nullptr) {
        for (Index i = 0; i < present; ++i) to[i * y.col_stride] = at[i];
      } else {
        for (Index i = 0; i < present; ++i) to[i * y.col_stride] = at[i] + bias[c + i];
      }
    }
    at += (round_up(y.rows, kRows) - y.rows) * kCols;
  }
}

/// y = rows · strips, or y += rows · strips.
template <typename Scalar, Executor E>
void multiply_packed(const StridedView<Scalar>& y, const Scalar* rows, const Scalar* strips, Index depth, Store store,
                     Workspace& workspace, E& executor) {
  using Block = ProductBlock<Scalar>;
  const auto frame = workspace.frame();
  auto* const sums = workspace.take<Scalar>(executor.concurrency() * Block::kRows * Block::kCols);
  const Index row_blocks = divide_up(y.rows, Block::kRows);
  // Row blocks follow each other, so that the strips of a column block are read from memory once.
  executor.run(row_blocks * divide_up(y.cols, Block::kCols), [&](Index task, Index worker) {
    const Index row = task % row_blocks * Block::kRows, col = task / row_blocks * Block::kCols;
    multiply_block(y.block(row, col, std::min(Block::kRows, y.rows - row), std::min(Block::kCols, y.cols - col)),
                   rows + row * depth, strips + col * depth, depth, static_cast<const Scalar*>(nullptr), store,
                   sums + worker * Block::kRows * Block::kCols);
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
  multiply_packed(y, rows, strips, depth, store, workspace, executor);
}

}  // namespace diffattn::inline v0_1::detail
