#pragma once

// y = a b, y = a b + bias or y += a b: the products that linear layers and their gradients are made of.
//
//   multiply(product, workspace, executor)   y (m x n), a (m x depth), b (depth x n), bias
//
// Operands  any strides; contiguous rows or columns of a and b, and contiguous rows of y, are fast. b may be stored in
//           a narrower type. y must not overlap a or b. A depth of 0 gives zeros, or the bias. Both may be packed as
//           pairs of bfloat16, which rounds a (bfloat16_product.hpp): steps below are then pairs.
// Memory    a packed copy of a, and for each worker one strip of b and the sums of one block, from `workspace`.
// Cost      2·m·n·depth FLOP; a and b are packed, which costs as much as reading them once (b once for every 1,024
//           rows).
//
// a is packed a block of depth at a time: [block][group][steps][kRows]. A task is a block of y, whose sums stay in the
// second-level cache; so does what it reads of a, once for every strip of b. A strip is packed just before it is used
// and stays in the first-level cache, so that b is read once for each block of rows, whatever its type and strides.
// What comes next, of a and of b, is asked for from memory while the present strip is multiplied.
//
// b of pairs may have been packed before (packed_b), for all calls that it is there for: then its strips are read where
// they are, with the same result, bit for bit.
//
// A product takes two runs of the executor: one packs all of a, one multiplies. Several at once: product_tasks.hpp.
//
// Each sum is made of chains of kChain multiply-adds along depth, added up in order, and every block of depth is a
// multiple of kChain: the result depends neither on the blocks nor on the number of threads.

