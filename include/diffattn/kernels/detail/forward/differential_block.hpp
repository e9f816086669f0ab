#pragma once

// Differential attention for a block of query rows, eq. (1): (softmax(s·Q1 K1ᵀ) − λ·softmax(s·Q2 K2ᵀ)) V.
//
// One pass as in standard attention cannot do it with one set of sums: O1/l1 − λ·O2/l2 needs both normalisers before
// the product with V. So the weights of the whole block, for all keys and both maps, are kept in a panel; once l1 and
// l2 are known they are combined, chunk by chunk, into A = P1/l1 − λ·P2/l2, and a single product A·V follows. The
// multiply-adds are those of two standard heads, and the panel (2 · rows · n_k) is all the memory it takes.
//
// Heads that share their second map (Heads::num_noise_heads) are computed one after the other: the first leaves the
// weights of that map in the panel, the others write theirs over those of the map that each has to itself.

#include <array>

#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/forward/row_block.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Element, typename Result = Element>
class DifferentialBlock {
 public:
  using Operands = HeadOperands<Element, 2, Result>;

 private:
  using Scalar = ArithmeticOf<Element>;
  using Packed = PackedOf<Element>;
  static constexpr Index kRows = Tile<Scalar>::kRows;
  static constexpr Index kCols = Tile<Scalar>::kCols;
  static constexpr Index kPaddedRows = RowSoftmax<Scalar>::kPaddedRows;
  static constexpr Index kTile = kRows * kChunk;

 public:
  /// Takes the scratch of one worker, for blocks of up to max_rows. No block will see more than max_keys keys, counted
  /// from the start of the chunk that the first is in. has_bias: whether a mask may have one.
  DifferentialBlock(Workspace& workspace, const PackedHead<Packed>& shape, Index max_keys, Index max_rows = kBlockRows,
                    bool has_bias = false)
      : groups_(divide_up(max_rows, kRows)),
        group_sums_(kRows * round_up(shape.dv, kCols)),
        sums_(workspace.take<Scalar>(groups_ * group_sums_)) {
    const Index chunks = divide_up(max_keys, kChunk);
    scores_ = workspace.take<Scalar>(kTile);
    if constexpr (is_narrow<Element>) rounded_ = workspace.take<Packed>(kRows * steps_of<Packed>(kChunk));
    panel_ = workspace.take<Scalar>(chunks * 2 * groups_ * kTile);
    chunk_base_ = workspace.take<Scalar>(chunks * 2 * groups_ * kPaddedRows);
    for (Index map = 0; map < 2; ++map) {
      q_[map] = workspace.take<Packed>(groups_ * kRows * steps_of<Packed>(shape.d));
      softmax_[map] = workspace.take<RowSoftmax<Scalar>>(groups_);
    }
    factors_ = workspace.take<Scalar>(2 * groups_ * kPaddedRows);
    if (has_bias) biases_ = workspace.take<Scalar>(kTile);
  }

  /// Computes `rows` of the result, of `heads` heads that share their second map. head: the keys and values that they
  /// read.
  template <typename Mask>
  void run(const Operands& in, const PackedHead<Packed>& head, const RowRange<Mask>& rows, Index heads,
           const ScoreScale<Scalar>& scale) {
    for (Index i = 0; i < heads; ++i) run_head(in, head, rows.of_head(rows.head + i), i == 0 ? 2 : 1, scale);
  }

