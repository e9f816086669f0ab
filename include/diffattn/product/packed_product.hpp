#pragma once

// y = a b, y = a b + bias or y += a b: the products that linear layers and their gradients are made of.
//
//   multiply(y, a, b, bias, store, workspace, executor)   one product: y (m x n), a (m x depth), b (depth x n)
//   multiply_all(products, workspace, executor)           several, which may share one run of the executor
//
// Operands  any strides; contiguous rows or columns of a and b, and contiguous rows of y, are fast. b may be stored in
// a
//           narrower type. y must not overlap a or b. A depth of 0 gives zeros, or the bias.
// Memory    a packed copy of a, and for each worker one strip of b and the sums of one block, from `workspace`.
// Cost      2·m·n·depth FLOP; a and b are packed, which costs as much as reading them once (b once for every 1,024
// rows).
//
// a is packed a block of depth at a time: [block][group][steps][kRows]. A task is a block of y, whose sums stay in the
// second-level cache; so does what it reads of a, once for every strip of b. A strip is packed just before it is used
// and stays in the first-level cache, so that b is read once for each block of rows, whatever its type and strides.
// What comes next, of a and of b, is asked for from memory while the present strip is multiplied.
//
// A large product takes two runs of the executor: one packs all of a, one multiplies. Where threads share a small one,
// waking them costs more than reading b once for each: several such products are then one run together, and a task
// packs the rows of a that it needs itself.
//
// Each sum is made of chains of kChain multiply-adds along depth, added up in order, and every block of depth is a
// multiple of kChain: the result depends neither on the blocks nor on the number of threads.

#include <algorithm>
#include <span>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/product/packed.hpp"
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
  /// A task that packs its own rows has no fewer, or packing b again would cost too much, and packs no more values.
  static constexpr Index kLeastOwnRows = 36;
  static constexpr Index kMostOwnValues = (Index{1} << 20) / static_cast<Index>(sizeof(Scalar));
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

/// y = a b (+ bias) or y += a b: y (m x n), a (m x depth), b (depth x n), bias n values, or null. Any strides: rows or
/// columns of a and b ought to be contiguous, and rows of y. y must not overlap a or b.
template <typename Scalar, typename T = Scalar>
struct Product {
  StridedView<Scalar> y;
  StridedView<const Scalar> a;
  StridedView<const T> b;
  const Scalar* bias = nullptr;
  Store store = Store::overwrite;

  /// Steps of depth that are packed together.
  Index block_depth() const {
    using Block = ProductBlock<Scalar>;
    if (reads_ahead()) return Block::kDepth;
    return std::clamp(a.cols, Index{1}, Block::kDepthOfFew);
  }
  bool reads_ahead() const { return y.rows > (ProductBlock<Scalar>::kFewGroups - 1) * Tile<Scalar>::kRows; }
};

/// Rows of a, packed: [block of depth][group][steps][kRows], padded_rows of them in each block.
template <typename Scalar>
struct PackedRows {
  Scalar* data;
  Index padded_rows;

  /// Packs `rows`, all of `a` or some, steps [k, k + steps) of depth.
  template <typename T>
  void pack(const StridedView<const T>& rows, Index k, Index steps) const {
    pack_rows(data + padded_rows * k, rows.middle_cols(k, steps));
  }
};

/// What a worker needs beside packed rows: one strip of b, and the sums of a block of y.
template <typename Scalar>
struct ProductScratch {
  Scalar* strip;
  Scalar* sums;
};

