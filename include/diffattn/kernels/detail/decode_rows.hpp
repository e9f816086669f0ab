#pragma once

// Attention of a few query rows against packed pages: decoding. Reading the cache is all the time there is, so each
// page of each head is read once and in the order of memory: its keys when scores are made, its values when they are
// summed with the weights of all rows. Packed strips need no sums across lanes.
//
// A task is one head of one page. It turns the scores of its keys into weights relative to its own maximum; once all
// are done, maxima and sums of the pages give each page its factor, and V meets the combined weights in a single pass.
// Pages are the same for any number of threads and their sums are added in order, so the result is too.

#include <algorithm>
#include <numbers>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/exp2.hpp"
#include "diffattn/kernels/detail/head_operands.hpp"
#include "diffattn/kernels/detail/packed_pages.hpp"
#include "diffattn/kernels/detail/row_softmax.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

/// to(r, c) = Σ_k a[r·a_stride + k] · strip[k·kCols + c] for kHeight rows. Sums are kept in chains enough to hide the
/// latency of an addition.
template <Index kHeight, typename Scalar, typename Storage>
void multiply_strip(Scalar* to, Index to_stride, const Scalar* a, Index a_stride, const Storage* strip, Index depth) {
  constexpr Index kLanes = Tile<Scalar>::kLanes, kPackets = Tile<Scalar>::kPackets, kCols = Tile<Scalar>::kCols;
  constexpr Index kChains = 4 / kHeight;
  simd::Packet<Scalar> sums[kChains][kHeight][kPackets];
  for (auto& chain : sums) {
    for (auto& row : chain) {
      for (auto& sum : row) sum = simd::broadcast(Scalar(0));
    }
  }
  const auto add = [&](auto& chain, Index k) {
    simd::Packet<Scalar> right[kPackets];
#pragma GCC unroll 2
    for (Index p = 0; p < kPackets; ++p) right[p] = simd::load_as<Scalar>(strip + k * kCols + p * kLanes);
#pragma GCC unroll 4
    for (Index r = 0; r < kHeight; ++r) {
      const auto left = simd::broadcast(a[r * a_stride + k]);
#pragma GCC unroll 2
      for (Index p = 0; p < kPackets; ++p) chain[r][p] = simd::fma(left, right[p], chain[r][p]);
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
    for (Index p = 0; p < kPackets; ++p) {
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

/// `in` describes queries, output, λ and heads; keys and values are those of `cache`.
template <typename Scalar, typename Storage, Index kMaps, typename Mask>
class DecodeRows {
  static constexpr Index kLanes = Tile<Scalar>::kLanes;
  static constexpr Index kCols = Tile<Scalar>::kCols;

 public:
  template <Executor E>
  static void run(const HeadOperands<Scalar, kMaps>& in, const PackedPages<Storage>& cache, const Mask& mask,
                  Workspace& workspace, E& executor) {
    const auto frame = workspace.frame();
    DecodeRows rows(in, cache, mask, workspace);
    const Index heads = in.heads.num_kv_heads, all_rows = heads * rows.rows_;
    for (Index head = 0; head < heads; ++head) rows.pack_queries(head);
    executor.run(rows.pages_ * heads, [&](Index task, Index) { rows.score(task / heads, task % heads); });
    executor.run(all_rows, [&](Index task, Index) { rows.set_factors(task / rows.rows_, task % rows.rows_); });
    executor.run(rows.pages_ * heads, [&](Index task, Index) { rows.add_values(task / heads, task % heads); });
    executor.run(all_rows, [&](Index task, Index) { rows.write(task / rows.rows_, task % rows.rows_); });
  }

 private:
  DecodeRows(const HeadOperands<Scalar, kMaps>& in, const PackedPages<Storage>& cache, const Mask& mask,
             Workspace& workspace)
      : in_(in),
        cache_(cache),
        mask_(mask),
        n_q_(in.q[0].rows),
        rows_(n_q_ * (in.heads.num_heads / in.heads.num_kv_heads)),
        width_(round_up(in.dv, kCols)) {
    first_page_ = visible(0).begin / kPageKeys;
    pages_ = std::max<Index>(divide_up(visible(n_q_ - 1).end, kPageKeys) - first_page_, 0);
    const Index slots = pages_ * in.heads.num_kv_heads;
    q_ = workspace.take<Scalar>(in.heads.num_kv_heads * kMaps * rows_ * in.d);
    weights_ = workspace.take<Scalar>(slots * kMaps * rows_ * kPageKeys);
    max_ = workspace.take<Scalar>(slots * kMaps * rows_);
    sum_ = workspace.take<Scalar>(slots * kMaps * rows_);
    partial_ = workspace.take<Scalar>(slots * rows_ * width_);
  }

  // Rows are those that share a key head: a query of a query head, numbered head by head.
  Index query(Index row) const { return row % n_q_; }
  Index query_head(Index head, Index row) const { return head * (rows_ / n_q_) + row / n_q_; }
  Scalar* q(Index head, Index map) const { return q_ + (head * kMaps + map) * rows_ * in_.d; }
  Index slot(Index page, Index head) const { return page * in_.heads.num_kv_heads + head; }
  Index at(Index page, Index head, Index map, Index row) const {
    return (slot(page, head) * kMaps + map) * rows_ + row;
  }
  Scalar* weights(Index page, Index head, Index map, Index row) const {
    return weights_ + at(page, head, map, row) * kPageKeys;
  }
  Scalar* partial(Index page, Index head, Index row) const {
    return partial_ + (slot(page, head) * rows_ + row) * width_;
  }

  KeyRange visible(Index query) const { return mask_.visible_keys(query, n_q_, cache_.n_k); }
  /// Columns of a page that a query sees.
  KeyRange columns_of(Index page, Index query) const {
    const KeyRange keys = visible(query);
    const Index first = (first_page_ + page) * kPageKeys;
    const Index begin = std::clamp<Index>(keys.begin - first, 0, kPageKeys);
    return {begin, std::clamp(keys.end - first, begin, kPageKeys)};
  }
  /// Columns that some query sees: neither end of a mask's ranges decreases from query to query.
  KeyRange columns_of_any(Index page) const { return {columns_of(page, 0).begin, columns_of(page, n_q_ - 1).end}; }
  /// Widened to whole strips.
  KeyRange strips_of_any(Index page) const {
    const KeyRange columns = columns_of_any(page);
    return {columns.begin / kCols * kCols, round_up(columns.end, kCols)};
  }

  void pack_queries(Index head) {
    const Scalar factor = in_.scale * std::numbers::log2e_v<Scalar>;
    for (Index map = 0; map < kMaps; ++map) {
      for (Index row = 0; row < rows_; ++row) {
        const auto from = in_.q[map].block(query(row), query_head(head, row) * in_.q_step, 1, in_.d);
        Scalar* const to = q(head, map) + row * in_.d;
        for (Index c = 0; c < in_.d; ++c) to[c] = from(0, c) * factor;
      }
    }
  }

  void score(Index page, Index head) {
    const KeyRange columns = strips_of_any(page);
    const Index key_maps = cache_.shape.key_maps;
    for (Index key_map = 0; key_map < key_maps; ++key_map) {
      const Storage* const keys = cache_.keys(first_page_ + page, head, key_map);
      // Maps that share their keys meet each strip together.
      const Index rows = key_maps == kMaps ? rows_ : kMaps * rows_;
      for (Index c = columns.begin; c < columns.end; c += kCols) {
        multiply_strip(weights(page, head, key_map, 0) + c, kPageKeys, q(head, key_map), in_.d, keys + c * in_.d, in_.d,
                       rows);
      }
    }
    for (Index map = 0; map < kMaps; ++map) {
      for (Index row = 0; row < rows_; ++row) {
        Scalar* const scores = weights(page, head, map, row);
        const KeyRange seen = columns_of(page, query(row));
        std::fill(scores + columns.begin, scores + std::max(seen.begin, columns.begin), kMinusInfinity<Scalar>);
        std::fill(scores + std::max(seen.end, columns.begin), scores + columns.end, kMinusInfinity<Scalar>);
        exponentiate(scores, columns, max_[at(page, head, map, row)], sum_[at(page, head, map, row)]);
      }
    }
  }

  /// exp2(score − max) in place.
  static void exponentiate(Scalar* scores, const KeyRange& columns, Scalar& max, Scalar& sum) {
    auto packet_max = simd::broadcast(kMinusInfinity<Scalar>);
    for (Index c = columns.begin; c < columns.end; c += kLanes) {
      packet_max = simd::max(packet_max, simd::load(scores + c));
    }
    max = simd::reduce_max(packet_max);
    const auto base = simd::broadcast(finite_or_zero(max));
    auto packet_sum = simd::broadcast(Scalar(0));
    for (Index c = columns.begin; c < columns.end; c += kLanes) {
      const auto weight = exp2_nonpositive<Scalar>(simd::sub(simd::load(scores + c), base));
      simd::store(scores + c, weight);
      packet_sum = simd::add(packet_sum, weight);
    }
    sum = simd::reduce_add(packet_sum);
  }

  /// What turns the weights of each page into probabilities, exp2(m_page − m)/l and −λ times it for the second map,
  /// takes the place of the page's maximum.
  void set_factors(Index head, Index row) {
    for (Index map = 0; map < kMaps; ++map) {
      Scalar max = kMinusInfinity<Scalar>, sum = 0;
      for (Index page = 0; page < pages_; ++page) max = std::max(max, max_[at(page, head, map, row)]);
      const Scalar base = finite_or_zero(max);
      for (Index page = 0; page < pages_; ++page) {
        Scalar& page_max = max_[at(page, head, map, row)];
        page_max = simd::first(exp2_nonpositive<Scalar>(simd::broadcast(page_max - base)));
        sum += page_max * sum_[at(page, head, map, row)];
      }
      const Scalar sign = map == 0 ? Scalar(1) : -in_.lambda(query(row), query_head(head, row));
      for (Index page = 0; page < pages_; ++page) {
        max_[at(page, head, map, row)] *= sum == Scalar(0) ? Scalar(0) : sign / sum;
      }
    }
  }

  void add_values(Index page, Index head) {
    const KeyRange columns = strips_of_any(page);
    for (Index row = 0; row < rows_; ++row) {
      Scalar* const p1 = weights(page, head, 0, row);
      const Scalar* const p2 = weights(page, head, kMaps - 1, row);
      const auto f1 = simd::broadcast(max_[at(page, head, 0, row)]);
      const auto f2 = simd::broadcast(kMaps == 1 ? Scalar(0) : max_[at(page, head, kMaps - 1, row)]);
      for (Index c = columns.begin; c < columns.end; c += kLanes) {
        auto weight = simd::mul(simd::load(p1 + c), f1);
        if constexpr (kMaps == 2) weight = simd::fma(simd::load(p2 + c), f2, weight);
        simd::store(p1 + c, weight);
      }
    }

    const Storage* values = cache_.values(first_page_ + page, head);
    if (!cache_.finite_values(first_page_ + page, head)) return add_visible_values(page, head, values);
    const KeyRange seen = columns_of_any(page);
    for (Index col = 0; col < width_; col += kCols, values += kPageKeys * kCols) {
      multiply_strip(partial(page, head, 0) + col, width_, weights(page, head, 0, 0) + seen.begin, kPageKeys,
                     values + seen.begin * kCols, seen.end - seen.begin, rows_);
    }
  }

  /// The same for values that are not all finite: a weight of 0 does not keep a NaN or Inf out, so only what a row sees
  /// is touched.
  void add_visible_values(Index page, Index head, const Storage* values) {
    for (Index col = 0; col < width_; col += kCols, values += kPageKeys * kCols) {
      for (Index row = 0; row < rows_; ++row) {
        const KeyRange seen = columns_of(page, query(row));
        multiply_strip<1>(partial(page, head, row) + col, width_, weights(page, head, 0, row) + seen.begin, kPageKeys,
                          values + seen.begin * kCols, seen.end - seen.begin);
      }
    }
  }

  void write(Index head, Index row) {
    const auto out = in_.out.block(query(row), query_head(head, row) * in_.dv, 1, in_.dv);
    for (Index c = 0; c < in_.dv; ++c) {
      Scalar sum = 0;
      for (Index page = 0; page < pages_; ++page) sum += partial(page, head, row)[c];
      out(0, c) = sum;
    }
  }

  const HeadOperands<Scalar, kMaps>& in_;
  const PackedPages<Storage>& cache_;
  const Mask& mask_;
  Index n_q_;
  Index rows_;   // that share a key head
  Index width_;  // of a row of sums, whole strips
  Index first_page_ = 0;
  Index pages_ = 0;
  Scalar* q_;        // [head][map][row][d], scaled by s·log2(e)
  Scalar* weights_;  // [page][head][map][row][kPageKeys]
  Scalar* max_;      // [page][head][map][row]
  Scalar* sum_;      // [page][head][map][row]
  Scalar* partial_;  // [page][head][row][width]
};

}  // namespace diffattn::inline v0_1::detail
