#pragma once

// What a call for a few rows holds while it lasts (few_rows.hpp), and where in it a row has its weights and sums.

#include <algorithm>

#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/detail/visible_pairs.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/product/packed.hpp"

namespace diffattn::inline v0_1::detail {

/// The rows of one call: queries, weights and sums, and what each row sees. A row is a query of one of the sharers of a
/// key head, numbered sharer by sharer. Heads that share their second map have one row of it together.
template <typename Operands, typename Mask>
struct FewRowsState {
  using Scalar = typename Operands::Scalar;
  static constexpr Index kMaps = Operands::kMaps;
  // Rows of weights a power of two apart would fall on the same few lines of the nearest cache.
  static constexpr Index kWeightStride = kChunk + 16;
  static constexpr Index kCols = Tile<Scalar>::kCols;

  const Operands& in;
  const Mask& mask;
  Index n_q;
  Index n_k;
  Index heads_of_noise;  // heads that have a row of the second map together
  Index rows;            // of each key head
  Index noise_rows;      // of the second map, likewise
  Index all_rows;        // of all maps: those of the first, then those of the second
  Index width;           // of a row of sums, whole strips
  Index first;           // the first chunk that some row sees
  Index chunks;          // from there on
  Index slots;           // of a chunk and a key head, as many as there is memory for
  Scalar* queries;
  Scalar* all_weights;
  Scalar* all_sums;

  /// room: keys that memory is taken for, where there are fewer.
  FewRowsState(const Operands& operands, Index num_keys, Index room, const Mask& visible, Workspace& workspace)
      : in(operands), mask(visible), n_q(in.n_q()), n_k(num_keys) {
    heads_of_noise = heads_with_one_noise_map(in, mask, n_q);
    rows = n_q * in.heads_per_kv_head();
    noise_rows = rows / heads_of_noise;
    all_rows = kMaps == 1 ? rows : rows + noise_rows;
    width = round_up(in.dv, kCols);
    first = mask.visible_keys(0, n_q, n_k).begin / kChunk;
    chunks = std::max<Index>(divide_up(mask.visible_keys(n_q - 1, n_q, n_k).end, kChunk) - first, 0);
    slots = std::max(chunks, divide_up(room, kChunk)) * in.heads.num_kv_heads;
    queries = workspace.take<Scalar>(in.heads.num_kv_heads * all_rows * in.d);
    all_weights = workspace.take<Scalar>(slots * all_rows * kWeightStride);
    all_sums = workspace.take<Scalar>(slots * rows * width);
  }

  Index rows_of(Index map) const { return map == 0 ? rows : noise_rows; }
  /// The row of a map that a row, one of the first map, goes with.
  Index row_of(Index map, Index row) const {
    return map == 0 || heads_of_noise == 1 ? row : row / (n_q * heads_of_noise) * n_q + query(row);
  }
  Index query(Index row) const { return row % n_q; }
  /// The query head of a row of a map, or the first of those that share it.
  Index query_head(Index head, Index row, Index map = 0) const {
    return head * in.heads_per_kv_head() + row / n_q * (map == 0 ? 1 : heads_of_noise);
  }
  /// All queries of a query head, with what they see.
  RowRange<Mask> queries_of(Index head) const { return {mask, head, 0, n_q, n_q, n_k}; }
  Index slot(Index chunk, Index head) const { return chunk * in.heads.num_kv_heads + head; }
  Index index(Index chunk, Index head, Index map, Index row) const {
    return slot(chunk, head) * all_rows + map * rows + row;
  }

  /// How many indices there is memory for.
  Index size() const { return slots * all_rows; }

  /// [head][map][row][d], multiplied by scale.of_queries.
  Scalar* q(Index head, Index map) const { return queries + (head * all_rows + map * rows) * in.d; }
  /// [chunk][head][map][row][kWeightStride].
  Scalar* weights(Index chunk, Index head, Index map, Index row) const {
    return all_weights + index(chunk, head, map, row) * kWeightStride;
  }
  /// [chunk][head][row][width].
  Scalar* sums(Index chunk, Index head, Index row) const { return all_sums + (slot(chunk, head) * rows + row) * width; }

  /// The first key of a chunk, to which its columns are relative.
  Index first_key(Index chunk) const { return (first + chunk) * kChunk; }
  /// Columns of a chunk that a query sees.
  KeyRange columns_of(Index chunk, Index query) const {
    const KeyRange keys = mask.visible_keys(query, n_q, n_k);
    const Index begin = std::clamp<Index>(keys.begin - first_key(chunk), 0, kChunk);
    return {begin, std::clamp(keys.end - first_key(chunk), begin, kChunk)};
  }
  /// Columns that some query sees: neither end of a mask's ranges decreases from query to query.
  KeyRange columns_of_any(Index chunk) const {
    const Index begin = columns_of(chunk, 0).begin;
    return {begin, std::max(begin, columns_of(chunk, n_q - 1).end)};
  }
  /// The same, widened to whole strips.
  KeyRange strips_of_any(Index chunk) const {
    const KeyRange columns = columns_of_any(chunk);
    return {columns.begin / kCols * kCols, round_up(columns.end, kCols)};
  }
};

}  // namespace diffattn::inline v0_1::detail