/// Computes rows x cols of y from (row, col) on, the first of which are row `packed_row` of what is packed.
template <typename Scalar, typename T>
void multiply_block(const Product<Scalar, T>& product, Index row, Index col, Index rows, Index cols,
                    const PackedRows<Scalar>& packed_rows, Index packed_row, const ProductScratch<Scalar>& scratch) {
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  const Index depth = product.a.cols, block_depth = product.block_depth();
  const Index groups = divide_up(rows, kRows), num_strips = divide_up(cols, kCols);
  const bool ahead = product.reads_ahead();
  const auto packed_at = [&](Index k) {
    return packed_rows.data + packed_rows.padded_rows * k + packed_row * std::min(block_depth, depth - k);
  };
  const auto strip_at = [&](Index k, Index s) {
    return product.b.block(k, col + s * kCols, std::min(block_depth, depth - k), std::min(kCols, cols - s * kCols));
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
      pack_strip(scratch.strip, present);
      PrefetchedRows next_strip;
      if (ahead && (s + 1 < num_strips || next_k < depth)) {
        const auto next = s + 1 < num_strips ? strip_at(k, s + 1) : strip_at(next_k, 0);
        next_strip = PrefetchedRows(next.col_stride == 1 ? next : next.transposed());
      }
      for (Index g = 0; g < groups; ++g) {
        next_strip.advance(g + 1, groups);
        next_rows.advance(s * groups + g + 1, num_strips * groups);
        Scalar* const tile = scratch.sums + (s * groups + g) * kRows * kCols;
        const LeftOperand<Scalar> left{packed + g * kRows * steps, 1, kRows};
        add_product(tile, kCols, k != 0, left, scratch.strip, steps, rows - g * kRows, present.cols);
        if (next_k < depth) continue;
        const Index first = row + g * kRows, first_col = col + s * kCols;
        store_tile(product.y.block(first, first_col, std::min(kRows, rows - g * kRows), present.cols), tile,
                   product.bias == nullptr ? nullptr : product.bias + first_col, product.store);
      }
    }
  }
}

/// One product, as two runs of the executor: one packs a, one multiplies.
template <typename Scalar, typename T, Executor E>
void multiply(const Product<Scalar, T>& product, Workspace& workspace, E& executor) {
  using Block = ProductBlock<Scalar>;
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  const StridedView<Scalar>& y = product.y;
  if (y.rows == 0 || y.cols == 0) return;

  const Index depth = product.a.cols, block_depth = product.block_depth();
  const Index row_blocks = divide_up(y.rows, Block::kMostRows);
  const Index block_rows = round_up(divide_up(y.rows, row_blocks), kRows);
  // Every thread ought to get some of few columns.
  const Index fair_cols = divide_up(divide_up(y.cols, kCols) * row_blocks, executor.concurrency()) * kCols;
  const Index block_cols = std::min(std::max(Block::kMostCols, kCols), fair_cols);

  const auto frame = workspace.frame();
  PackedRows<Scalar> packed{nullptr, round_up(y.rows, kRows)};
  packed.data = workspace.take<Scalar>(packed.padded_rows * depth);
  auto* const strips = workspace.take<Scalar>(executor.concurrency() * block_depth * kCols);
  auto* const all_sums = workspace.take<Scalar>(executor.concurrency() * block_rows * block_cols);

  executor.run(divide_up(depth, block_depth), [&](Index task, Index /*worker*/) {
    const Index k = task * block_depth;
    packed.pack(product.a, k, std::min(block_depth, depth - k));
  });
  executor.run(row_blocks * divide_up(y.cols, block_cols), [&](Index task, Index worker) {
    const Index row = task % row_blocks * block_rows, col = task / row_blocks * block_cols;
    multiply_block(product, row, col, std::min(block_rows, y.rows - row), std::min(block_cols, y.cols - col), packed,
                   row, {strips + worker * block_depth * kCols, all_sums + worker * block_rows * block_cols});
  });
}

/// How several products become tasks of one run: blocks of whole rows of y. A product that adds to the y of the one
/// before it follows that in the same tasks.
template <typename Scalar, typename T>
class ProductTasks {
  using Block = ProductBlock<Scalar>;
  static constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;

