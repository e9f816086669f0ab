#pragma once

// y = x Wᵀ + b: the product of every linear layer, on the register tile of the attention kernels.
//
//   matmul_transposed(y, x, w, bias, workspace, executor)   y (n x out), x (n x in), w (out x in), bias out values or
//   null
//
// W is (out x in) as PyTorch stores it, of the scalar or of a narrower type. Up to 4 rows of contiguous operands
// (decoding) are bound by reading W once: they read it where it is. Up to 64 (a batch) read it once, too, with x packed
// (thin_product.hpp). Everything else has both packed (packed_product.hpp). The latter two give a row the same bits.
// Memory  none for 4 rows; else that of thin_product.hpp or packed_product.hpp. y must not overlap x or w.
// Cost    2·n·out·in FLOP, or the time of reading W once.

#include <algorithm>
#include <span>

#include "diffattn/core/executor_view.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/product/packed.hpp"
#include "diffattn/product/product_tasks.hpp"
#include "diffattn/product/thin_product.hpp"

namespace diffattn::inline v0_1::detail {

/// y = x Wᵀ for up to 4 rows of x: dot products over rows of W, which must be contiguous, as must x and y. W is stored
/// as Stored and widened as it is read, once for all rows of x.
template <typename Scalar, typename Stored>
class RowByRowProduct {
  static constexpr Index kLanes = simd::kLanes<Scalar>;
  static constexpr bool kNarrow = sizeof(Stored) < sizeof(Scalar);
  /// Rows of W read side by side for so many rows of x, to have enough sums in flight and no more than registers. Rows
  /// of a narrower type are so short that the hardware's prefetchers find each too late: those are read one after the
  /// other, as one long stream, and fetched ahead of it.
  template <Index kRows>
  static constexpr Index kOutputs = kNarrow                               ? 1
                                    : kRows == 1                          ? 4
                                    : kRows == 4 && simd::kRegisters < 32 ? 1
                                                                          : 2;
  static constexpr Index kAhead = 4096 / static_cast<Index>(sizeof(Stored));

 public:
  /// Of x: with more, reading W is no longer all that takes time.
  static constexpr Index kMostRows = 4;

  /// Outputs [first, first + count) of every row.
  static void run(const StridedView<Scalar>& y, const StridedView<const Scalar>& x, const StridedView<const Stored>& w,
                  const Scalar* bias, Index first, Index count) {
    switch (x.rows) {
      case 1:
        return run_rows<1>(y, x, w, bias, first, count);
      case 2:
        return run_rows < kNarrow ? 1 : 2 > (y, x, w, bias, first, count);
      case 3:
        return run_rows<3>(y, x, w, bias, first, count);
      default:
        return run_rows<4>(y, x, w, bias, first, count);
    }
  }

 private:
  /// kRows of them at a time: two rows of a narrower type are faster one after the other.
  template <Index kRows>
  static void run_rows(const StridedView<Scalar>& y, const StridedView<const Scalar>& x,
                       const StridedView<const Stored>& w, const Scalar* bias, Index first, Index count) {
    constexpr Index kOuts = kOutputs<kRows>;
    const Index ahead = kNarrow ? kAhead : kRows == 1 ? 0 : kOuts * w.row_stride;
    for (Index out = first; out < first + count; out += kOuts) {
      const Index present = std::min(kOuts, first + count - out);
      const Stored* rows[kOuts];
      for (Index o = 0; o < kOuts; ++o) rows[o] = w.data + (out + std::min(o, present - 1)) * w.row_stride;
      for (Index row = 0; row < x.rows; row += kRows) {
        Scalar dots[kRows][kOuts];
        dot<kRows, kOuts>(dots, rows, x.middle_rows(row, kRows), ahead);
        for (Index i = 0; i < kRows; ++i) {
          for (Index o = 0; o < present; ++o) {
            y(row + i, out + o) = dots[i][o] + (bias == nullptr ? Scalar(0) : bias[out + o]);
          }
        }
      }
    }
  }