 private:
  /// One head. maps: 1 where the panel holds the second map already.
  template <typename Mask>
  void run_head(const Operands& in, const PackedHead<Packed>& head, const RowRange<Mask>& rows, Index maps,
                const ScoreScale<Scalar>& scale) {
    const Index groups = divide_up(rows.count, kRows);
    const ScaledExp2<Scalar> exp2(scale.of_exponent);
    for (Index map = 0; map < maps; ++map) {
      copy_queries(q_[map], in.queries(map, rows.head).middle_rows(rows.first, rows.count), scale.of_queries);
      for (Index g = 0; g < groups; ++g) softmax_[map][g].reset();
    }
    std::fill(sums_, sums_ + groups * group_sums_, Scalar(0));

    const auto group = [&](Index g) { return rows.rows(g * kRows, kRows); };
    RowsAhead<2> rows_ahead(in, rows, (maps + 1) * groups);
    for_each_chunk(rows.keys_of_any(), [&](const BlockChunk& chunk) {
      const auto score_group = [&](Index map, Index g) {
        rows_ahead.fetch_some();
        score(head, group(g), map, map + 1 == maps, g, chunk, scale, exp2);
      };
      if constexpr (HasBias<Mask>) {
        // A bias is the same for both maps.
        for (Index g = 0; g < groups; ++g) {
          const KeyRange columns = columns_of(group(g), chunk);
          if (columns.begin < columns.end) fill_biases(biases_, kChunk, group(g), chunk.first_key, columns);
          for (Index map = 0; map < maps; ++map) score_group(map, g);
        }
      } else {
        for (Index map = 0; map < maps; ++map) {
          for (Index g = 0; g < groups; ++g) score_group(map, g);
        }
      }
    });
    for (Index g = 0; g < groups; ++g) set_factors(in, group(g), g, scale);
    for_each_chunk(rows.keys_of_any(), [&](const BlockChunk& chunk) {
      for (Index g = 0; g < groups; ++g) {
        rows_ahead.fetch_some();
        add_values(head, group(g), g, chunk, exp2);
      }
    });
    for (Index g = 0; g < groups; ++g) write(in, group(g), g);
  }

  template <typename Mask>
  static KeyRange columns_of(const RowRange<Mask>& rows, const BlockChunk& chunk) {
    return chunk_columns<Scalar>(rows.keys_of_any(), chunk.first_key);
  }

  Index slot(Index chunk, Index map, Index g) const { return (chunk * groups_ + g) * 2 + map; }
  Scalar* panel(Index chunk, Index map, Index g) const { return panel_ + slot(chunk, map, g) * kTile; }

  /// Scores of one group, map and chunk, turned into weights relative to the base so far. The scores stay in the
  /// nearest cache, while the place of the weights is fetched.
  template <typename Mask>
  void score(const PackedHead<Packed>& head, const RowRange<Mask>& rows, Index map, bool last_map, Index g,
             const BlockChunk& chunk, const ScoreScale<Scalar>& scale, const ScaledExp2<Scalar>& exp2) {
    const KeyRange columns = columns_of(rows, chunk);
    if (columns.begin >= columns.end) return;
    Scalar* const weights = panel(chunk.number, map, g);
    // The keys of the map after this one come next, then the first's of the next chunk; where groups take both maps in
    // turns, those of both of the next chunk.
    ChunkAhead<Packed> ahead{nullptr, g, groups_, weights, kTile};
    if (head.fetch_ahead()) {
      const bool next_map = !HasBias<Mask> && !last_map;
      if (next_map) ahead.chunk = head.chunk_keys(map + 1, chunk.first_key);
      if (!next_map && !chunk.last) ahead.chunk = head.chunk_keys(last_map ? 0 : map, chunk.first_key + kChunk);
    }
    const LeftOperand<Packed> q = query_group(q_[map], g, head.d);
    score_chunk(scores_, q, head.chunk_keys(map, chunk.first_key), head.d, rows, chunk.first_key, columns, scale, ahead,
                HasBias<Mask> ? biases_ : nullptr);
    RowSoftmax<Scalar>& softmax = softmax_[map][g];
    Scalar growth[kRows];
    softmax.add_chunk(weights, scores_, kChunk, rows.count, columns.begin, columns.end, exp2, growth);
    std::copy(softmax.base, softmax.base + kPaddedRows, chunk_base_ + slot(chunk.number, map, g) * kPaddedRows);
  }

  /// 1/l1 and −λ/l2 for the rows of a group.
  template <typename Mask>
  void set_factors(const Operands& in, const RowRange<Mask>& rows, Index g, const ScoreScale<Scalar>& scale) {
    set_normalisers(factors(0, g), in.statistics[0], rows, softmax_[0][g], scale);
    for (Index r = 0; r < rows.count; ++r) {
      const BaseAndSum<Scalar> second = softmax_[1][g].base_and_sum(r);
      const Scalar total = in.statistics[1].total(rows.first + r, rows.head, second, scale);
      factors(1, g)[r] = normaliser(total, -in.lambda(rows.first + r, rows.head));
    }
    for (Index map = 0; map < 2; ++map)
      std::fill(factors(map, g) + rows.count, factors(map, g) + kPaddedRows, Scalar(0));
  }

