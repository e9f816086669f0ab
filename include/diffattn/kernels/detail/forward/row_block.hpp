#pragma once

// What StandardBlock and DifferentialBlock share: a block of query rows of one head, taken group by group against chunk
// by chunk of the packed keys. Scores of a group and a chunk are a kRows x kChunk tile that stays in the L1 cache. Both
// are called alike: block.run(operands, packed head, rows, heads, scale) computes `rows` of the result, of `heads`
// query heads from rows.head on, which share their second map.

#include <algorithm>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/detail/arithmetic.hpp"
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
template <typename Packed, typename Scalar = SumOf<Packed>>
struct ChunkAhead {
  const Packed* chunk = nullptr;
  Index share = 0;
  Index shares = 1;
  const Scalar* panel = nullptr;
  Index panel_size = 0;

  /// The share of `size` values from `offset` on.
  Ahead<Scalar> of_chunk(Index offset, Index size) const {
    if (chunk == nullptr) return {};
    static_assert(sizeof(Packed) == sizeof(Scalar));
    return {reinterpret_cast<const Scalar*>(chunk + offset + size * share / shares), size / shares};
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
  template <typename Operands, typename Mask>
  RowsAhead(const Operands& in, const RowRange<Mask>& rows, Index steps) {
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

/// Queries of a block as tiles read them, multiplied by a factor that is a power of two, or changes little in bfloat16.
template <typename Packed, typename Element, typename Scalar>
void copy_queries(Packed* to, const StridedView<const Element>& rows, Scalar factor) {
  if constexpr (kStepDepth<Packed> == 1) {
    copy_rows(to, rows, factor);
  } else {
    copy_rows(to, rows);
    scale_pairs(to, rows.rows * steps_of<Packed>(rows.cols), factor);
  }
}

/// Group g of them.
template <typename Packed>
LeftOperand<Packed> query_group(const Packed* q, Index g, Index d) {
  const Index steps = steps_of<Packed>(d);
  return {q + g * Tile<SumOf<Packed>>::kRows * steps, steps, 1};
}

/// The weights of a group in the type that meets values: `weights` themselves, rows kChunk apart, or rounded, in
/// `rounded`.
template <typename Element, typename Packed, typename Scalar>
const Packed* weights_of_values(Packed* rounded, const Scalar* weights, Index rows, const KeyRange& columns) {
  if constexpr (is_narrow<Element>) {
    for (Index r = 0; r < rows; ++r) {
      round_weights(rounded + r * steps_of<Packed>(kChunk), weights + r * kChunk, columns.begin, columns.end);
    }
    return rounded;
  } else {
    return weights;
  }
}

/// scores(r, c) = q_r · k_(first_key + c) for the given columns, masked. q: one group, multiplied by scale.of_queries.
/// keys: those of the chunk. biases: as finish_scores has them.
template <typename Scalar, typename Packed, typename Mask>
void score_chunk(Scalar* scores, const LeftOperand<Packed>& q, const Packed* keys, Index d, const RowRange<Mask>& rows,
                 Index first_key, const KeyRange& columns, const ScoreScale<Scalar>& scale,
                 const ChunkAhead<Packed>& ahead = {}, const Scalar* biases = nullptr) {
  constexpr Index kCols = Tile<Scalar>::kCols;
  const Index depth = steps_of<Packed>(d);
  for (Index c = columns.begin; c < columns.end; c += kCols) {
    add_product(scores + c, kChunk, false, q, keys + c * depth, depth, rows.count, columns.end - c,
                ahead.of_chunk(c * depth, kCols * depth), ahead.of_panel(c, kChunk), steps_of<Packed>(kScoreChain));
  }
  finish_scores(scores, kChunk, rows, first_key, columns, scale, biases);
}

/// The same as add_weighted_values for values that are not all finite. A weight of 0 does not keep a NaN or Inf out, so
/// only what a row sees is touched.
template <typename Scalar, typename Packed, typename Mask>
void add_visible_values(Scalar* out, const Packed* weights, const PackedHead<Packed>& head, const RowRange<Mask>& rows,
                        Index first_key, const KeyRange& columns) {
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  for_each_visible(rows, first_key, columns, [&](Index r, Index k) {
    const Scalar weight = at_depth(weights + r * steps_of<Packed>(kChunk), 1, k);
    for (Index col = 0; col < head.dv; col += kCols) {
      const Packed* const values = head.chunk_values(first_key) + col * head.value_stride;
      for (Index c = 0; c < kCols; ++c) out[col * kRows + r * kCols + c] += weight * at_depth(values + c, kCols, k);
    }
  });
}

/// out += weights · V over the given columns. out: [strip of dv][kRows][kCols]; weights: rows of a chunk's steps; where
/// a step is two keys, the weight beside the last is 0, or that of a key that is not there.
template <typename Scalar, typename Packed, typename Mask>
void add_weighted_values(Scalar* out, const Packed* weights, const PackedHead<Packed>& head, const RowRange<Mask>& rows,
                         Index first_key, const KeyRange& columns, const ChunkAhead<Packed>& ahead = {}) {
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols, kSteps = steps_of<Packed>(kChunk);
  const Index end = std::min(columns.end, head.n_k - first_key), begin = steps_of<Packed>(columns.begin);
  if (!head.finite_values) return add_visible_values(out, weights, head, rows, first_key, {columns.begin, end});
  const LeftOperand<Packed> a{weights + begin, kSteps, 1};
  for (Index col = 0; col < head.dv; col += kCols, out += kRows * kCols) {
    const Packed* const values = head.chunk_values(first_key) + col * head.value_stride + begin * kCols;
    add_product(out, kCols, true, a, values, steps_of<Packed>(end) - begin, rows.count, head.dv - col,
                ahead.of_chunk(col * head.value_stride, kSteps * kCols), ahead.of_panel(col, round_up(head.dv, kCols)));
  }
}

/// out(r, c) = sums(r, c) · factors[r]. sums: [strip of dv][kRows][kCols].
template <typename Result, typename Scalar>
void write_rows(const StridedView<Result>& out, const Scalar* sums, const Scalar* factors) {
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols, kLanes = Tile<Scalar>::kLanes;
  const Index whole = out.col_stride == 1 ? out.cols / kCols * kCols : 0;  // columns of whole strips
  for (Index r = 0; r < out.rows; ++r, sums += kCols) {
    const auto factor = simd::broadcast(factors[r]);
    const Scalar* from = sums;
    Result* to = out.data + r * out.row_stride;
    for (Index col = 0; col < whole; col += kCols, from += kRows * kCols, to += kCols) {
#pragma GCC unroll 2
      for (Index c = 0; c < kCols; c += kLanes) simd::store_as(to + c, simd::mul(simd::load(from + c), factor));
    }
    for (Index col = whole; col < out.cols; col += kCols, from += kRows * kCols) {
      const Index present = std::min(kCols, out.cols - col);
      Index c = 0;
      for (; out.col_stride == 1 && c + kLanes <= present; c += kLanes) {
        simd::store_as(&out(r, col + c), simd::mul(simd::load(from + c), factor));
      }
      for (; c < present; ++c) out(r, col + c) = static_cast<Result>(from[c] * factors[r]);
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
