#pragma once

// The layouts of packed.hpp for a tile of pairs of bfloat16 (core/simd_pairs.hpp), from bfloat16 or from float, which is
// rounded on the way. Two neighbours along depth make a pair; an odd depth is filled up with 0. With P = ⌈depth / 2⌉:
//
//   pack_rows(to, a)                           a (m x depth), a left operand        → [group][P][kRows] pairs
//   copy_rows(to, a)                           a (m x depth), a left operand        → [row][P] pairs
//   pack_columns(to, stride, b)                b (depth x n), a right operand       → [strip][P][kCols] pairs
//   pack_transposed(to, source, first, count)  source (n x depth), read as sourceᵀ  → [strip][P][kCols] pairs
//   copy_rounded(to, a)                        a (m x depth)   → [row][depth] floats, rounded: what a target without the
//                                              instruction multiplies, in the layouts of packed.hpp
//
// What a last group or strip lacks repeats the last row, or is 0 in pack_columns.
//
// Memory  packed_strips_size<float>(cols, P) pairs for a right operand, whole groups for a left one, from the caller,
//         aligned to a packet.
// Cost    every value is read and written once.

#include <algorithm>
#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/simd_pairs.hpp"
#include "diffattn/product/packed.hpp"
#include "diffattn/product/register_tile.hpp"

