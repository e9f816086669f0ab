#pragma once

// What StandardBlock and DifferentialBlock share: a block of query rows of one head, taken group by group against chunk
// by chunk of the packed keys. Scores of a group and a chunk are a kRows x kChunk tile that stays in the L1 cache. Both
// are called alike: block.run(operands, packed head, rows, heads, scale) computes `rows` of the result, of `heads`
// query heads from rows.head on, which share their second map.

#include <algorithm>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/detail/forward/packed_heads.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/detail/scores.hpp"
#include "diffattn/kernels/detail/softmax.hpp"
#include "diffattn/kernels/detail/visible_pairs.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/product/prefetched_rows.hpp"
#include "diffattn/product/register_tile.hpp"

namespace diffattn::inline v0_1::detail {

/// A chunk of keys as a block meets it.
struct BlockChunk {
  Index first_key;
  Index number;  // among those that the block sees
  bool last;
};

/// Calls f(chunk) for every chunk that holds some of `keys`, in order.
template <typename F>
void for_each_chunk(const KeyRange& keys, F&& f) {
  const Index begin = keys.begin / kChunk * kChunk;
  for (Index first_key = begin; first_key < keys.end; first_key += kChunk) {
    f(BlockChunk{first_key, (first_key - begin) / kChunk, first_key + kChunk >= keys.end});
  }
}

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
  /// steps: calls to come for each chunk.
  template <typename Scalar, typename Mask>
  RowsAhead(const HeadOperands<Scalar, kMaps>& in, const RowRange<Mask>& rows, Index steps) {
    const Index before = std::min(rows.first, kBlockRows);
    rows_[kMaps] = PrefetchedRows(in.result(rows.head).middle_rows(rows.first, rows.count));
    for (Index map = 0; map < kMaps; ++map) {
      rows_[map] = PrefetchedRows(in.queries(map, rows.head).middle_rows(rows.first - before, before));
    }
    const KeyRange keys = rows.keys_of_any();
    steps_ = steps * divide_up(keys.end - keys.begin / kChunk * kChunk, kChunk);
  }

  /// Fetches a few of them; to be called between products.
  void fetch_some() {
    ++step_;
    for (PrefetchedRows& rows : rows_) rows.advance(step_, steps_);
  }

 private:
  PrefetchedRows rows_[kMaps + 1];
  Index steps_ = 0;
  Index step_ = 0;
};

/// scores(r, c) = q_r · k_(first_key + c) for the given columns, masked. q: one group, multiplied by scale.of_queries.
/// keys: those of the chunk. biases: as finish_scores has them.
template <typename Scalar, typename Mask>
void score_chunk(Scalar* scores, const LeftOperand<Scalar>& q, const Scalar* keys, Index d, const RowRange<Mask>& rows,
                 Index first_key, const KeyRange& columns, const ScoreScale<Scalar>& scale,
                 const ChunkAhead<Scalar>& ahead = {}, const Scalar* biases = nullptr) {
  constexpr Index kCols = Tile<Scalar>::kCols;
  for (Index c = columns.begin; c < columns.end; c += kCols) {
    add_product(scores + c, kChunk, false, q, keys + c * d, d, rows.count, columns.end - c,
                ahead.of_chunk(c * d, kCols * d), ahead.of_panel(c, kChunk), kScoreChain);
  }
  finish_scores(scores, kChunk, rows, first_key, columns, scale, biases);
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

/// factors[r] = 1 / l, for the rows of a group.
template <typename Scalar, typename Mask>
void set_normalisers(Scalar* factors, const RowStatistics<Scalar>& statistics, const RowRange<Mask>& rows,
                     const RowSoftmax<Scalar>& softmax, const ScoreScale<Scalar>& scale) {
  for (Index r = 0; r < rows.count; ++r) {
    factors[r] = normaliser(statistics.total(rows.first + r, rows.head, softmax.base_and_sum(r), scale));
  }
}

/// Writes `value` everywhere, unless the view has no data.
template <typename Scalar>
void write_constant(const StridedView<Scalar>& to, Scalar value) {
  if (to.data == nullptr) return;
  for (Index r = 0; r < to.rows; ++r) {
    for (Index c = 0; c < to.cols; ++c) to(r, c) = value;
  }
}

}  // namespace diffattn::inline v0_1::detail
