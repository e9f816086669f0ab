#pragma once

// What the two kernels share: a block of query rows of one head, taken group by group (kRows rows) against chunk by
// chunk of the packed keys. Scores of a group and a chunk are a kRows x kChunk tile that stays in the L1 cache.

#include <algorithm>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/detail/row_softmax.hpp"
#include "diffattn/kernels/detail/score_scale.hpp"
#include "diffattn/kernels/detail/visible_pairs.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/product/packed.hpp"
#include "diffattn/product/prefetched_rows.hpp"
#include "diffattn/product/register_tile.hpp"

namespace diffattn::inline v0_1::detail {

/// Where keys and values of one head, or of one page of it, are packed.
template <typename Scalar>
struct PackedPart {
  const Scalar* keys[2] = {nullptr, nullptr};  // one for each map; the same twice when the maps share their keys
  const Scalar* values = nullptr;
};

/// Keys and values of one head, packed once and read by every block of its query rows: in one piece, or in the pages of
/// a cache, each of page_keys keys, a multiple of a chunk.
template <typename Scalar>
struct PackedHead : PackedPart<Scalar> {
  const PackedPart<Scalar>* pages = nullptr;
  Index page_keys = 0;
  Index value_stride = 0;  // rows from a strip of values to the next: n_k, or page_keys
  Index n_k = 0;
  Index d = 0;
  Index dv = 0;
  bool finite_values = true;

  /// Whether blocks fetch the chunk that comes next. What a core's own caches hold the hardware brings as fast, and
  /// asking for it costs 1 or 2 %.
  bool fetch_ahead() const {
    constexpr Index kNearBytes = 2 << 20;
    const Index key_maps = this->keys[1] == nullptr || this->keys[1] == this->keys[0] ? 1 : 2;
    return pages != nullptr || n_k * (key_maps * d + dv) * static_cast<Index>(sizeof(Scalar)) > kNearBytes;
  }

  /// Keys and values of the chunk that begins at `first_key`.
  const Scalar* chunk_keys(Index map, Index first_key) const {
    if (pages == nullptr) return this->keys[map] + first_key * d;
    return pages[first_key / page_keys].keys[map] + first_key % page_keys * d;
  }
  const Scalar* chunk_values(Index first_key) const {
    if (pages == nullptr) return this->values + first_key * Tile<Scalar>::kCols;
    return pages[first_key / page_keys].values + first_key % page_keys * Tile<Scalar>::kCols;
  }
};

/// The columns of a chunk that hold every key which some row of a group sees: from the start of a strip to the end of a
/// packet.
template <typename Scalar>
KeyRange chunk_columns(const KeyRange& keys, Index first_key) {
  constexpr Index kCols = Tile<Scalar>::kCols, kLanes = Tile<Scalar>::kLanes;
  const Index begin = std::max<Index>(keys.begin - first_key, 0) / kCols * kCols;
  const Index end = std::min(round_up(std::max<Index>(keys.end - first_key, 0), kLanes), kChunk);
  return {begin, end};
}

/// What the products of one group and chunk fetch for later ones: their share of the chunk of keys or values that comes
/// next, all of which the groups of a block fetch together, and a piece of the panel.
template <typename Scalar>
struct ChunkAhead {
  const Scalar* chunk = nullptr;
  Index share = 0;
  Index shares = 1;
  const Scalar* panel = nullptr;
  Index panel_size = 0;

