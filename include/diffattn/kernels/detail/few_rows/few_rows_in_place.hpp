#pragma once

// Keys and values of a few rows that stay where they are, heads side by side: read key by key, all heads of one, which
// is the order of memory. Packing would cost more than it saves.

#include <algorithm>

#include "diffattn/kernels/detail/few_rows/few_rows.hpp"
#include "diffattn/product/dot.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Operands>
struct InPlaceSource {
  using Scalar = typename Operands::Scalar;
  using Element = typename Operands::Element;
  static constexpr Index kMaps = Operands::kMaps;
  static constexpr Index kLanes = simd::kLanes<Scalar>;

  static Index heads_of_task(Index heads, Index /*maps*/) { return heads; }
  static Index room() { return 0; }

  /// Whether the rows of a key head are few enough, and keys and values contiguous.
  static bool suits(const Operands& in) {
    return in.n_q() * in.heads_per_kv_head() <= kFewRows && in.k[0].col_stride == 1 &&
           in.k[kMaps - 1].col_stride == 1 && in.v.col_stride == 1;
  }

  template <typename Mask>
  void score(const FewRowsState<Operands, Mask>& s, Index chunk, const KeyRange& heads) const {
    // Scores of a packet of keys are gathered where sums of values will be (those are at least as many), so that rows
    // of weights are written a packet at a time.
    Scalar* const tile = s.sums(chunk, heads.begin, 0);
    const KeyRange columns = s.columns_of_any(chunk);
    for (Index c = columns.begin; c < columns.end; c += kLanes) {
      const Index present = std::min(kLanes, columns.end - c);
      for (Index i = 0; i < present; ++i) {
        Scalar* to = tile + i;
        for (Index head = heads.begin; head < heads.end; ++head) {
          for (Index map = 0; map < kMaps; ++map) {
            const Element* const k = &s.in.keys(map, head)(s.first_key(chunk) + c + i, 0);
            const Index rows = s.rows_of(map);
            for (Index row = 0; row < rows; ++row, to += kLanes) {
              *to = dot<Scalar>(s.q(head, map) + row * s.in.d, k, s.in.d);
            }
            prefetch(k + s.in.k[map].row_stride, s.in.d);
          }
        }
      }
      const Scalar* from = tile;
      for (Index head = heads.begin; head < heads.end; ++head) {
        for (Index row = 0; row < s.all_rows; ++row, from += kLanes) {
          std::copy_n(from, present, s.weights(chunk, head, 0, row) + c);
        }
      }
    }
  }

  template <typename Mask>
  void add_values(const FewRowsState<Operands, Mask>& s, Index chunk, const KeyRange& heads) const {
    constexpr Index kKeys = 4;  // whose values are added together
    const KeyRange columns = s.columns_of_any(chunk);
    std::fill(s.sums(chunk, heads.begin, 0), s.sums(chunk, heads.end - 1, 0) + s.rows * s.width, Scalar(0));
    for (Index c = columns.begin; c < columns.end; c += kKeys) {
      for (Index head = heads.begin; head < heads.end; ++head) {
        for (Index row = 0; row < s.rows; ++row) {
          const Index query_head = s.query_head(head, row);
          const KeyRange seen = s.columns_of(chunk, s.query(row));
          const Index begin = std::max(c, seen.begin), end = std::min({c + kKeys, columns.end, seen.end});
          const Element* const v = &s.in.values(head)(s.first_key(chunk) + c, 0);
          Scalar* const sums = s.sums(chunk, head, row);
          const Scalar* const weights = s.weights(chunk, head, 0, row);
          if (!HasBias<Mask> && end - begin == kKeys) {
            add_rows<kKeys>(sums, weights + c, v, s.in.v.row_stride, s.in.dv);
            continue;
          }
          // A weight of 0 does not keep a NaN or Inf out: only what a row sees is touched.
          for (Index i = begin; i < end; ++i) {
            if (!bias_shows(s.mask, query_head, s.query(row), s.first_key(chunk) + i, s.n_q, s.n_k)) continue;
            add_rows<1>(sums, weights + i, v + (i - c) * s.in.v.row_stride, 0, s.in.dv);
          }
        }
      }
    }
  }

 private:
  /// Asks for the same head's next key: with heads side by side, one key of one head is too short a run of memory for
  /// the hardware to see where it goes on.
  static void prefetch(const Element* k, Index depth) {
    constexpr Index kLine = 64 / sizeof(Element);
    for (Index c = 0; c < depth; c += kLine) simd::prefetch(k + c);
  }

  /// to += Σ w_i · v_i over kKeys rows of v.
  template <Index kKeys>
  static void add_rows(Scalar* to, const Scalar* w, const Element* v, Index stride, Index width) {
    simd::Packet<Scalar> weights[kKeys];
    for (Index i = 0; i < kKeys; ++i) weights[i] = simd::broadcast(w[i]);
    Index c = 0;
    for (; c + kLanes <= width; c += kLanes) {
      auto sum = simd::load(to + c);
#pragma GCC unroll 4
      for (Index i = 0; i < kKeys; ++i) sum = simd::fma(weights[i], simd::load_as<Scalar>(v + i * stride + c), sum);
      simd::store(to + c, sum);
    }
    for (; c < width; ++c) {
      for (Index i = 0; i < kKeys; ++i) to[c] += w[i] * static_cast<Scalar>(v[i * stride + c]);
    }
  }
};

}  // namespace diffattn::inline v0_1::detail