 public:
  ProductTasks(std::span<const Product<Scalar, T>> products, Index workers) : products_(products), workers_(workers) {
    for (std::size_t p = 0; p < products.size(); ++p) {
      const Index rows = block_rows(p), depth = products[p].a.cols;
      packed_size_ = std::max(packed_size_, rows * depth);
      strip_size_ = std::max(strip_size_, products[p].block_depth() * kCols);
      sums_size_ = std::max(sums_size_, rows * block_cols(p));
      if (!continues(p)) count_ += divide_up(products[p].y.rows, rows);
    }
  }

  /// Whether waking the threads once for all is worth more than packing every b once, and there is work for each.
  bool pays() const { return workers_ > 1 && count_ >= workers_ && packed_size_ <= Block::kMostOwnValues; }

  template <Executor E>
  void run(Workspace& workspace, E& executor) const {
    const auto frame = workspace.frame();
    auto* const packed = workspace.take<Scalar>(workers_ * packed_size_);
    auto* const strips = workspace.take<Scalar>(workers_ * strip_size_);
    auto* const sums = workspace.take<Scalar>(workers_ * sums_size_);
    executor.run(count_, [&](Index task, Index worker) {
      std::size_t p = 0;
      for (;; ++p) {
        if (continues(p)) continue;
        const Index blocks = divide_up(products_[p].y.rows, block_rows(p));
        if (task < blocks) break;
        task -= blocks;
      }
      do {
        run_block(p, task, packed + worker * packed_size_, {strips + worker * strip_size_, sums + worker * sums_size_});
      } while (++p < products_.size() && continues(p));
    });
  }

 private:
  bool continues(std::size_t p) const {
    return p != 0 && products_[p].store == Store::add && products_[p].y.data == products_[p - 1].y.data;
  }

  Index block_rows(std::size_t p) const {
    const Index rows = products_[p].y.rows, blocks = std::clamp(rows / Block::kLeastOwnRows, Index{1}, workers_);
    return std::max(round_up(divide_up(rows, blocks), kRows), kRows);
  }
  Index block_cols(std::size_t p) const {
    return std::min(std::max(Block::kMostCols, kCols), round_up(products_[p].y.cols, kCols));
  }

  void run_block(std::size_t p, Index task, Scalar* to, const ProductScratch<Scalar>& scratch) const {
    const Product<Scalar, T>& product = products_[p];
    const Index row = task * block_rows(p), rows = std::min(block_rows(p), product.y.rows - row);
    const Index depth = product.a.cols, block_depth = product.block_depth();
    const PackedRows<Scalar> packed{to, round_up(rows, kRows)};
    for (Index k = 0; k < depth; k += block_depth) {
      packed.pack(product.a.middle_rows(row, rows), k, std::min(block_depth, depth - k));
    }
    for (Index col = 0; col < product.y.cols; col += block_cols(p)) {
      multiply_block(product, row, col, rows, std::min(block_cols(p), product.y.cols - col), packed, 0, scratch);
    }
  }

  std::span<const Product<Scalar, T>> products_;
  Index workers_;
  Index packed_size_ = 0, strip_size_ = 0, sums_size_ = 0;  // of one worker
  Index count_ = 0;
};

/// Several products, none of which reads what another writes, in the order given where they add to the same y.
template <typename Scalar, typename T, Executor E>
void multiply_all(std::span<const Product<Scalar, T>> products, Workspace& workspace, E& executor) {
  const ProductTasks<Scalar, T> tasks(products, executor.concurrency());
  if (tasks.pays()) return tasks.run(workspace, executor);
  for (const Product<Scalar, T>& product : products) multiply(product, workspace, executor);
}

/// One product.
template <typename Scalar, typename T, Executor E>
void multiply(const StridedView<Scalar>& y, const StridedView<const Scalar>& a, const StridedView<const T>& b,
              const Scalar* bias, Store store, Workspace& workspace, E& executor) {
  const Product<Scalar, T> product{y, a, b, bias, store};
  multiply_all(std::span<const Product<Scalar, T>>(&product, 1), workspace, executor);
}

}  // namespace diffattn::inline v0_1::detail