  /// Each is the sum of two sums, of the even packets and of the odd ones: it does not depend on kRows or kOuts.
  template <Index kRows, Index kOuts>
  static void dot(Scalar (&dots)[kRows][kOuts], const Stored* const (&rows)[kOuts], const StridedView<const Scalar>& x,
                  Index ahead) {
    constexpr Index kLine = 64 / static_cast<Index>(sizeof(Stored));
    const Index depth = x.cols;
    const Scalar* left[kRows];
    for (Index i = 0; i < kRows; ++i) left[i] = x.data + i * x.row_stride;
    simd::Packet<Scalar> sums[kRows][kOuts][2];
#pragma GCC unroll 4
    for (Index i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (Index o = 0; o < kOuts; ++o) sums[i][o][0] = sums[i][o][1] = simd::broadcast(Scalar(0));
    }
    Index k = 0;
    for (; k + 2 * kLanes <= depth; k += 2 * kLanes) {
      if constexpr (kNarrow || kRows > 1) {
#pragma GCC unroll 2
        for (Index o = 0; o < kOuts; ++o) {
          for (Index line = 0; line < 2 * kLanes; line += kLine) simd::prefetch(rows[o], ahead + k + line);
        }
      }
#pragma GCC unroll 2
      for (Index p = 0; p < 2; ++p) {
        simd::Packet<Scalar> right[kOuts];
#pragma GCC unroll 4
        for (Index o = 0; o < kOuts; ++o) right[o] = simd::load_as<Scalar>(rows[o] + k + p * kLanes);
#pragma GCC unroll 4
        for (Index i = 0; i < kRows; ++i) {
          const auto values = simd::loadu(left[i] + k + p * kLanes);
#pragma GCC unroll 4
          for (Index o = 0; o < kOuts; ++o) sums[i][o][p] = simd::fma(right[o], values, sums[i][o][p]);
        }
      }
    }
#pragma GCC unroll 4
    for (Index i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (Index o = 0; o < kOuts; ++o) {
        Scalar sum = simd::reduce_add(simd::add(sums[i][o][0], sums[i][o][1]));
        for (Index tail = k; tail < depth; ++tail) sum += static_cast<Scalar>(rows[o][tail]) * left[i][tail];
        dots[i][o] = sum;
      }
    }
  }
};

/// y (n x out) = x (n x in) · w (out x in)ᵀ + bias (out values, or null).
template <typename Scalar, typename Stored, Executor E>
void matmul_transposed(const StridedView<Scalar>& y, const StridedView<const Scalar>& x,
                       const StridedView<const Stored>& w, const Scalar* bias, Workspace& workspace, E& executor) {
  if constexpr (is_viewed<E>) {
    const Index n = x.rows, outputs = w.rows;
    const bool contiguous = x.col_stride == 1 && w.col_stride == 1 && y.col_stride == 1;
    if (n > RowByRowProduct<Scalar, Stored>::kMostRows || !contiguous) {
      if (ThinProduct<Scalar, Stored>::fits(x, w)) {
        const ThinOutput<Scalar, Stored> output{y, w, bias};
        return multiply_thin(std::span<const ThinOutput<Scalar, Stored>>(&output, 1), x, workspace, executor);
      }
      return multiply(y, x, w.transposed(), bias, Store::overwrite, workspace, executor);
    }
    if (n == 0) return;
    constexpr Index kTaskOutputs = 64;  // enough to be worth a task, few enough to share out evenly
    executor.run(divide_up(outputs, kTaskOutputs), [&](Index task, Index /*worker*/) {
      const Index first = task * kTaskOutputs;
      RowByRowProduct<Scalar, Stored>::run(y, x, w, bias, first, std::min(kTaskOutputs, outputs - first));
    });
  } else {
    ViewedExecutor<E> viewed(executor);
    matmul_transposed(y, x, w, bias, workspace, viewed);
  }
}

}  // namespace diffattn::inline v0_1::detail
