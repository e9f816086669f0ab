#pragma once

// Standard attention for a block of query rows: softmax(s·Q Kᵀ) V in one pass over the keys. Scores of a chunk become
// weights and meet V while they are in the L1 cache; when a row's base moves, the sums it has so far are rescaled
// (online softmax, Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).

#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/forward/row_block.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Element, typename Result = Element>
class StandardBlock {
 public:
  using Operands = HeadOperands<Element, 1, Result>;

 private:
  using Scalar = ArithmeticOf<Element>;
  using Packed = PackedOf<Element>;
  static constexpr Index kRows = Tile<Scalar>::kRows;
  static constexpr Index kCols = Tile<Scalar>::kCols;

 public:
  /// Takes the scratch of one worker, for blocks of up to max_rows.
  StandardBlock(Workspace& workspace, const PackedHead<Packed>& shape, Index /*max_keys*/, Index max_rows = kBlockRows,
                bool /*has_bias*/ = false)
      : group_sums_(kRows * round_up(shape.dv, kCols)),
        q_(workspace.take<Packed>(round_up(max_rows, kRows) * steps_of<Packed>(shape.d))),
        weights_(workspace.take<Scalar>(kRows * kChunk)),
        rounded_(is_narrow<Element> ? workspace.take<Packed>(kRows * steps_of<Packed>(kChunk)) : nullptr),
        sums_(workspace.take<Scalar>(divide_up(max_rows, kRows) * group_sums_)),
        softmax_(workspace.take<RowSoftmax<Scalar>>(divide_up(max_rows, kRows))) {}

  /// Computes `rows` of the result, of one head. head: the keys and values that rows.head reads.
  template <typename Mask>
  void run(const Operands& in, const PackedHead<Packed>& head, const RowRange<Mask>& rows, Index /*heads*/,
           const ScoreScale<Scalar>& scale) {
    const Index groups = divide_up(rows.count, kRows);
    const ScaledExp2<Scalar> exp2(scale.of_exponent);
    copy_queries(q_, in.queries(0, rows.head).middle_rows(rows.first, rows.count), scale.of_queries);
    std::fill(sums_, sums_ + groups * group_sums_, Scalar(0));
    for (Index g = 0; g < groups; ++g) softmax_[g].reset();

    RowsAhead<1> rows_ahead(in, rows, groups);
    for_each_chunk(rows.keys_of_any(), [&](const BlockChunk& chunk) {
      for (Index g = 0; g < groups; ++g) {
        rows_ahead.fetch_some();
        add_chunk(head, rows.rows(g * kRows, kRows), g, groups, chunk, scale, exp2);
      }
    });
    for (Index g = 0; g < groups; ++g) write(in, rows.rows(g * kRows, kRows), g, scale);
  }

 private:
  /// Scores of one group and chunk become weights and meet V.
  template <typename Mask>
  void add_chunk(const PackedHead<Packed>& head, const RowRange<Mask>& rows, Index g, Index groups,
                 const BlockChunk& chunk, const ScoreScale<Scalar>& scale, const ScaledExp2<Scalar>& exp2) {
    const KeyRange columns = chunk_columns<Scalar>(rows.keys_of_any(), chunk.first_key);
    if (columns.begin >= columns.end) return;
    const Index next = chunk.first_key + kChunk;
    const bool fetch = head.fetch_ahead() && !chunk.last;
    const LeftOperand<Packed> q = query_group(q_, g, head.d);
    score_chunk(weights_, q, head.chunk_keys(0, chunk.first_key), head.d, rows, chunk.first_key, columns, scale,
                {fetch ? head.chunk_keys(0, next) : nullptr, g, groups});
    Scalar growth[kRows];
    Scalar* const sums = sums_ + g * group_sums_;
    if (softmax_[g].add_chunk(weights_, weights_, kChunk, rows.count, columns.begin, columns.end, exp2, growth)) {
      rescale(sums, growth);
    }
    add_weighted_values(sums, weights_of_values<Element>(rounded_, weights_, rows.count, columns), head, rows,
                        chunk.first_key, columns, {fetch ? head.chunk_values(next) : nullptr, g, groups});
  }

  /// Divides the sums of a group by those of its weights.
  template <typename Mask>
  void write(const Operands& in, const RowRange<Mask>& rows, Index g, const ScoreScale<Scalar>& scale) {
    Scalar factors[kRows];
    set_normalisers(factors, in.statistics[0], rows, softmax_[g], scale);
    write_rows(in.result(rows.head).middle_rows(rows.first, rows.count), sums_ + g * group_sums_, factors);
  }

  void rescale(Scalar* sums, const Scalar* growth) const {
    for (Index r = 0; r < kRows; ++r) {
      if (growth[r] == Scalar(1)) continue;
      const auto factor = simd::broadcast(growth[r]);
      for (Index strip = 0; strip < group_sums_; strip += kRows * kCols) {
        for (Index c = 0; c < kCols; c += simd::kLanes<Scalar>) {
          Scalar* const at = sums + strip + r * kCols + c;
          simd::store(at, simd::mul(simd::load(at), factor));
        }
      }
    }
  }

  Index group_sums_;             // values in the sums of one group
  Packed* q_;                    // [row][steps of d], multiplied by scale.of_queries
  Scalar* weights_;              // [kRows][kChunk]
  Packed* rounded_;              // [kRows][steps of kChunk], where the operands are narrow
  Scalar* sums_;                 // [group][strip of dv][kRows][kCols]
  RowSoftmax<Scalar>* softmax_;  // [group]
};

}  // namespace diffattn::inline v0_1::detail
