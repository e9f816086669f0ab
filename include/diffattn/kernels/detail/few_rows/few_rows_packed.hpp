#pragma once

// Keys and values of a few rows that are packed in pages: a strip of keys is multiplied by all rows that share them
// with no sums across lanes, and so is a strip of values. Strips far apart are read side by side, since one stream does
// not use all of the bandwidth that a core has: hardware looks ahead in each, up to the end of a page of memory.

#include <algorithm>
#include <array>
#include <cstddef>
#include <type_traits>

#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/detail/few_rows/few_rows.hpp"
#include "diffattn/kernels/key_value_pages.hpp"

namespace diffattn::inline v0_1::detail {

/// A strip in one piece, with row k, or the row of pairs that it is in.
template <typename Stored, Index kCols>
struct WholeStrip {
  static constexpr bool kWhole = true;
  static constexpr bool kPairs = kStepDepth<Stored> == 2;
  const Stored* data;
  Index first = 0;  // of row 0 in its row of pairs

  const Stored* row(Index k) const { return data + (kPairs ? (first + k) / 2 : k) * kCols; }
  /// Which of a pair row k is.
  Index in_pair(Index k) const { return kPairs ? (first + k) % 2 : 0; }
};

/// A strip of values that lies in several pages: its row k is that of key `first` + k, counted from the pages' origin.
template <typename Storage, Index kCols>
struct PagedStrip {
  static constexpr bool kWhole = false;
  static constexpr bool kPairs = kStepDepth<StoredAs<Storage>> == 2;
  const KeyValuePages<Storage>* pages;
  Index head;
  Index first;
  Index column;  // of the values, the first of the strip

