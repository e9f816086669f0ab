#pragma once

// y = x Wᵀ + b in bfloat16: x is rounded to it, W is stored in it, sums are float.
//
//   multiply_bfloat16(outputs, x, workspace, executor)   y (n x out), x (n x in) float, w (out x in) bfloat16, bias out
//                                                        values or null, for every output
//   packed_weight(w)                                     w, packed once and for good; null where that is of no use
//
// Where the CPU multiplies pairs of bfloat16 (core/simd_pairs.hpp) both are packed as pairs, x once for all outputs, W
// strip by strip on the way unless it has been packed before, and a tile does two products a step. Up to 4 rows are bound
// by reading W: those, and all rows elsewhere, are a rounded copy of x multiplied in float, which makes the same products.
//
// Operands  any strides of x and y; contiguous rows of W. y must not overlap x or W.
// Memory    a packed or rounded copy of x, and what packed_product.hpp and thin_product.hpp say, from `workspace`.
// Cost      half the time of float for many rows, with the instruction; the time of reading W for a few.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <span>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/simd_pairs.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/product/matmul.hpp"
#include "diffattn/product/packed.hpp"
#include "diffattn/product/packed_pairs.hpp"
#include "diffattn/product/packed_product.hpp"
#include "diffattn/product/register_tile.hpp"
#include "diffattn/product/thin_product.hpp"

namespace diffattn::inline v0_1::detail {

/// One of the products of an x.
struct Bfloat16Output {
  StridedView<float> y;                  ///< n x out
  StridedView<const Eigen::bfloat16> w;  ///< out x in, contiguous rows
  const float* bias = nullptr;           ///< out values, or null
  const simd::Pair* packed = nullptr;    ///< w as packed_weight() has packed it, or null
};

/// What packed_weight() takes, in bytes; 0 where it is of no use.
inline std::size_t packed_weight_bytes(Index rows, Index cols) {
  if (!simd::kUsesPairs) return 0;
  return static_cast<std::size_t>(packed_strips_size<float>(rows, steps_of<simd::Pair>(cols))) * sizeof(simd::Pair);
}

/// w (out x in) as multiply_bfloat16 reads it: pairs, strip by strip, in memory of its own. Null where they are not
/// multiplied. Throws std::bad_alloc.
inline std::shared_ptr<const simd::Pair> packed_weight(const StridedView<const Eigen::bfloat16>& w) {
  const std::size_t bytes = packed_weight_bytes(w.rows, w.cols);
  if (bytes == 0) return nullptr;
  constexpr std::align_val_t kAligned{64};
  const std::shared_ptr<simd::Pair> pairs(static_cast<simd::Pair*>(::operator new(bytes, kAligned)),
                                          [](simd::Pair* p) { ::operator delete(p, kAligned); });
  pack_transposed(pairs.get(), w, 0, w.rows);
  return pairs;
}

/// x, rounded to bfloat16 and widened again, in memory of the workspace's open frame.
template <Executor E>
StridedView<const float> rounded_copy(const StridedView<const float>& x, Workspace& workspace, E& executor) {
  constexpr Index kTaskRows = 64;
  float* const rounded = workspace.take<float>(x.rows * x.cols);
  executor.run(divide_up(x.rows, kTaskRows), [&](Index task, Index /*worker*/) {
    const Index first = task * kTaskRows;
    copy_rounded(rounded + first * x.cols, x.middle_rows(first, std::min(kTaskRows, x.rows - first)));
  });
  return {rounded, x.rows, x.cols, x.cols, 1};
}

/// All outputs of one x.
template <Executor E>
void multiply_bfloat16(std::span<const Bfloat16Output> outputs, const StridedView<const float>& x, Workspace& workspace,
                       E& executor) {
  if (x.rows == 0) return;
  const auto frame = workspace.frame();
  if constexpr (simd::kUsesPairs) {
    if (x.rows > RowByRowProduct<float, Eigen::bfloat16>::kMostRows) {
      const auto product_of = [&](const Bfloat16Output& output) {
        return Product<float, Eigen::bfloat16, simd::Pair>{
            output.y, x, output.w.transposed(), output.bias, Store::overwrite, output.packed};
      };
      const PackedRows<simd::Pair> packed = packed_left(product_of(outputs[0]), workspace, executor);
      for (const Bfloat16Output& output : outputs) {
        if (output.y.cols != 0) multiply_packed(product_of(output), packed, workspace, executor);
      }
      return;
    }
  }
  const StridedView<const float> rounded = rounded_copy(x, workspace, executor);
  for (const auto& [y, w, bias, packed] : outputs) matmul_transposed(y, rounded, w, bias, workspace, executor);
}

}  // namespace diffattn::inline v0_1::detail
