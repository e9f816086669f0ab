#pragma once

// Differential attention for a block of query rows, eq. (1): (softmax(s·Q1 K1ᵀ) − λ·softmax(s·Q2 K2ᵀ)) V.
//
// One pass as in standard attention cannot do it with one set of sums: O1/l1 − λ·O2/l2 needs both normalisers before
// the product with V. So the weights of the whole block, for all keys and both maps, are kept in a panel; once l1 and
// l2 are known they are combined, chunk by chunk, into A = P1/l1 − λ·P2/l2, and a single product A·V follows. The
// multiply-adds are those of two standard heads, and the panel (2 · rows · n_k) is all the memory it takes.

#include <array>

#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/forward/row_block.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1::detail {

/// p1 = p1 · f1[row] + p2 · f2[row] in the given columns, whole packets, of `rows` rows, kChunk apart.
template <typename Scalar>
void combine_maps(Scalar* p1, const Scalar* p2, const Scalar* f1, const Scalar* f2, Index rows,
                  const KeyRange& columns) {
  for (Index r = 0; r < rows; ++r, p1 += kChunk, p2 += kChunk) {
    const auto first = simd::broadcast(f1[r]), second = simd::broadcast(f2[r]);
#pragma GCC unroll 4
    for (Index c = columns.begin; c < columns.end; c += simd::kLanes<Scalar>) {
      simd::store(p1 + c, simd::fma(simd::load(p1 + c), first, simd::mul(simd::load(p2 + c), second)));
    }
  }
}

template <typename Scalar>
class DifferentialBlock {
  static constexpr Index kRows = Tile<Scalar>::kRows;
  static constexpr Index kCols = Tile<Scalar>::kCols;
  static constexpr Index kPaddedRows = RowSoftmax<Scalar>::kPaddedRows;
  static constexpr Index kTile = kRows * kChunk;

 public:
  static constexpr Index kMaps = 2;
  static constexpr Index kBlockRows = 48;

  /// Takes the scratch of one worker, for blocks of up to max_rows. No block will see more than max_keys keys, counted
  /// from the start of the chunk that the first is in.
  DifferentialBlock(Workspace& workspace, const PackedHead<Scalar>& shape, Index max_keys, Index max_rows = kBlockRows)
      : groups_(divide_up(max_rows, kRows)),
        group_sums_(kRows * round_up(shape.dv, kCols)),
        sums_(workspace.take<Scalar>(groups_ * group_sums_)) {
    const Index chunks = divide_up(max_keys, kChunk);
    scores_ = workspace.take<Scalar>(kTile);
    panel_ = workspace.take<Scalar>(chunks * 2 * groups_ * kTile);
    chunk_base_ = workspace.take<Scalar>(chunks * 2 * groups_ * kPaddedRows);
    for (Index map = 0; map < 2; ++map) {
      q_[map] = workspace.take<Scalar>(groups_ * kRows * shape.d);
      softmax_[map] = workspace.take<RowSoftmax<Scalar>>(groups_);
    }
    factors_ = workspace.take<Scalar>(2 * groups_ * kPaddedRows);
  }

  /// q, out: the block's rows. lambda, lse: of all rows and heads.
  template <typename Mask>
  void run(const StridedView<Scalar>& out, const StridedView<const Scalar> (&q)[2], const PackedHead<Scalar>& head,
           const RowRange<Mask>& rows, const ScoreScale<Scalar>& scale, const LambdaView<Scalar>& lambda,
           const StridedView<Scalar> (&lse)[2], Index head_index) {
    const Index groups = divide_up(rows.count, kRows);
    const ScaledExp2<Scalar> exp2(scale.of_exponent);
    for (Index map = 0; map < 2; ++map) {
      copy_rows(q_[map], q[map], scale.of_queries);
      for (Index g = 0; g < groups; ++g) softmax_[map][g].reset();
    }
    std::fill(sums_, sums_ + groups * group_sums_, Scalar(0));

    const KeyRange keys = rows.keys_of_any();
    const Index begin = keys.begin / kChunk * kChunk;
    RowsAhead<2> rows_ahead(out, q, std::min(rows.first, kBlockRows), 3 * groups * divide_up(keys.end - begin, kChunk));
    for (Index first_key = begin, chunk = 0; first_key < keys.end; first_key += kChunk, ++chunk) {
      for (Index map = 0; map < 2; ++map) {
        for (Index g = 0; g < groups; ++g) {
          rows_ahead.fetch_some();
          score(head, rows.rows(g * kRows, kRows), map, g, first_key, chunk, keys.end, scale, exp2);
        }
      }
    }
    for (Index g = 0; g < groups; ++g) set_factors(rows.rows(g * kRows, kRows), g, lambda, head_index);
    for (Index first_key = begin, chunk = 0; first_key < keys.end; first_key += kChunk, ++chunk) {
      for (Index g = 0; g < groups; ++g) {
        rows_ahead.fetch_some();
        add_values(head, rows.rows(g * kRows, kRows), g, first_key, chunk, keys.end, exp2);
      }
    }

    constexpr auto ones = [] {
      std::array<Scalar, kRows> values{};
      values.fill(Scalar(1));
      return values;
    }();
    for (Index g = 0; g < groups; ++g) {
      const Index present = std::min(kRows, rows.count - g * kRows);
      write_rows(out.middle_rows(g * kRows, present), sums_ + g * group_sums_, ones.data());
      for (Index map = 0; map < 2; ++map) {
        write_log_sum_exp(lse[map], rows.first + g * kRows, present, head_index, softmax_[map][g], scale);
      }
    }
  }