  /// Row k, which others follow until end_of_piece(k).
  const auto* row(Index k) const { return pages->value_row(first + k, head) + column * pages->value_stride(); }
  Index in_pair(Index k) const { return kPairs ? pages->row_of(first + k) % 2 : 0; }
  Index end_of_piece(Index k) const { return k + pages->shape.page_size - pages->row_of(first + k); }
};

/// A strip of keys or values, the rows that meet it, and where the products go.
template <typename Scalar, typename Strip>
struct StripProduct {
  Scalar* to;
  const Scalar* a;
  Strip strip;
};

/// Calls f(k, count, second) for rows [first, end) of strips: one at a time, or the two of a pair, or one whose pair has
/// the other outside, which then is the second of it or not. in_pair: which of its pair `first` is.
template <bool kPairs, typename F>
EIGEN_ALWAYS_INLINE void for_each_rows(Index first, Index end, [[maybe_unused]] Index in_pair, const F& f) {
  if constexpr (kPairs) {
    if (first < end && in_pair != 0) {
      f(first, 1, true);
      ++first;
    }
    for (; first + 2 <= end; first += 2) f(first, 2, false);
  }
  for (; first < end; ++first) f(first, 1, false);
}

/// Rows of sums → `to`, or added to it.
template <Index kHeight, typename Scalar>
EIGEN_ALWAYS_INLINE void store_sums(Scalar* to, Index to_stride, bool add,
                                    const simd::Packet<Scalar> (&sums)[kHeight][2]) {
#pragma GCC unroll 4
  for (Index r = 0; r < kHeight; ++r) {
    for (Index p = 0; p < 2; ++p) {
      Scalar* const at = to + r * to_stride + p * simd::kLanes<Scalar>;
      simd::store(at, add ? simd::add(simd::load(at), sums[r][p]) : sums[r][p]);
    }
  }
}

/// to(r, c) = Σ_k a[r·a_stride + k] · strip.row(k)[c] for kHeight rows of each product, all at once.
template <Index kHeight, std::size_t kCount, typename Scalar, typename Strip>
void multiply_strips(const std::array<StripProduct<Scalar, Strip>, kCount>& products, Index to_stride, Index a_stride,
                     Index depth) {
  constexpr Index kLanes = Tile<Scalar>::kLanes, kCols = Tile<Scalar>::kCols;
  simd::Packet<Scalar> sums[kCount][kHeight][2];
  for (Index begin = 0; begin == 0 || begin < depth; begin += kScoreChain) {
    for (auto& product : sums) {
      for (auto& row : product) row[0] = row[1] = simd::broadcast(Scalar(0));
    }
    const auto add_row = [&](std::size_t i, Index k, const simd::Packet<Scalar>(&right)[2]) {
#pragma GCC unroll 4
      for (Index r = 0; r < kHeight; ++r) {
        const auto left = simd::broadcast(products[i].a[r * a_stride + k]);
        sums[i][r][0] = simd::fma(left, right[0], sums[i][r][0]);
        sums[i][r][1] = simd::fma(left, right[1], sums[i][r][1]);
      }
    };
    const auto add_rows = [&](Index k, Index count, bool second, const auto& row_of) {
#pragma GCC unroll 4
      for (std::size_t i = 0; i < kCount; ++i) {
        const auto* const strip = row_of(i, k);
        if constexpr (Strip::kPairs) {
          const auto left = simd::widen_pairs<Scalar>(strip), right = simd::widen_pairs<Scalar>(strip + kLanes);
          if (!second) add_row(i, k, {left.first, right.first});
          if (second || count == 2) add_row(i, k + count - 1, {left.second, right.second});
        } else {
          add_row(i, k, {simd::load_as<Scalar>(strip), simd::load_as<Scalar>(strip + kLanes)});
        }
      }
    };
    const auto add = [&](Index first, Index end, const auto& row_of) {
      for_each_rows<Strip::kPairs>(first, end, products[0].strip.in_pair(first),
                                   [&](Index k, Index count, bool second) { add_rows(k, count, second, row_of); });
    };
    const Index end = std::min(begin + kScoreChain, depth);
    if constexpr (Strip::kWhole) {
      add(begin, end, [&](std::size_t i, Index k) { return products[i].strip.row(k); });
    } else {
      for (Index first = begin, piece_end = begin; first < end; first = piece_end) {
        piece_end = std::min(end, products[0].strip.end_of_piece(first));  // all strips end where the first does
        decltype(products[0].strip.row(0)) rows[kCount];
        for (std::size_t i = 0; i < kCount; ++i) rows[i] = products[i].strip.row(first);
        const Index in_pair = products[0].strip.in_pair(first);
        add(first, piece_end, [&](std::size_t i, Index k) {
          return rows[i] + (Strip::kPairs ? (in_pair + k - first) / 2 : k - first) * kCols;
        });
      }
    }
#pragma GCC unroll 4
    for (std::size_t i = 0; i < kCount; ++i) store_sums<kHeight>(products[i].to, to_stride, begin != 0, sums[i]);
  }
}

/// The same for any number of rows, as many products together as the registers hold sums of.
template <std::size_t kCount, typename Scalar, typename Strip>
void multiply_strips(const std::array<StripProduct<Scalar, Strip>, kCount>& products, Index to_stride, Index a_stride,
                     Index depth, Index rows) {
  Index row = 0;
  const auto take = [&]<Index kHeight>(std::integral_constant<Index, kHeight>) {
    constexpr std::size_t kTogether = std::min<std::size_t>(kCount, std::max(simd::kRegisters / 4 / kHeight, Index(1)));
    for (std::size_t first = 0; first < kCount; first += kTogether) {
      std::array<StripProduct<Scalar, Strip>, kTogether> some;
      for (std::size_t i = 0; i < kTogether; ++i) {
        const auto& [to, a, strip] = products[first + i];
        some[i] = {to + row * to_stride, a + row * a_stride, strip};
      }
      multiply_strips<kHeight>(some, to_stride, a_stride, depth);
    }
    row += kHeight;
  };
  while (rows - row >= 4) take(std::integral_constant<Index, 4>{});
  if (rows - row >= 2) take(std::integral_constant<Index, 2>{});
  if (rows - row >= 1) take(std::integral_constant<Index, 1>{});
}

/// The products at(0 … count − 1), whose strips follow each other in memory: kStreams of them in as many places.
template <typename At>
void multiply_streams(Index count, Index to_stride, Index a_stride, Index depth, Index rows, const At& at) {
  static_assert(kStreams == 4);
  const Index length = count / kStreams;
  for (Index i = 0; i < length; ++i) {
    const std::array products = {at(i), at(length + i), at(2 * length + i), at(3 * length + i)};
    multiply_strips(products, to_stride, a_stride, depth, rows);
  }
  for (Index i = kStreams * length; i < count; ++i) {
    multiply_strips(std::array{at(i)}, to_stride, a_stride, depth, rows);
  }
}

/// Keys and values in the pages of a cache.
template <typename Storage>
struct PackedSource {
  const KeyValuePages<Storage>& pages;

  /// As many heads as make kStreams streams, each map of each head being one.
  static Index heads_of_task(Index /*heads*/, Index maps) { return kStreams / maps; }
  /// Keys that scratch is taken for, where there are fewer.
  Index room() const { return pages.room(kChunk); }

