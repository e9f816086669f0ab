#pragma once

// Several products at once: those of one x with several weights, or of all that a layer's way back needs.
//
//   multiply_all(products, workspace, executor)           several, which may share one run of the executor
//   multiply(y, a, b, bias, store, workspace, executor)   one: y (m x n), a (m x depth), b (depth x n)
//
// A large product takes two runs of the executor (packed_product.hpp). Where threads share a small one, waking them
// costs more than reading b once for each: several such products are then one run together, and a task packs the rows
// of a that it needs itself. The values are the same.

#include <algorithm>
#include <span>

#include "diffattn/core/executor_view.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/product/packed_product.hpp"

namespace diffattn::inline v0_1::detail {

/// How several products become tasks of one run: blocks of whole rows of y. A product that adds to the y of the one
/// before it follows that in the same tasks.
template <typename Scalar, typename T>
class ProductTasks {
  using Block = ProductBlock<Scalar>;
  static constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  /// A task that packs its own rows has no fewer, or packing b again would cost too much, and packs no more values.
  static constexpr Index kLeastOwnRows = 36;
  static constexpr Index kMostOwnValues = (Index{1} << 20) / static_cast<Index>(sizeof(Scalar));

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
  bool pays() const { return workers_ > 1 && count_ >= workers_ && packed_size_ <= kMostOwnValues; }

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
    const Index rows = products_[p].y.rows, blocks = std::clamp(rows / kLeastOwnRows, Index{1}, workers_);
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
  if constexpr (is_viewed<E>) {
    const ProductTasks<Scalar, T> tasks(products, executor.concurrency());
    if (tasks.pays()) return tasks.run(workspace, executor);
    for (const Product<Scalar, T>& product : products) multiply(product, workspace, executor);
  } else {
    ViewedExecutor<E> viewed(executor);
    multiply_all(products, workspace, viewed);
  }
}

/// One product.
template <typename Scalar, typename T, Executor E>
void multiply(const StridedView<Scalar>& y, const StridedView<const Scalar>& a, const StridedView<const T>& b,
              const Scalar* bias, Store store, Workspace& workspace, E& executor) {
  const Product<Scalar, T> product{y, a, b, bias, store};
  multiply_all(std::span<const Product<Scalar, T>>(&product, 1), workspace, executor);
}

}  // namespace diffattn::inline v0_1::detail