#include <algorithm>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/product/packed.hpp"
#include "diffattn/product/packed_pairs.hpp"
#include "diffattn/product/prefetched_rows.hpp"

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
template <typename Operand, typename T>
void pack_strip(Operand* to, const StridedView<const T>& b) {
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

/// y = a b (+ bias) or y += a b: y (m x n), a (m x depth), b (depth x n), bias n values, or null. Any strides: rows or
/// columns of a and b ought to be contiguous, and rows of y. y must not overlap a or b. Operand: what a and b are packed
/// as.
template <typename Scalar, typename T = Scalar, typename Operand = Scalar>
struct Product {
  StridedView<Scalar> y;
  StridedView<const Scalar> a;
  StridedView<const T> b;
  const Scalar* bias = nullptr;
  Store store = Store::overwrite;
  const Operand* packed_b = nullptr;  ///< all of b, a transpose, as pack_transposed() packs it; or null

  /// Steps of depth that are packed together.
  Index block_depth() const {
    using Block = ProductBlock<Scalar>;
    if (reads_ahead()) return Block::kDepth;
    return std::clamp(steps(), Index{1}, Block::kDepthOfFew);
  }
  Index steps() const { return steps_of<Operand>(a.cols); }
  bool reads_ahead() const { return y.rows > (ProductBlock<Scalar>::kFewGroups - 1) * Tile<Scalar>::kRows; }
};

/// Rows of a, packed: [block of depth][group][steps][kRows], padded_rows of them in each block.
template <typename Operand>
struct PackedRows {
  Operand* data;
  Index padded_rows;

  /// Packs `rows`, all of `a` or some, steps [k, k + steps) of depth.
  template <typename T>
  void pack(const StridedView<const T>& rows, Index k, Index steps) const {
    const Index first = k * kStepDepth<Operand>;
    const Index count = std::min(steps * kStepDepth<Operand>, rows.cols - first);
    pack_rows(data + padded_rows * k, rows.middle_cols(first, count));
  }
};

/// What a worker needs beside packed rows: one strip of b, and the sums of a block of y.
template <typename Operand>
struct ProductScratch {
  Operand* strip;
  SumOf<Operand>* sums;
};

/// b of a product in strips of up to kCols columns from `col` on, `steps` of depth from `k` on.
template <typename Scalar, typename T, typename Operand>
struct RightStrips {
  static constexpr bool kMayBePacked = kStepDepth<Operand> == 2;
  const Product<Scalar, T, Operand>& product;
  Operand* scratch;  // for one

  StridedView<const T> view(Index k, Index col, Index steps, Index cols) const {
    constexpr Index kStep = kStepDepth<Operand>;
    return product.b.block(k * kStep, col, std::min(steps * kStep, product.b.rows - k * kStep), cols);
  }
  const Operand* where_packed(Index k, Index col) const {
    return product.packed_b + col * product.steps() + k * Tile<Scalar>::kCols;
  }
  /// A strip, packed.
  const Operand* packed(Index k, Index col, Index steps, Index cols) const {
    if constexpr (kMayBePacked) {
      if (product.packed_b != nullptr) return where_packed(k, col);
    }
    pack_strip(scratch, view(k, col, steps, cols));
    return scratch;
  }
  /// What will be read of one that comes later.
  PrefetchedRows ahead(Index k, Index col, Index steps, Index cols) const {
    if constexpr (kMayBePacked) {
      constexpr Index kCols = Tile<Scalar>::kCols;
      if (product.packed_b != nullptr) {
        return PrefetchedRows(StridedView<const Operand>{where_packed(k, col), steps, kCols, kCols});
      }
    }
    const auto next = view(k, col, steps, cols);
    return PrefetchedRows(next.col_stride == 1 ? next : next.transposed());
  }
};

/// Computes rows x cols of y from (row, col) on, the first of which are row `packed_row` of what is packed.
template <typename Scalar, typename T, typename Operand>
void multiply_block(const Product<Scalar, T, Operand>& product, Index row, Index col, Index rows, Index cols,
                    const PackedRows<Operand>& packed_rows, Index packed_row, const ProductScratch<Operand>& scratch) {
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  const Index depth = product.steps(), block_depth = product.block_depth();
  const Index groups = divide_up(rows, kRows), num_strips = divide_up(cols, kCols);
  const bool ahead = product.reads_ahead();
  const auto packed_at = [&](Index k) {
    return packed_rows.data + packed_rows.padded_rows * k + packed_row * std::min(block_depth, depth - k);
  };
  const RightStrips<Scalar, T, Operand> right{product, scratch.strip};
  const auto cols_of = [&](Index s) { return std::min(kCols, cols - s * kCols); };

  for (Index k = 0; k == 0 || k < depth; k += block_depth) {
    const Index steps = std::min(block_depth, depth - k), next_k = k + steps;
    const Operand* const packed = packed_at(k);
    PrefetchedRows next_rows;
    if (ahead && next_k < depth) {
      const Index size = groups * kRows * std::min(block_depth, depth - next_k);
      next_rows = PrefetchedRows(StridedView<const Operand>{packed_at(next_k), size / kRows, kRows, kRows});
    }
    for (Index s = 0; s < num_strips; ++s) {
      const Index strip_col = col + s * kCols, present = cols_of(s);
      const Operand* const strip = right.packed(k, strip_col, steps, present);
      PrefetchedRows next_strip;
      if (ahead && s + 1 < num_strips) next_strip = right.ahead(k, strip_col + kCols, steps, cols_of(s + 1));
      if (ahead && s + 1 == num_strips && next_k < depth) {
        next_strip = right.ahead(next_k, col, std::min(block_depth, depth - next_k), cols_of(0));
      }
      for (Index g = 0; g < groups; ++g) {
        next_strip.advance(g + 1, groups);
        next_rows.advance(s * groups + g + 1, num_strips * groups);
        Scalar* const tile = scratch.sums + (s * groups + g) * kRows * kCols;
        const LeftOperand<Operand> left{packed + g * kRows * steps, 1, kRows};
        add_product(tile, kCols, k != 0, left, strip, steps, rows - g * kRows, present);
        if (next_k < depth) continue;
        store_tile(product.y.block(row + g * kRows, strip_col, std::min(kRows, rows - g * kRows), present), tile,
                   product.bias == nullptr ? nullptr : product.bias + strip_col, product.store);
      }
    }
  }
}

/// All rows of a, packed in a run of the executor, in memory of the workspace's open frame.
template <typename Scalar, typename T, typename Operand, Executor E>
PackedRows<Operand> packed_left(const Product<Scalar, T, Operand>& product, Workspace& workspace, E& executor) {
  const Index depth = product.steps(), block_depth = product.block_depth();
  const Index padded_rows = round_up(product.y.rows, Tile<Scalar>::kRows);
  const PackedRows<Operand> packed{workspace.take<Operand>(padded_rows * depth), padded_rows};
  executor.run(divide_up(depth, block_depth), [&](Index task, Index /*worker*/) {
    const Index k = task * block_depth;
    packed.pack(product.a, k, std::min(block_depth, depth - k));
  });
  return packed;
}

/// One product, whose a has been packed, as a run of the executor.
template <typename Scalar, typename T, typename Operand, Executor E>
void multiply_packed(const Product<Scalar, T, Operand>& product, const PackedRows<Operand>& packed,
                     Workspace& workspace, E& executor) {
  using Block = ProductBlock<Scalar>;
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  const StridedView<Scalar>& y = product.y;
  const Index row_blocks = divide_up(y.rows, Block::kMostRows);
  const Index block_rows = round_up(divide_up(y.rows, row_blocks), kRows);
  // Every thread ought to get some of few columns.
  const Index fair_cols = divide_up(divide_up(y.cols, kCols) * row_blocks, executor.concurrency()) * kCols;
  const Index block_cols = std::min(std::max(Block::kMostCols, kCols), fair_cols);
  const Index strip_size = product.block_depth() * kCols;

  const auto frame = workspace.frame();
  auto* const strips = workspace.take<Operand>(executor.concurrency() * strip_size);
  auto* const all_sums = workspace.take<Scalar>(executor.concurrency() * block_rows * block_cols);
  executor.run(row_blocks * divide_up(y.cols, block_cols), [&](Index task, Index worker) {
    const Index row = task % row_blocks * block_rows, col = task / row_blocks * block_cols;
    multiply_block(product, row, col, std::min(block_rows, y.rows - row), std::min(block_cols, y.cols - col), packed,
                   row, {strips + worker * strip_size, all_sums + worker * block_rows * block_cols});
  });
}

/// One product, as two runs of the executor: one packs a, one multiplies.
template <typename Scalar, typename T, Executor E>
void multiply(const Product<Scalar, T>& product, Workspace& workspace, E& executor) {
  if (product.y.rows == 0 || product.y.cols == 0) return;
  const auto frame = workspace.frame();
  multiply_packed(product, packed_left(product, workspace, executor), workspace, executor);
}

}  // namespace diffattn::inline v0_1::detail
