#pragma once

// The layouts that the register tile reads, and the packing that makes them from whatever the caller has: any strides,
// either storage order, a narrower storage type.
//
//   pack_rows(to, a)                           a (m x depth), a left operand        → [group][depth][kRows]
//   copy_rows(to, a, factor)                   a (m x depth), a left operand        → [row][depth], as the tile reads
//   it too pack_columns(to, stride, b)                b (depth x n), a right operand       → [strip][depth][kCols]
//   pack_transposed(to, source, first, count)  source (n x depth), read as sourceᵀ  → [strip][depth][kCols]
//
// A group is kRows rows of a left operand and a strip kCols columns of a right one: b(k, c) of a strip is
// strip[k · kCols + c]. So keys, packed transposed, are strips of kCols keys over depth d, and values strips of kCols
// value columns over depth n_k. What a last group or strip lacks is filled up with values that do not matter.
//
// Memory  packed_strips_size(cols, depth) values for a right operand, whole groups for a left one, from the caller,
//         aligned to a packet.
// Cost    every value is read and written once; 0.2 to 2 % of the product that follows.

#include <algorithm>
#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/simd.hpp"
#include "diffattn/product/register_tile.hpp"

namespace diffattn::inline v0_1::detail {

/// Values that `cols` columns over `depth` take as strips.
template <typename Scalar>
constexpr Index packed_strips_size(Index cols, Index depth) {
  return round_up(cols, Tile<Scalar>::kCols) * depth;
}

/// Rows of a whose columns are contiguous, whole groups of them from the first → [group][depth][kRows]. Returns how
/// many rows it packed.
template <typename Scalar, typename T>
Index pack_rows_of_columns(Scalar* to, const StridedView<const T>& a) {
  constexpr Index kRows = Tile<Scalar>::kRows;
  const Index whole = a.rows / kRows * kRows;
  for (Index k = 0; k < a.cols; ++k) {
    const T* const from = &a(0, k);
    for (Index row = 0; row < whole; row += kRows) {
      Scalar* const step = to + row * a.cols + k * kRows;
      for (Index r = 0; r < kRows; ++r) step[r] = static_cast<Scalar>(from[row + r]);
    }
  }
  return whole;
}

/// The first steps of depth of one group, transposed in registers. Returns how many; the caller packs the rest, at
/// least one: each step is stored as whole packets, the last of which reaches past it into the place of the next step,
/// which is written after it.
template <typename Scalar>
Index transpose_group(Scalar* to, const StridedView<const Scalar>& a, Index first, Index last) {
  constexpr Index kRows = Tile<Scalar>::kRows, kLanes = Tile<Scalar>::kLanes, kPackets = divide_up(kRows, kLanes);
  Index k = 0;
  for (; k + kLanes < a.cols; k += kLanes) {
    simd::Packet<Scalar> block[kPackets][kLanes];
    for (Index p = 0; p < kPackets; ++p) {
      for (Index r = 0; r < kLanes; ++r) block[p][r] = simd::loadu(&a(std::min(first + p * kLanes + r, last), k));
      simd::transpose<Scalar>(block[p]);
    }
    for (Index r = 0; r < kLanes; ++r) {
      for (Index p = 0; p < kPackets; ++p) simd::storeu(to + (k + r) * kRows + p * kLanes, block[p][r]);
    }
  }
  return k;
}

/// a → [group][depth][kRows]. What a last group lacks repeats its last row.
template <typename Scalar, typename T>
void pack_rows(Scalar* to, const StridedView<const T>& a) {
  constexpr Index kRows = Tile<Scalar>::kRows;
  const Index packed = a.row_stride == 1 ? pack_rows_of_columns(to, a) : 0;
  to += packed * a.cols;
  for (Index first = packed; first < a.rows; first += kRows, to += a.cols * kRows) {
    const Index last = std::min(first + kRows, a.rows) - 1;
    Index k = 0;
    if constexpr (std::is_same_v<Scalar, T>) {
      if (a.col_stride == 1) k = transpose_group(to, a, first, last);
    }
    for (; k < a.cols; ++k) {
      for (Index r = 0; r < kRows; ++r) to[k * kRows + r] = static_cast<Scalar>(a(std::min(first + r, last), k));
    }
  }
}

/// rows · factor, row by row.
template <typename Scalar, typename T>
void copy_rows(Scalar* to, const StridedView<const T>& rows, Scalar factor) {
  for (Index r = 0; r < rows.rows; ++r, to += rows.cols) {
    const T* const from = &rows(r, 0);
    if (rows.col_stride == 1) {
      for (Index c = 0; c < rows.cols; ++c) to[c] = static_cast<Scalar>(from[c]) * factor;
    } else {
      for (Index c = 0; c < rows.cols; ++c) to[c] = static_cast<Scalar>(from[c * rows.col_stride]) * factor;
    }
  }
}

/// One strip of b(k, c) = source(first + c, k): keys to strips. Contiguous rows are transposed in registers, whole
/// packets at a time. Past the `present` rows the strip repeats the last of them up to the end of a packet, so that no
/// NaN or Inf comes in that is not in the source; nobody reads what follows. With `ahead` the next strip and its rows
/// are fetched on the way.
template <typename Scalar, typename T>
void pack_transposed_strip(Scalar* to, const StridedView<const T>& source, Index first, Index present,
                           bool ahead = false) {
  constexpr Index kCols = Tile<Scalar>::kCols, kLanes = Tile<Scalar>::kLanes;
  const Index depth = source.cols, last = first + present - 1, width = round_up(present, kLanes);
  Index k = 0;
  if (source.col_stride == 1) {
    for (; k + kLanes <= depth; k += kLanes) {
      for (Index c = 0; c < width; c += kLanes) {
        simd::Packet<Scalar> block[kLanes];
        for (Index r = 0; r < kLanes; ++r) {
          const T* const from = &source(std::min(first + c + r, last), k);
          block[r] = simd::load_as<Scalar>(from);
          if (ahead) {
            simd::prefetch(from, kCols * source.row_stride);
            simd::prefetch(to, (depth + k + r) * kCols + c);
          }
        }
        simd::transpose<Scalar>(block);
        for (Index r = 0; r < kLanes; ++r) simd::store(to + (k + r) * kCols + c, block[r]);
      }
    }
  }
  for (; k < depth; ++k) {
    for (Index c = 0; c < width; ++c) to[k * kCols + c] = static_cast<Scalar>(source(std::min(first + c, last), k));
  }
}

/// Rows [first, first + count) of `source` → strips of kCols rows; `first` is a multiple of kCols.
template <typename Scalar, typename T>
void pack_transposed(Scalar* to, const StridedView<const T>& source, Index first, Index count) {
  constexpr Index kCols = Tile<Scalar>::kCols;
  for (Index row = first; row < first + count; row += kCols) {
    pack_transposed_strip(to + row * source.cols, source, row, std::min(kCols, first + count - row), true);
  }
}

/// The rows of `source` → rows of strips of kCols columns, `to` being the first row of the first strip and `stride` the
/// rows from one strip to the next. Returns whether everything packed is finite. With `ahead` the next rows are fetched
/// on the way.
template <typename Scalar, typename T>
bool pack_columns(Scalar* to, Index stride, const StridedView<const T>& source, bool ahead = false) {
  constexpr Index kCols = Tile<Scalar>::kCols, kLanes = Tile<Scalar>::kLanes, kPackets = Tile<Scalar>::kPackets;
  const Index row_stride = source.row_stride, col_stride = source.col_stride;
  // A few rows at a time, strip by strip: the same row of many strips may fall on the same few places of the nearest
  // cache.
  constexpr Index kTogether = 8;
  const auto zero = simd::broadcast(Scalar(0));
  simd::Packet<Scalar> not_finite[] = {zero, zero};  // x · 0 is 0, or NaN; two sums, since each waits for itself
  for (Index first = 0; first < source.rows; first += kTogether) {
    const Index rows = std::min(kTogether, source.rows - first);
    for (Index col = 0; col < source.cols; col += kCols) {
      const Index present = std::min(kCols, source.cols - col);
      const Index copied = col_stride == 1 ? present / kLanes * kLanes : 0;  // columns, as packets
      const T* from = &source(first, col);
      Scalar* row = to + col * stride + first * kCols;
      for (Index k = 0; k < rows; ++k, from += row_stride, row += kCols) {
        if (ahead) simd::prefetch(from, kTogether * row_stride);
        if (copied == kCols) {
#pragma GCC unroll 2
          for (Index p = 0; p < kPackets; ++p) {
            const auto values = simd::load_as<Scalar>(from + p * kLanes);
            simd::store(row + p * kLanes, values);
            not_finite[p] = simd::fma(values, zero, not_finite[p]);
          }
          continue;
        }
        for (Index c = 0; c < copied; c += kLanes) simd::store(row + c, simd::load_as<Scalar>(from + c));
        for (Index c = copied; c < present; ++c) row[c] = static_cast<Scalar>(from[c * col_stride]);
        std::fill(row + present, row + kCols, Scalar(0));
#pragma GCC unroll 2
        for (Index p = 0; p < kPackets; ++p)
          not_finite[p] = simd::fma(simd::load(row + p * kLanes), zero, not_finite[p]);
      }
    }
  }
  return simd::reduce_add(simd::add(not_finite[0], not_finite[1])) == Scalar(0);
}

}  // namespace diffattn::inline v0_1::detail