  Scalar* factors(Index map, Index g) { return factors_ + (map * groups_ + g) * kPaddedRows; }

  /// Combines both maps of one group and chunk, in the place of the first or where they are rounded, and multiplies by
  /// V.
  template <typename Mask>
  void add_values(const PackedHead<Packed>& head, const RowRange<Mask>& rows, Index g, const BlockChunk& chunk,
                  const ScaledExp2<Scalar>& exp2) {
    const KeyRange columns = columns_of(rows, chunk);
    if (columns.begin >= columns.end) return;
    alignas(64) Scalar factor[2][kPaddedRows];
    for (Index map = 0; map < 2; ++map) set_chunk_factors(factor[map], map, g, chunk.number, exp2);

    Scalar* const p1 = panel(chunk.number, 0, g);
    const Scalar* const p2 = panel(chunk.number, 1, g);
    for (Index r = 0; r < rows.count; ++r) {
      const Index at = r * kChunk;
      if constexpr (is_narrow<Element>) {
        combine_rounded(rounded_ + r * steps_of<Packed>(kChunk), p1 + at, factor[0][r], p2 + at, factor[1][r],
                        columns.begin, columns.end);
      } else {
        combine_maps(p1 + at, p1 + at, factor[0][r], p2 + at, factor[1][r], columns.begin, columns.end);
      }
    }
    // Of the panel, what the next group reads; the first group's of the next chunk follow the last's of this one.
    ChunkAhead<Packed> ahead{nullptr, g, groups_};
    const bool last_group = g + 1 == groups_;
    if (!chunk.last && head.fetch_ahead()) ahead.chunk = head.chunk_values(chunk.first_key + kChunk);
    if (!chunk.last || !last_group) {
      ahead.panel = last_group ? panel(chunk.number + 1, 0, 0) : p1 + 2 * kTile;
      ahead.panel_size = 2 * kTile;
    }
    const Packed* weights;
    if constexpr (is_narrow<Element>) weights = rounded_;
    if constexpr (!is_narrow<Element>) weights = p1;
    add_weighted_values(sums_ + g * group_sums_, weights, head, rows, chunk.first_key, columns, ahead);
  }

  /// What turns the weights of a chunk into probabilities: 2^(c·(its base − the last))/l, with −λ for the second map.
  void set_chunk_factors(Scalar* to, Index map, Index g, Index chunk, const ScaledExp2<Scalar>& exp2) {
    const Scalar* const chunk_base = chunk_base_ + slot(chunk, map, g) * kPaddedRows;
    const Scalar* const base = softmax_[map][g].base;
    for (Index r = 0; r < kPaddedRows; r += simd::kLanes<Scalar>) {
      const auto relative = exp2(simd::sub(simd::load(chunk_base + r), simd::load(base + r)));
      simd::store(to + r, simd::mul(relative, simd::load(factors(map, g) + r)));
    }
  }

  template <typename Mask>
  void write(const Operands& in, const RowRange<Mask>& rows, Index g) {
    constexpr auto ones = [] {
      std::array<Scalar, kRows> values{};
      values.fill(Scalar(1));
      return values;
    }();
    write_rows(in.result(rows.head).middle_rows(rows.first, rows.count), sums_ + g * group_sums_, ones.data());
  }

  Index groups_;                    // in a block
  Index group_sums_;                // values in the sums of one group
  Scalar* sums_;                    // [group][strip of dv][kRows][kCols]
  Scalar* scores_;                  // [kRows][kChunk]
  Scalar* biases_ = nullptr;        // the same, of a group and chunk, where a mask may have some
  Packed* rounded_ = nullptr;       // [kRows][steps of kChunk], where the operands are narrow
  Scalar* panel_;                   // [chunk][group][map][kRows][kChunk]
  Scalar* chunk_base_;              // [chunk][group][map][kPaddedRows]: what a chunk's weights are relative to
  Packed* q_[2];                    // [row][steps of d], multiplied by scale.of_queries
  RowSoftmax<Scalar>* softmax_[2];  // [group]
  Scalar* factors_;                 // [map][group][kPaddedRows]
};

}  // namespace diffattn::inline v0_1::detail
