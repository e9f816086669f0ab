#pragma once

// y = x Wᵀ + b: the product of every linear layer, on the register tile of the attention kernels.
//
// x is packed like queries and W, (out x in) as PyTorch stores it, like keys. A few rows (decoding) are bound by
// reading W once: they read it where it is.

#include <algorithm>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/packed.hpp"
#include "diffattn/kernels/detail/packed_product.hpp"

namespace diffattn::inline v0_1::detail {

/// y = x Wᵀ for a few rows of x: dot products over rows of W, which must be contiguous, as must x and y. W is stored as
/// Stored and widened as it is read.
template <typename Scalar, typename Stored>
class RowByRowProduct {
  static constexpr Index kLanes = simd::kLanes<Scalar>;
  static constexpr Index kOutputs = 4;  // rows of W read side by side, to have that many sums in flight

 public:
  static constexpr Index kMostRows = 4;

  /// Outputs [first, first + count) of every row.
  static void run(const StridedView<Scalar>& y, const StridedView<const Scalar>& x, const StridedView<const Stored>& w,
                  const Scalar* bias, Index first, Index count) {
    for (Index out = first; out < first + count; out += kOutputs) {
      const Index present = std::min(kOutputs, first + count - out);
      const Stored* rows[kOutputs];
      for (Index o = 0; o < kOutputs; ++o) rows[o] = &w(out + std::min(o, present - 1), 0);
      for (Index i = 0; i < x.rows; ++i) {
        Scalar dots[kOutputs];
        dot(dots, rows, kOutputs * w.row_stride, &x(i, 0), x.cols);
        for (Index o = 0; o < present; ++o) y(i, out + o) = dots[o] + (bias == nullptr ? Scalar(0) : bias[out + o]);
      }
    }
  }

 private:
  /// `ahead`: how far behind these rows, in memory, the next ones are.
  static void dot(Scalar (&dots)[kOutputs], const Stored* const (&rows)[kOutputs], Index ahead, const Scalar* x,
                  Index depth) {
    simd::Packet<Scalar> sums[kOutputs][2];
    for (auto& sum : sums) sum[0] = sum[1] = simd::broadcast(Scalar(0));
    Index k = 0;
    for (; k + 2 * kLanes <= depth; k += 2 * kLanes) {
      if constexpr (sizeof(Stored) < sizeof(Scalar)) {
        // Narrow rows end before the hardware's prefetchers have caught on: without this, half the bandwidth.
        constexpr Index kLine = 64 / static_cast<Index>(sizeof(Stored));
        for (Index o = 0; o < kOutputs; ++o) {
          for (Index line = 0; line < 2 * kLanes; line += kLine) simd::prefetch(rows[o] + ahead + k + line);
        }
      }
#pragma GCC unroll 2
      for (Index p = 0; p < 2; ++p) {
        const auto right = simd::loadu(x + k + p * kLanes);
#pragma GCC unroll 4
        for (Index o = 0; o < kOutputs; ++o) {
          sums[o][p] = simd::fma(simd::load_as<Scalar>(rows[o] + k + p * kLanes), right, sums[o][p]);
        }
      }
    }
    for (Index o = 0; o < kOutputs; ++o) {
      dots[o] = simd::reduce_add(simd::add(sums[o][0], sums[o][1]));
      for (Index tail = k; tail < depth; ++tail) dots[o] += static_cast<Scalar>(rows[o][tail]) * x[tail];
    }
  }
};

/// y (n x out) = x (n x in) · w (out x in)ᵀ + bias (out values, or null).
template <typename Scalar, typename Stored, Executor E>
void matmul_transposed(const StridedView<Scalar>& y, const StridedView<const Scalar>& x,
                       const StridedView<const Stored>& w, const Scalar* bias, Workspace& workspace, E& executor) {
  constexpr Index kBlockRows = ProductBlock<Scalar>::kRows, kBlockCols = ProductBlock<Scalar>::kCols;
  const Index n = x.rows, depth = x.cols, outputs = w.rows;
  if (n == 0 || outputs == 0) return;

  const bool contiguous = x.col_stride == 1 && w.col_stride == 1 && y.col_stride == 1;
  if (n <= RowByRowProduct<Scalar, Stored>::kMostRows && contiguous) {
    constexpr Index kPiece = 64;
    executor.run(divide_up(outputs, kPiece), [&](Index task, Index /*worker*/) {
      RowByRowProduct<Scalar, Stored>::run(y, x, w, bias, task * kPiece, std::min(kPiece, outputs - task * kPiece));
    });
    return;
  }

  // A column block's strips are packed just before they are needed: they stay in a cache, and W is read from memory
  // once.
  const auto frame = workspace.frame();
  const Index row_blocks = divide_up(n, kBlockRows), col_blocks = divide_up(outputs, kBlockCols);
  const Index strips_size = packed_strips_size<Scalar>(std::min(kBlockCols, outputs), depth);
  auto* const rows = workspace.take<Scalar>(packed_rows_size<Scalar>(n, depth));
  auto* const strips = workspace.take<Scalar>(executor.concurrency() * strips_size);
  auto* const sums = workspace.take<Scalar>(executor.concurrency() * kBlockRows * kBlockCols);
  executor.run(row_blocks, [&](Index task, Index /*worker*/) {
    const Index row = task * kBlockRows;
    pack_rows(rows + row * depth, x.middle_rows(row, std::min(kBlockRows, n - row)), Scalar(1));
  });
  executor.run(col_blocks, [&](Index task, Index worker) {
    const Index col = task * kBlockCols, count = std::min(kBlockCols, outputs - col);
    Scalar* const packed = strips + worker * strips_size;
    pack_transposed(packed, w.middle_rows(col, count), 0, count);
    for (Index row = 0; row < n; row += kBlockRows) {
      multiply_block(y.block(row, col, std::min(kBlockRows, n - row), count), rows + row * depth, packed, depth,
                     bias == nullptr ? nullptr : bias + col, Store::overwrite, sums + worker * kBlockRows * kBlockCols);
    }
  });
}

}  // namespace diffattn::inline v0_1::detail