  template <typename Operands, typename Mask>
  void score(const FewRowsState<Operands, Mask>& s, Index chunk, const KeyRange& heads) const {
    using Scalar = typename Operands::Scalar;
    constexpr Index kMaps = Operands::kMaps;
    using Strip = WholeStrip<StoredAs<Storage>, FewRowsState<Operands, Mask>::kCols>;
    const KeyRange columns = s.strips_of_any(chunk);
    const Index strips = (columns.end - columns.begin) / s.kCols, maps = pages.shape.key_maps;
    const auto multiply = [&](Index first_map, Index count_maps, Index rows) {
      const Index count = (heads.end - heads.begin) * count_maps * strips;
      multiply_streams(count, s.kWeightStride, s.in.d, s.in.d, rows, [&](Index i) {
        const Index head = heads.begin + i / strips / count_maps, map = first_map + i / strips % count_maps;
        const Index column = columns.begin + i % strips * s.kCols;
        return StripProduct<Scalar, Strip>{s.weights(chunk, head, map, 0) + column,
                                           s.q(head, map),
                                           {pages.key_strip(s.first_key(chunk) + column, head, map)}};
      });
    };
    // Maps that share their keys meet each strip together; maps of another number of rows each by themselves.
    if (maps == 1) return multiply(0, 1, s.all_rows);
    if (s.rows_of(kMaps - 1) == s.rows) return multiply(0, kMaps, s.rows);
    for (Index map = 0; map < kMaps; ++map) multiply(map, 1, s.rows_of(map));
  }

  template <typename Operands, typename Mask>
  void add_values(const FewRowsState<Operands, Mask>& s, Index chunk, const KeyRange& heads) const {
    constexpr Index kCols = FewRowsState<Operands, Mask>::kCols;
    const bool in_one_page = pages.shape.page_size >= kChunk;
    const auto add = [&](Index row, Index rows, const KeyRange& seen) {
      if (in_one_page) {
        using Strip = WholeStrip<StoredAs<Storage>, kCols>;
        constexpr Index kDepth = kStepDepth<StoredAs<Storage>>;
        multiply_values<Strip>(s, chunk, heads, row, rows, seen, [&](Index head, Index column) {
          const auto* const values = pages.value_row(s.first_key(chunk), head) + column * pages.value_stride();
          return Strip{values + seen.begin / kDepth * kCols, seen.begin % kDepth};
        });
      } else {
        using Strip = PagedStrip<Storage, kCols>;
        multiply_values<Strip>(s, chunk, heads, row, rows, seen, [&](Index head, Index column) {
          return Strip{&pages, head, s.first_key(chunk) + seen.begin, column};
        });
      }
    };
    bool finite = true;
    for (Index head = heads.begin; head < heads.end; ++head) {
      finite &= pages.finite_values_of(s.first_key(chunk), kChunk, head);
    }
    if (finite) return add(0, s.rows, s.columns_of_any(chunk));
    // A weight of 0 does not keep a NaN or Inf out: a row touches only what it sees.
    if constexpr (HasBias<Mask>) {
      for (Index head = heads.begin; head < heads.end; ++head) add_visible_values(s, chunk, head);
    } else {
      for (Index row = 0; row < s.rows; ++row) add(row, 1, s.columns_of(chunk, s.query(row)));
    }
  }

 private:
  /// Adds the values that some rows of each head see, the strip of each from strip_of(head, column).
  template <typename Strip, typename Operands, typename Mask, typename StripOf>
  static void multiply_values(const FewRowsState<Operands, Mask>& s, Index chunk, const KeyRange& heads, Index row,
                              Index rows, const KeyRange& seen, const StripOf& strip_of) {
    using Scalar = typename Operands::Scalar;
    const Index strips = s.width / s.kCols, count = (heads.end - heads.begin) * strips;
    multiply_streams(count, s.width, s.kWeightStride, seen.end - seen.begin, rows, [&](Index i) {
      const Index head = heads.begin + i / strips, column = i % strips * s.kCols;
      return StripProduct<Scalar, Strip>{s.sums(chunk, head, row) + column, s.weights(chunk, head, 0, row) + seen.begin,
                                         strip_of(head, column)};
    });
  }

  /// The sums of one head, pair by pair: a bias may hide any key.
  template <typename Operands, typename Mask>
  void add_visible_values(const FewRowsState<Operands, Mask>& s, Index chunk, Index head) const {
    using Scalar = typename Operands::Scalar;
    std::fill_n(s.sums(chunk, head, 0), s.rows * s.width, Scalar(0));
    for (Index first = 0; first < s.rows; first += s.n_q) {
      for_each_visible(s.queries_of(s.query_head(head, first)), s.first_key(chunk), {0, kChunk}, [&](Index r, Index c) {
        const Scalar weight = s.weights(chunk, head, 0, first + r)[c];
        Scalar* const sums = s.sums(chunk, head, first + r);
        const Index key = s.first_key(chunk) + c;
        const auto* const values = pages.value_row(key, head);
        for (Index col = 0; col < s.width; ++col) {
          const auto* const value = values + col / s.kCols * pages.value_stride() * s.kCols + col % s.kCols;
          sums[col] += weight * static_cast<Scalar>(at_depth(value, 0, pages.row_of(key) % 2));
        }
      });
    }
  }
};

}  // namespace diffattn::inline v0_1::detail