namespace diffattn::inline v0_1::detail {

/// The pair of depth (2·pair, 2·pair + 1) of one row of `depth` values, col_stride apart.
template <typename T>
simd::Pair pair_at(const T* row, Index col_stride, Index depth, Index pair) {
  const auto at = [&](Index k) {
    return k < depth ? static_cast<Eigen::bfloat16>(row[k * col_stride]) : Eigen::bfloat16(0);
  };
  return {at(2 * pair), at(2 * pair + 1)};
}

/// kLanes rows, row_at(0), row_at(1) …, from column k on → packets of their pairs, one for every lane of which there
/// are kCount. The rows have 2·kCount columns there.
template <Index kCount, typename RowAt>
EIGEN_ALWAYS_INLINE void transpose_pairs(simd::PairPacket (&pairs)[kCount], const RowAt& row_at, Index k) {
  constexpr Index kLanes = simd::kLanes<float>;
  static_assert(kCount == kLanes);
  simd::Packet<float> block[kLanes];
  for (Index r = 0; r < kLanes; ++r) block[r] = simd::pairs_at(row_at(r) + k).bits;
  simd::transpose<float>(block);
  for (Index r = 0; r < kLanes; ++r) pairs[r] = {block[r]};
}

/// a → [row][pairs].
template <typename T>
void copy_rows(simd::Pair* to, const StridedView<const T>& a) {
  constexpr Index kLanes = simd::kLanes<float>;
  const Index pairs = steps_of<simd::Pair>(a.cols);
  for (Index r = 0; r < a.rows; ++r, to += pairs) {
    const T* const from = &a(r, 0);
    Index p = 0;
    if (a.col_stride == 1) {
      for (; 2 * (p + kLanes) <= a.cols; p += kLanes) simd::storeu_pairs(to + p, simd::pairs_at(from + 2 * p));
    }
    for (; p < pairs; ++p) to[p] = pair_at(from, a.col_stride, a.cols, p);
  }
}

/// a → [row][depth], rounded to bfloat16.
template <typename T>
void copy_rounded(float* to, const StridedView<const T>& a) {
  constexpr Index kLanes = simd::kLanes<float>;
  for (Index r = 0; r < a.rows; ++r, to += a.cols) {
    const T* const from = &a(r, 0);
    Index c = 0;
    if (a.col_stride == 1) {
      for (; c + kLanes <= a.cols; c += kLanes) {
        simd::storeu(to + c, simd::round_to_bfloat16(simd::load_as<float>(from + c)));
      }
    }
    for (; c < a.cols; ++c) to[c] = static_cast<float>(static_cast<Eigen::bfloat16>(from[c * a.col_stride]));
  }
}

/// a → [group][pairs][kRows]. Each step is stored as whole packets where another follows that overwrites what is too
/// much.
template <typename T>
void pack_rows(simd::Pair* to, const StridedView<const T>& a) {
  constexpr Index kRows = Tile<float>::kRows, kLanes = simd::kLanes<float>, kPackets = divide_up(kRows, kLanes);
  const Index pairs = steps_of<simd::Pair>(a.cols);
  for (Index first = 0; first < a.rows; first += kRows, to += pairs * kRows) {
    const Index last = std::min(first + kRows, a.rows) - 1;
    Index p = 0;
    if (a.col_stride == 1) {
      for (; p + kLanes < pairs; p += kLanes) {
        simd::PairPacket block[kPackets][kLanes];
        for (Index packet = 0; packet < kPackets; ++packet) {
          const auto row_at = [&](Index r) { return &a(std::min(first + packet * kLanes + r, last), 0); };
          transpose_pairs(block[packet], row_at, 2 * p);
        }
        for (Index r = 0; r < kLanes; ++r) {
          for (Index packet = 0; packet < kPackets; ++packet) {
            simd::storeu_pairs(to + (p + r) * kRows + packet * kLanes, block[packet][r]);
          }
        }
      }
    }
    for (; p < pairs; ++p) {
      for (Index r = 0; r < kRows; ++r) {
        to[p * kRows + r] = pair_at(&a(std::min(first + r, last), 0), a.col_stride, a.cols, p);
      }
    }
  }
}

/// One strip of b(k, c) = source(first + c, k), as pack_transposed_strip of packed.hpp.
template <typename T>
void pack_transposed_strip(simd::Pair* to, const StridedView<const T>& source, Index first, Index present,
                           bool ahead = false) {
  constexpr Index kCols = Tile<float>::kCols, kLanes = simd::kLanes<float>;
  const Index pairs = steps_of<simd::Pair>(source.cols), last = first + present - 1, width = round_up(present, kLanes);
  Index p = 0;
  if (source.col_stride == 1) {
    for (; 2 * (p + kLanes) <= source.cols; p += kLanes) {
      for (Index c = 0; c < width; c += kLanes) {
        simd::PairPacket block[kLanes];
        const auto row_at = [&](Index r) {
          const T* const row = &source(std::min(first + c + r, last), 0);
          if (ahead) {
            simd::prefetch(row + 2 * p, kCols * source.row_stride);
            simd::prefetch(to, (pairs + p + r) * kCols + c);
          }
          return row;
        };
        transpose_pairs(block, row_at, 2 * p);
        for (Index r = 0; r < kLanes; ++r) simd::store_pairs(to + (p + r) * kCols + c, block[r]);
      }
    }
  }
  for (; p < pairs; ++p) {
    for (Index c = 0; c < width; ++c) {
      to[p * kCols + c] = pair_at(&source(std::min(first + c, last), 0), source.col_stride, source.cols, p);
    }
  }
}

/// Rows [first, first + count) of `source` → strips of kCols rows; `first` is a multiple of kCols.
template <typename T>
void pack_transposed(simd::Pair* to, const StridedView<const T>& source, Index first, Index count) {
  constexpr Index kCols = Tile<float>::kCols;
  for (Index row = first; row < first + count; row += kCols) {
    pack_transposed_strip(to + row * steps_of<simd::Pair>(source.cols), source, row,
                          std::min(kCols, first + count - row), true);
  }
}

/// The rows of `source`, which begin with an even one of b, → pairs of rows of strips of kCols columns; `stride` pairs
/// of rows from one strip to the next. Returns whether everything packed is finite. With `ahead` the next rows are
/// fetched on the way.
template <typename T>
bool pack_columns(simd::Pair* to, Index stride, const StridedView<const T>& source, bool ahead = false) {
  constexpr Index kCols = Tile<float>::kCols, kLanes = simd::kLanes<float>;
  constexpr Index kTogether = 8;  // rows, as in packed.hpp
  const auto zero = simd::broadcast(0.0f);
  simd::Packet<float> not_finite = zero;  // x · 0 is 0, or NaN
  for (Index first = 0; first < source.rows; first += kTogether) {
    const Index rows = std::min(kTogether, source.rows - first);
    for (Index col = 0; col < source.cols; col += kCols) {
      const Index present = std::min(kCols, source.cols - col);
      simd::Pair* to_row = to + col * stride + first / 2 * kCols;
      for (Index k = first; k < first + rows; k += 2, to_row += kCols) {
        const bool both = k + 1 < source.rows;
        const Index copied = both && source.col_stride == 1 ? present / kLanes * kLanes : 0;
        const T* const row = &source(k, col);
        if (ahead) {
          simd::prefetch(row, kTogether * source.row_stride);
          simd::prefetch(row, (kTogether + 1) * source.row_stride);
        }
        for (Index c = 0; c < copied; c += kLanes) {
          const T* const next = row + source.row_stride;
          if constexpr (std::is_same_v<T, Eigen::bfloat16>) {
            simd::store_pairs(to_row + c, simd::pairs_of(row + c, next + c));
          } else {
            simd::store_pairs(to_row + c,
                              simd::pairs_of(simd::load_as<float>(row + c), simd::load_as<float>(next + c)));
          }
        }
        for (Index c = copied; c < kCols; ++c) {
          to_row[c] = c < present ? pair_at(row + c * source.col_stride, source.row_stride, source.rows - k, 0)
                                  : simd::Pair{Eigen::bfloat16(0), Eigen::bfloat16(0)};
        }
#pragma GCC unroll 2
        for (Index c = 0; c < kCols; c += kLanes) {
          not_finite = simd::multiply_add(simd::load_operand(to_row + c), simd::PairPacket{zero}, not_finite);
        }
      }
    }
  }
  return simd::reduce_add(not_finite) == 0;
}

/// Multiplies pairs by a factor and rounds them, which changes nothing but their size where it is a power of two.
inline void scale_pairs(simd::Pair* pairs, Index count, float factor) {
  constexpr Index kLanes = simd::kLanes<float>;
  if (factor == 1) return;
  const auto factors = simd::broadcast(factor);
  Index p = 0;
  for (; p + kLanes <= count; p += kLanes) {
    const simd::PairPacket x = simd::loadu_pairs(pairs + p);
    const auto first = simd::mul(simd::first_of_pairs(x), factors),
               second = simd::mul(simd::second_of_pairs(x), factors);
    simd::storeu_pairs(pairs + p, simd::pairs_of(first, second));
  }
  for (; p < count; ++p) {
    const auto scaled = [&](Eigen::bfloat16 x) { return static_cast<Eigen::bfloat16>(static_cast<float>(x) * factor); };
    pairs[p] = {scaled(pairs[p].first), scaled(pairs[p].second)};
  }
}

}  // namespace diffattn::inline v0_1::detail