  /// The share of `size` values from `offset` on.
  Ahead<Scalar> of_chunk(Index offset, Index size) const {
    if (chunk == nullptr) return {};
    return {chunk + offset + size * share / shares, size / shares};
  }
  /// What the product at column `col` of `all`, in steps of kCols, fetches of the panel.
  Ahead<Scalar> of_panel(Index col, Index all) const {
    if (panel == nullptr) return {};
    return {panel + panel_size * col / all, panel_size * Tile<Scalar>::kCols / all};
  }
};

/// The rows of the result that a block will write and the queries of the block before it, which is likely to be next.
template <Index kMaps>
class RowsAhead {
 public:
  /// count: rows of the block before. steps: calls to come, or more.
  template <typename Scalar>
  RowsAhead(const StridedView<Scalar>& out, const StridedView<const Scalar> (&q)[kMaps], Index count, Index steps)
      : steps_(steps) {
    rows_[kMaps] = PrefetchedRows(out);
    for (Index map = 0; map < kMaps; ++map) rows_[map] = PrefetchedRows(q[map].middle_rows(-count, count));
  }

  /// Fetches a few of them; to be called between products.
  void fetch_some() {
    ++step_;
    for (PrefetchedRows& rows : rows_) rows.advance(step_, steps_);
  }

