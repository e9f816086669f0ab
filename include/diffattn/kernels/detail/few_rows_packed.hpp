#pragma once

// Keys and values of a few rows that are packed in pages: a strip of keys is multiplied by all rows that share them
// with no sums across lanes, and so is a strip of values.

#include <type_traits>

#include "diffattn/kernels/detail/few_rows.hpp"
#include "diffattn/kernels/detail/packed_pages.hpp"

namespace diffattn::inline v0_1::detail {

/// to(r, c) = Σ_k a[r·a_stride + k] · strip[k·kCols + c] for kHeight rows. Sums are kept in chains enough to hide the
/// latency of an addition.
template <Index kHeight, typename Scalar, typename Storage>
void multiply_strip(Scalar* to, Index to_stride, const Scalar* a, Index a_stride, const Storage* strip, Index depth) {
  constexpr Index kLanes = Tile<Scalar>::kLanes, kCols = Tile<Scalar>::kCols;
  constexpr Index kChains = 4 / kHeight;
  simd::Packet<Scalar> sums[kChains][kHeight][2];
  for (auto& chain : sums) {
    for (auto& row : chain) row[0] = row[1] = simd::broadcast(Scalar(0));
  }
  const auto add = [&](auto& chain, Index k) {
    simd::Packet<Scalar> right[2];
    right[0] = simd::load_as<Scalar>(strip + k * kCols);
    right[1] = simd::load_as<Scalar>(strip + k * kCols + kLanes);
    // Hardware foresees a stream of whole floats well enough; one that is used up twice as fast it does not.
    constexpr Index kAhead = 4096 / sizeof(Storage);
    if constexpr (sizeof(Storage) < sizeof(Scalar)) simd::prefetch_far(strip + k * kCols + kAhead);
#pragma GCC unroll 4
    for (Index r = 0; r < kHeight; ++r) {
      const auto left = simd::broadcast(a[r * a_stride + k]);
      chain[r][0] = simd::fma(left, right[0], chain[r][0]);
      chain[r][1] = simd::fma(left, right[1], chain[r][1]);
    }
  };
  Index k = 0;
  for (; k + kChains <= depth; k += kChains) {
#pragma GCC unroll 4
    for (Index chain = 0; chain < kChains; ++chain) add(sums[chain], k + chain);
  }
  for (; k < depth; ++k) add(sums[0], k);
#pragma GCC unroll 4
  for (Index r = 0; r < kHeight; ++r) {
#pragma GCC unroll 2
    for (Index p = 0; p < 2; ++p) {
#pragma GCC unroll 4
      for (Index chain = 1; chain < kChains; ++chain) sums[0][r][p] = simd::add(sums[0][r][p], sums[chain][r][p]);
      simd::store(to + r * to_stride + p * kLanes, sums[0][r][p]);
    }
  }
}

/// The same for any number of rows.
template <typename Scalar, typename Storage>
void multiply_strip(Scalar* to, Index to_stride, const Scalar* a, Index a_stride, const Storage* strip, Index depth,
                    Index rows) {
  const auto take = [&]<Index kHeight>(std::integral_constant<Index, kHeight>) {
    multiply_strip<kHeight>(to, to_stride, a, a_stride, strip, depth);
    to += kHeight * to_stride;
    a += kHeight * a_stride;
    rows -= kHeight;
  };
  while (rows >= 4) take(std::integral_constant<Index, 4>{});
  if (rows >= 2) take(std::integral_constant<Index, 2>{});
  if (rows >= 1) take(std::integral_constant<Index, 1>{});
}

template <typename Storage>
struct PackedSource {
  static constexpr bool kHeadsApart = true;
  const PackedPages<Storage>& pages;

  template <typename Scalar, Index kMaps, typename Mask>
  void score(const FewRowsState<Scalar, kMaps, Mask>& s, Index piece, const KeyRange& heads) const {
    static_assert(FewRowsState<Scalar, kMaps, Mask>::kPiece == kPageKeys);
    const KeyRange columns = s.strips_of_any(piece);
    const Index key_maps = pages.shape.key_maps;
    // Maps that share their keys meet each strip together.
    const Index rows = key_maps == kMaps ? s.rows : kMaps * s.rows;
    for (Index head = heads.begin; head < heads.end; ++head) {
      for (Index map = 0; map < key_maps; ++map) {
        const Storage* const keys = pages.keys(s.first + piece, head, map);
        for (Index c = columns.begin; c < columns.end; c += s.kCols) {
          multiply_strip(s.weights(piece, head, map, 0) + c, s.kWeightStride, s.q(head, map), s.in.d, keys + c * s.in.d,
                         s.in.d, rows);
        }
      }
    }
  }

  template <typename Scalar, Index kMaps, typename Mask>
  void add_values(const FewRowsState<Scalar, kMaps, Mask>& s, Index piece, const KeyRange& heads) const {
    for (Index head = heads.begin; head < heads.end; ++head) {
      // A weight of 0 does not keep a NaN or Inf out: unless all is finite, a row touches only what it sees.
      const bool together = pages.finite_values(s.first + piece, head);
      for (Index row = 0; row < s.rows; row += together ? s.rows : 1) {
        const KeyRange seen = together ? s.columns_of_any(piece) : s.columns_of(piece, s.query(row));
        const Storage* values = pages.values(s.first + piece, head) + seen.begin * s.kCols;
        for (Index col = 0; col < s.width; col += s.kCols, values += kPageKeys * s.kCols) {
          multiply_strip(s.sums(piece, head, row) + col, s.width, s.weights(piece, head, 0, row) + seen.begin,
                         s.kWeightStride, values, seen.end - seen.begin, together ? s.rows : 1);
        }
      }
    }
  }
};

}  // namespace diffattn::inline v0_1::detail
