#pragma once

// The steps of a block of the backward pass (backward_block.hpp has the formulas): dA = g Vᵀ of a group of rows and a
// chunk, from it and the weights of the maps to the gradients of the scores, and dQ. Columns are whole packets.

#include <algorithm>

#include "diffattn/core/simd.hpp"
#include "diffattn/kernels/detail/backward/backward_operands.hpp"
#include "diffattn/kernels/detail/backward/block_columns.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/detail/forward/row_block.hpp"
#include "diffattn/kernels/detail/scores.hpp"
#include "diffattn/kernels/detail/visible_pairs.hpp"

namespace diffattn::inline v0_1::detail {

/// dA = g Vᵀ of one group and chunk, 0 for what a row does not see. dout: [row][dv]; biases: as for clear_hidden.
template <typename Scalar, Index kMaps, typename Mask>
void multiply_values(Scalar* da, const Scalar* dout, const BackwardHead<Scalar, kMaps>& head,
                     const RowRange<Mask>& rows, Index first_key, const KeyRange& columns, const Scalar* biases,
                     const ChunkAhead<Scalar>& ahead) {
  constexpr Index kCols = Tile<Scalar>::kCols;
  for (Index c = columns.begin; c < columns.end; c += kCols) {
    add_product(da + c, kChunk, false, LeftOperand<Scalar>{dout, head.dv, 1}, head.values + (first_key + c) * head.dv,
                head.dv, rows.count, columns.end - c, ahead.of_chunk(c * head.dv, kCols * head.dv),
                ahead.of_panel(c, kChunk), kScoreChain);
  }
  clear_hidden(da, kChunk, rows, first_key, columns, biases);
}

/// to += factor · from, rows of packed columns: strips of kCols that are to_strip and from_strip apart.
template <typename Scalar>
void add_packed_row(Scalar* to, Index to_strip, Scalar factor, const Scalar* from, Index from_strip, Index width) {
  constexpr Index kCols = Tile<Scalar>::kCols;
  for (Index c = 0; c < width; ++c) {
    to[c / kCols * to_strip + c % kCols] += factor * from[c / kCols * from_strip + c % kCols];
  }
}

/// dQ / s += dS K for one map and chunk, group by group. dq: [group][strip of d][kRows][kCols]; ds: rows `stride` apart.
template <typename Scalar, Index kMaps, typename Mask>
void add_query_gradients(Scalar* dq, const Scalar* ds, Index stride, const BackwardHead<Scalar, kMaps>& head, Index map,
                         const RowRange<Mask>& rows, const BlockChunk& chunk, const KeyRange& columns) {
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  const Index groups = divide_up(rows.count, kRows), strip = head.n_k * kCols;
  const Scalar* const next = chunk.last ? nullptr : head.key_columns[map] + (chunk.first_key + kChunk) * kCols;
  for (Index g = 0; g < groups; ++g, dq += kRows * round_up(head.d, kCols)) {
    const ChunkAhead<Scalar> ahead{next, g, groups};
    const RowRange<Mask> group = rows.rows(g * kRows, kRows);
    const auto [begin, end] = group_columns<Scalar>(group.keys_of_any(), chunk.first_key, columns);
    add_products(dq, kRows * kCols, {ds + g * kRows * stride + begin, stride, 1},
                 head.key_columns[map] + (chunk.first_key + begin) * kCols, strip, group.count, head.d,
                 std::min(end, head.n_k - chunk.first_key) - begin, ahead.of_chunk(0, kChunk * kCols), strip, {});
  }
}

/// to = sums · factor, group by group; sums: [group][strip of columns][kRows][kCols].
template <typename Scalar>
void write_groups(const StridedView<Scalar>& to, const Scalar* sums, Scalar factor) {
  constexpr Index kRows = Tile<Scalar>::kRows, kCols = Tile<Scalar>::kCols;
  Scalar factors[kRows];
  std::fill(factors, factors + kRows, factor);
  for (Index row = 0; row < to.rows; row += kRows, sums += kRows * round_up(to.cols, kCols)) {
    write_rows(to.middle_rows(row, std::min(kRows, to.rows - row)), sums, factors);
  }
}

/// One row: weights of each map and what makes probabilities of them, with −λ for the second map, dA and D of each map.
template <typename Scalar, Index kMaps>
struct MapRow {
  const Scalar* weights[kMaps];
  const Scalar* da;
  Scalar factor[kMaps];
  Scalar dot[kMaps];
};

/// Writes dS of each map to ds[map], and A to `a`.
template <typename Scalar, Index kMaps>
void differentiate_row(Scalar* const (&ds)[kMaps], Scalar* a, const MapRow<Scalar, kMaps>& row,
                       const KeyRange& columns) {
  simd::Packet<Scalar> factor[kMaps], dot[kMaps];
  for (Index map = 0; map < kMaps; ++map) {
    factor[map] = simd::broadcast(row.factor[map]);
    dot[map] = simd::broadcast(row.dot[map]);
  }
  for (Index c = columns.begin; c < columns.end; c += simd::kLanes<Scalar>) {
    const auto da = simd::load(row.da + c);
    auto sum = simd::broadcast(Scalar(0));
    for (Index map = 0; map < kMaps; ++map) {
      const auto p = simd::mul(simd::load(row.weights[map] + c), factor[map]);
      sum = map == 0 ? p : simd::add(sum, p);
      simd::store(ds[map] + c, simd::mul(p, simd::sub(da, dot[map])));
    }
    simd::store(a + c, sum);
  }
}

/// The same for a head that shares its second map with others, which are taken one after the other. row.factor[1] makes
/// P_2 of the weights, without −λ. −λ·(dA − D_2) is added up in `shared`, from the first head on; the last makes dS_2
/// of it, P_2 ∘ Σ, and the others leave ds[1] as it was.
template <typename Scalar>
void differentiate_row_of_group(Scalar* const (&ds)[2], Scalar* a, Scalar* shared, const MapRow<Scalar, 2>& row,
                                Scalar minus_lambda, bool first, bool last, const KeyRange& columns) {
  const auto factor1 = simd::broadcast(row.factor[0]), factor2 = simd::broadcast(row.factor[1]);
  const auto dot1 = simd::broadcast(row.dot[0]), dot2 = simd::broadcast(row.dot[1]);
  const auto of_second = simd::broadcast(minus_lambda);
  for (Index c = columns.begin; c < columns.end; c += simd::kLanes<Scalar>) {
    const auto da = simd::load(row.da + c);
    const auto p1 = simd::mul(simd::load(row.weights[0] + c), factor1);
    const auto p2 = simd::mul(simd::load(row.weights[1] + c), factor2);
    simd::store(ds[0] + c, simd::mul(p1, simd::sub(da, dot1)));
    simd::store(a + c, simd::fma(p2, of_second, p1));
    auto sum = simd::mul(simd::sub(da, dot2), of_second);
    if (!first) sum = simd::add(sum, simd::load(shared + c));
    if (last) {
      simd::store(ds[1] + c, simd::mul(p2, sum));
    } else {
      simd::store(shared + c, sum);
    }
  }
}

}  // namespace diffattn::inline v0_1::detail