 private:
  PrefetchedRows rows_[kMaps + 1];
  Index steps_;
  Index step_ = 0;
};

/// Products of queries and keys become scores: -inf for what a row does not see, with a bias for what it does. scores:
/// rows kChunk apart.
template <typename Scalar, typename Mask>
void mask_scores(Scalar* scores, const RowRange<Mask>& rows, Index first_key, const KeyRange& columns,
                 const ScoreScale<Scalar>& scale) {
  for_each_row(rows, first_key, columns, [&](Index r, const KeyRange& seen) {
    Scalar* const row = scores + r * kChunk;
    fill_unseen(row, columns, seen, kMinusInfinity<Scalar>);
    if constexpr (HasBias<Mask>) {
      for (Index c = seen.begin; c < seen.end; ++c) {
        const auto bias = bias_of<Scalar>(rows.mask, rows.head, rows.first + r, first_key + c, rows.n_q, rows.n_k);
        row[c] = biased_score(row[c], scale, bias);
      }
    }
  });
}

/// 0 in the place of what a row does not see: 0 · (NaN − D) would not be 0.
template <typename Scalar, typename Mask>
void clear_hidden(Scalar* values, const RowRange<Mask>& rows, Index first_key, const KeyRange& columns) {
  for_each_row(rows, first_key, columns, [&](Index r, const KeyRange& seen) {
    Scalar* const row = values + r * kChunk;
    fill_unseen(row, columns, seen, Scalar(0));
    for (Index c = seen.begin; HasBias<Mask> && c < seen.end; ++c) {
      if (!bias_shows(rows.mask, rows.head, rows.first + r, first_key + c, rows.n_q, rows.n_k)) row[c] = Scalar(0);
    }
  });
}

/// scores(r, c) = q_r · k_(first_key + c) for the given columns, masked. q: one group, multiplied by scale.of_queries.
/// keys: those of the chunk.
template <typename Scalar, typename Mask>
void score_chunk(Scalar* scores, const LeftOperand<Scalar>& q, const Scalar* keys, Index d, const RowRange<Mask>& rows,
                 Index first_key, const KeyRange& columns, const ScoreScale<Scalar>& scale,
                 const ChunkAhead<Scalar>& ahead = {}) {
  constexpr Index kCols = Tile<Scalar>::kCols;
  for (Index c = columns.begin; c < columns.end; c += kCols) {
    add_product(scores + c, kChunk, false, q, keys + c * d, d, rows.count, columns.end - c,
                ahead.of_chunk(c * d, kCols * d), ahead.of_panel(c, kChunk), kScoreChain);
  }
  const KeyRange all = rows.keys_of_all();
  const bool edge = first_key + columns.begin < all.begin || first_key + columns.end > all.end;
  if (edge || HasBias<Mask>) mask_scores(scores, rows, first_key, columns, scale);
}

/// The same as add_weighted_values for values that are not all finite. A weight of 0 does not keep a NaN or Inf out, so
/// only what a row sees is touched.
template <typename Scalar, typename Mask>
void add_visible_values(Scalar* out, const Scalar* weights, const PackedHead<Scalar>& head, const RowRange<Mask>& rows,
                        Index first_key, const KeyRange& columns) {
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  for_each_visible(rows, first_key, columns, [&](Index r, Index k) {
    for (Index col = 0; col < head.dv; col += kCols) {
      const Scalar* const values = head.chunk_values(first_key) + col * head.value_stride + k * kCols;
      for (Index c = 0; c < kCols; ++c) out[col * kRows + r * kCols + c] += weights[r * kChunk + k] * values[c];
    }
  });
}

/// out += weights · V over the given columns. out: [strip of dv][kRows][kCols]; weights: rows kChunk apart.
template <typename Scalar, typename Mask>
void add_weighted_values(Scalar* out, const Scalar* weights, const PackedHead<Scalar>& head, const RowRange<Mask>& rows,
                         Index first_key, const KeyRange& columns, const ChunkAhead<Scalar>& ahead = {}) {
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  const Index end = std::min(columns.end, head.n_k - first_key);
  if (!head.finite_values) return add_visible_values(out, weights, head, rows, first_key, {columns.begin, end});
  const LeftOperand<Scalar> a{weights + columns.begin, kChunk, 1};
  for (Index col = 0; col < head.dv; col += kCols, out += kRows * kCols) {
    const Scalar* const values = head.chunk_values(first_key) + col * head.value_stride + columns.begin * kCols;
    add_product(out, kCols, true, a, values, end - columns.begin, rows.count, head.dv - col,
                ahead.of_chunk(col * head.value_stride, kChunk * kCols), ahead.of_panel(col, round_up(head.dv, kCols)));
  }
}

/// out(r, c) = sums(r, c) · factors[r]. sums: [strip of dv][kRows][kCols].
template <typename Scalar>
void write_rows(const StridedView<Scalar>& out, const Scalar* sums, const Scalar* factors) {
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols, kLanes = Tile<Scalar>::kLanes;
  const Index whole = out.col_stride == 1 ? out.cols / kCols * kCols : 0;  // columns of whole strips
  for (Index r = 0; r < out.rows; ++r, sums += kCols) {
    const auto factor = simd::broadcast(factors[r]);
    const Scalar* from = sums;
    Scalar* to = out.data + r * out.row_stride;
    for (Index col = 0; col < whole; col += kCols, from += kRows * kCols, to += kCols) {
#pragma GCC unroll 2
      for (Index c = 0; c < kCols; c += kLanes) simd::storeu(to + c, simd::mul(simd::load(from + c), factor));
    }
    for (Index col = whole; col < out.cols; col += kCols, from += kRows * kCols) {
      const Index present = std::min(kCols, out.cols - col);
      Index c = 0;
      for (; out.col_stride == 1 && c + kLanes <= present; c += kLanes) {
        simd::storeu(&out(r, col + c), simd::mul(simd::load(from + c), factor));
      }
      for (; c < present; ++c) out(r, col + c) = from[c] * factors[r];
    }
  }
}

/// The log-sum-exp of a group, in the log2 domain, to rows [first, …) of `lse`, if it is wanted.
template <typename Scalar>
void write_log_sum_exp(const StridedView<Scalar>& lse, Index first, Index count, Index head_index,
                       const RowSoftmax<Scalar>& softmax, const ScoreScale<Scalar>& scale) {
  if (lse.data == nullptr) return;
  for (Index r = 0; r < count; ++r) lse(first + r, head_index) = softmax.log_sum_exp(r, scale.of_exponent);
}

/// No data: not wanted.
template <typename Scalar>
void write_constant(const StridedView<Scalar>& to, Scalar value) {
  if (to.data == nullptr) return;
  for (Index r = 0; r < to.rows; ++r) {
    for (Index c = 0; c < to.cols; ++c) to(r, c) = value;
  }
}

}  // namespace diffattn::inline v0_1::detail
