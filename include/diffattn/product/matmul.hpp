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

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/product/packed.hpp"
#include "diffattn/product/packed_product.hpp"
#include "diffattn/product/thin_product.hpp"

namespace diffattn::inline v0_1::detail {

/// y = x Wᵀ for a few rows of x: dot products over rows of W, which must be contiguous, as must x and y. W is stored as
/// Stored and widened as it is read.
template <typename Scalar, typename Stored>
class RowByRowProduct {
  static constexpr Index kLanes = simd::kLanes<Scalar>;
  static constexpr bool kNarrow = sizeof(Stored) < sizeof(Scalar);
  /// Rows of W read side by side, to have that many sums in flight. Rows of a narrower type are so short that the
  /// hardware's prefetchers find each too late: those are read one after the other, as one long stream, and fetched
  /// ahead of it.
  static constexpr Index kOutputs = kNarrow ? 1 : 4;
  static constexpr Index kAhead = 4096 / static_cast<Index>(sizeof(Stored));

 public:
  /// Of x: with more, packing W for all of them costs less than reading it in here for each.
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
        dot(dots, rows, &x(i, 0), x.cols);
        for (Index o = 0; o < present; ++o) y(i, out + o) = dots[o] + (bias == nullptr ? Scalar(0) : bias[out + o]);
      }
    }
  }

 private:
  static void dot(Scalar (&dots)[kOutputs], const Stored* const (&rows)[kOutputs], const Scalar* x, Index depth) {
    simd::Packet<Scalar> sums[kOutputs][2];
    for (auto& sum : sums) sum[0] = sum[1] = simd::broadcast(Scalar(0));
    Index k = 0;
    for (; k + 2 * kLanes <= depth; k += 2 * kLanes) {
      if constexpr (kNarrow) {
        constexpr Index kLine = 64 / static_cast<Index>(sizeof(Stored));
        for (Index line = 0; line < 2 * kLanes; line += kLine) simd::prefetch(rows[0] + kAhead + k + line);
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
}

}  // namespace diffattn::inline v0_1::detail