 private:
  Index slot(Index chunk, Index map, Index g) const { return (chunk * groups_ + g) * 2 + map; }

  /// Scores of one group, map and chunk, turned into weights relative to the base so far. The scores stay in the
  /// nearest cache, while the place of the weights is fetched.
  template <typename Mask>
  void score(const PackedHead<Scalar>& head, const RowRange<Mask>& rows, Index map, Index g, Index first_key,
             Index chunk, Index end_key, const ScoreScale<Scalar>& scale, const ScaledExp2<Scalar>& exp2) {
    const KeyRange columns = chunk_columns<Scalar>(rows.keys_of_any(), first_key);
    if (columns.begin >= columns.end) return;
    Scalar* const weights = panel_ + slot(chunk, map, g) * kTile;
    // The second map's keys come next, then the first's of the next chunk.
    ChunkAhead<Scalar> ahead{nullptr, g, groups_, weights, kTile};
    if (head.fetch_ahead()) {
      if (map == 0) ahead.chunk = head.chunk_keys(1, first_key);
      if (map == 1 && first_key + kChunk < end_key) ahead.chunk = head.chunk_keys(0, first_key + kChunk);
    }
    const LeftOperand<Scalar> q{q_[map] + g * kRows * head.d, head.d, 1};
    score_chunk(scores_, q, head.chunk_keys(map, first_key), head.d, rows, first_key, columns, scale, ahead);
    RowSoftmax<Scalar>& softmax = softmax_[map][g];
    Scalar growth[kRows];
    softmax.add_chunk(weights, scores_, kChunk, rows.count, columns.begin, columns.end, exp2, growth);
    std::copy(softmax.base, softmax.base + kPaddedRows, chunk_base_ + slot(chunk, map, g) * kPaddedRows);
  }

  /// 1/l1 and −λ/l2 for the rows of a group; 0 for a row that saw no key.
  template <typename Mask>
  void set_factors(const RowRange<Mask>& rows, Index g, const LambdaView<Scalar>& lambda, Index head_index) {
    for (Index r = 0; r < rows.count; ++r) {
      const Scalar sum1 = softmax_[0][g].sum(r), sum2 = softmax_[1][g].sum(r);
      factors(0, g)[r] = sum1 == Scalar(0) ? Scalar(0) : Scalar(1) / sum1;
      factors(1, g)[r] = sum2 == Scalar(0) ? Scalar(0) : -lambda(rows.first + r, head_index) / sum2;
    }
    for (Index map = 0; map < 2; ++map)
      std::fill(factors(map, g) + rows.count, factors(map, g) + kPaddedRows, Scalar(0));
  }

  Scalar* factors(Index map, Index g) { return factors_ + (map * groups_ + g) * kPaddedRows; }

  /// Combines both maps of one group and chunk, in the place of the first, and multiplies by V.
  template <typename Mask>
  void add_values(const PackedHead<Scalar>& head, const RowRange<Mask>& rows, Index g, Index first_key, Index chunk,
                  Index end_key, const ScaledExp2<Scalar>& exp2) {
    const KeyRange columns = chunk_columns<Scalar>(rows.keys_of_any(), first_key);
    if (columns.begin >= columns.end) return;
    alignas(64) Scalar factor[2][kPaddedRows];
    for (Index map = 0; map < 2; ++map) chunk_factors(factor[map], map, g, chunk, exp2);

    Scalar* const p1 = panel_ + slot(chunk, 0, g) * kTile;
    const Scalar* const p2 = panel_ + slot(chunk, 1, g) * kTile;
    combine_maps(p1, p2, factor[0], factor[1], rows.count, columns);
    // Of the panel, what the next group reads; the first group's of the next chunk follow the last's of this one.
    ChunkAhead<Scalar> ahead{nullptr, g, groups_};
    const bool more = first_key + kChunk < end_key, last = g + 1 == groups_;
    if (more && head.fetch_ahead()) ahead.chunk = head.chunk_values(first_key + kChunk);
    if (more || !last) {
      ahead.panel = last ? panel_ + slot(chunk + 1, 0, 0) * kTile : p1 + 2 * kTile;
      ahead.panel_size = 2 * kTile;
    }
    add_weighted_values(sums_ + g * group_sums_, p1, head, rows, first_key, columns, ahead);
  }

  /// What turns the weights of a chunk into probabilities: 2^(c·(its base − the last))/l, with −λ for the second map.
  void chunk_factors(Scalar* to, Index map, Index g, Index chunk, const ScaledExp2<Scalar>& exp2) {
    const Scalar* const chunk_base = chunk_base_ + slot(chunk, map, g) * kPaddedRows;
    const Scalar* const base = softmax_[map][g].base;
    for (Index r = 0; r < kPaddedRows; r += simd::kLanes<Scalar>) {
      const auto relative = exp2(simd::sub(simd::load(chunk_base + r), simd::load(base + r)));
      simd::store(to + r, simd::mul(relative, simd::load(factors(map, g) + r)));
    }
  }

  Index groups_;                    // in a block
  Index group_sums_;                // values in the sums of one group
  Scalar* sums_;                    // [group][strip of dv][kRows][kCols]
  Scalar* scores_;                  // [kRows][kChunk]
  Scalar* panel_;                   // [chunk][group][map][kRows][kChunk]
  Scalar* chunk_base_;              // [chunk][group][map][kPaddedRows]: what a chunk's weights are relative to
  Scalar* q_[2];                    // [row][d], multiplied by scale.of_queries
  RowSoftmax<Scalar>* softmax_[2];  // [group]
  Scalar* factors_;                 // [map][group][kPaddedRows]
};

}  // namespace diffattn::inline v0_1::detail
