#pragma once

// y = a b, y = a b + bias or y += a b: the products that linear layers and their gradients are made of.
//
// a is packed whole, a block of depth at a time: [block][group][steps][kRows]. A task is a block of y, whose sums
// stay in the second-level cache; so does what it reads of a, once for every strip of b. A strip is packed just before
// it is used and stays in the first-level cache, so that b is read once for each block of rows, whatever its type and
// strides. What comes next, of a and of b, is asked for from memory while the present strip is multiplied.
//
// Each sum is made of chains of kChain multiply-adds along depth, added up in order, and every block of depth is a
// multiple of kChain: the result depends neither on the blocks nor on the number of threads.

#include <algorithm>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/packed.hpp"
#include "diffattn/kernels/detail/prefetched_rows.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar>
struct ProductBlock {
  static constexpr Index kDepth = 192;  // a strip, a group and a tile fit 48 KB, 32 KB without AVX-512
  static constexpr Index kMostRows = 1024;
  static constexpr Index kMostCols = 1024 / static_cast<Index>(sizeof(Scalar));
  /// With fewer groups it is b that takes the time: it is read in longer pieces and not asked for ahead.
  static constexpr Index kFewGroups = 4;
  static constexpr Index kDepthOfFew = 2048;
  static_assert(kDepth % kChain == 0 && kDepthOfFew % kChain == 0);
};

/// b, which has at most as many columns as a tile, → one strip.
template <typename Scalar, typename T>
void pack_strip(Scalar* to, const StridedView<const T>& b) {
  if (b.col_stride == 1) {
    pack_columns(to, b.rows, b);
  } else {
    pack_transposed_strip(to, b.transposed(), 0, b.cols);
  }
}

/// y = tile, tile + bias (as many values as y has columns) or y + tile.
template <typename Scalar>
void store_tile(const StridedView<Scalar>& y, const Scalar* tile, const Scalar* bias, Store store) {
  constexpr Index kCols = Tile<Scalar>::kCols, kLanes = Tile<Scalar>::kLanes;
  for (Index r = 0; r < y.rows; ++r, tile += kCols) {
    Scalar* const to = &y(r, 0);
    Index c = 0;
    if (y.col_stride == 1) {
      for (; c + kLanes <= y.cols; c += kLanes) {
        auto sums = simd::load(tile + c);
        if (bias != nullptr) sums = simd::add(sums, simd::loadu(bias + c));
        if (store == Store::add) sums = simd::add(simd::loadu(to + c), sums);
        simd::storeu(to + c, sums);
      }
    }
    for (; c < y.cols; ++c) {
      const Scalar sum = bias == nullptr ? tile[c] : tile[c] + bias[c];
      Scalar& element = to[c * y.col_stride];
      element = store == Store::add ? element + sum : sum;
    }
  }
}

/// y (m x n) from a (m x depth), b (depth x n) and bias (n values, or null). Any strides: rows or columns of a and b
/// ought to be contiguous, and rows of y. y must not overlap a or b.
template <typename Scalar, typename T, Executor E>
void multiply(const StridedView<Scalar>& y, const StridedView<const Scalar>& a, const StridedView<const T>& b,
              const Scalar* bias, Store store, Workspace& workspace, E& executor) {
  using Block = ProductBlock<Scalar>;
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  if (y.rows == 0 || y.cols == 0) return;

  const Index depth = a.cols, padded_rows = round_up(y.rows, kRows);
  const bool ahead = padded_rows >= Block::kFewGroups * kRows;
  const Index block_depth = ahead ? Block::kDepth : std::clamp(depth, Index{1}, Block::kDepthOfFew);
  const Index row_blocks = divide_up(y.rows, Block::kMostRows);
  const Index block_rows = round_up(divide_up(y.rows, row_blocks), kRows);
  // Every thread ought to get some of few columns.
  const Index fair_cols = divide_up(divide_up(y.cols, kCols) * row_blocks, executor.concurrency()) * kCols;
  const Index block_cols = std::min(std::max(Block::kMostCols, kCols), fair_cols);

  const auto frame = workspace.frame();
  auto* const packed_rows = workspace.take<Scalar>(padded_rows * depth);
  auto* const strips = workspace.take<Scalar>(executor.concurrency() * block_depth * kCols);
  auto* const all_sums = workspace.take<Scalar>(executor.concurrency() * block_rows * block_cols);

  executor.run(divide_up(depth, block_depth), [&](Index task, Index /*worker*/) {
    const Index k = task * block_depth;
    pack_rows(packed_rows + padded_rows * k, a.middle_cols(k, std::min(block_depth, depth - k)), Scalar(1));
  });

  executor.run(row_blocks * divide_up(y.cols, block_cols), [&](Index task, Index worker) {
    const Index first_row = task % row_blocks * block_rows, first_col = task / row_blocks * block_cols;
    const Index rows = std::min(block_rows, y.rows - first_row), cols = std::min(block_cols, y.cols - first_col);
    const Index groups = divide_up(rows, kRows), num_strips = divide_up(cols, kCols);
    Scalar* const strip = strips + worker * block_depth * kCols;
    Scalar* const sums = all_sums + worker * block_rows * block_cols;
    const auto packed_at = [&](Index k) {
      return packed_rows + padded_rows * k + first_row * std::min(block_depth, depth - k);
    };
    const auto strip_at = [&](Index k, Index s) {
      return b.block(k, first_col + s * kCols, std::min(block_depth, depth - k), std::min(kCols, cols - s * kCols));
    };

    for (Index k = 0; k == 0 || k < depth; k += block_depth) {
      const Index steps = std::min(block_depth, depth - k), next_k = k + steps;
      const Scalar* const packed = packed_at(k);
      PrefetchedRows next_rows;
      if (ahead && next_k < depth) {
        const Index size = groups * kRows * std::min(block_depth, depth - next_k);
        next_rows = PrefetchedRows(StridedView<const Scalar>{packed_at(next_k), size / kRows, kRows, kRows});
      }
      for (Index s = 0; s < num_strips; ++s) {
        const auto present = strip_at(k, s);
        pack_strip(strip, present);
        PrefetchedRows next_strip;
        if (ahead && (s + 1 < num_strips || next_k < depth)) {
          const auto next = s + 1 < num_strips ? strip_at(k, s + 1) : strip_at(next_k, 0);
          next_strip = PrefetchedRows(next.col_stride == 1 ? next : next.transposed());
        }
        for (Index g = 0; g < groups; ++g) {
          next_strip.advance(g + 1, groups);
          next_rows.advance(s * groups + g + 1, num_strips * groups);
          Scalar* const tile = sums + (s * groups + g) * kRows * kCols;
          const LeftOperand<Scalar> left{packed + g * kRows * steps, 1, kRows};
          add_product(tile, kCols, k != 0, left, strip, steps, rows - g * kRows, present.cols);
          if (next_k < depth) continue;
          const Index row = first_row + g * kRows, col = first_col + s * kCols;
          store_tile(y.block(row, col, std::min(kRows, rows - g * kRows), present.cols), tile,
                     bias == nullptr ? nullptr : bias + col, store);
        }
      }
    }
  });
}

}  // namespace diffattn::inline v0_1::detail
