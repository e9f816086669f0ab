#pragma once

// The gradients of attention, standard (kMaps = 1) and differential (kMaps = 2), for a block of query rows. With
// g the gradient of the output, P_m the softmax of map m and A = P_1 − λ·P_2:
//
//   dA = g Vᵀ            D_m = rowsum(P_m ∘ dA)            dS_1 = P_1 ∘ (dA − D_1),   dS_2 = −λ·P_2 ∘ (dA − D_2)
//   dV += Aᵀ g           dQ_m = s·dS_m K_m                 dK_m += s·dS_mᵀ Q_m        dλ = −D_2
//
// D needs whole rows, so weights and dA of the block are kept for all keys in a panel, like the weights of the forward
// kernel; nothing is computed twice and nothing but the operands is needed from the forward pass. A second walk over
// the panel turns a chunk of P and dA into A and dS and multiplies each with what it meets. dA and dV cost differential
// attention no more than one map.

#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward/backward_operands.hpp"
#include "diffattn/kernels/detail/forward/row_block.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar, Index kMaps>
class BackwardBlock {
  static constexpr Index kRows = Tile<Scalar>::kRows;
  static constexpr Index kCols = Tile<Scalar>::kCols;
  static constexpr Index kLanes = Tile<Scalar>::kLanes;
  static constexpr Index kPaddedRows = RowSoftmax<Scalar>::kPaddedRows;

 public:
  /// Every block reads and writes the sums of dK and dV once, in products as deep as it has rows.
  static constexpr Index kBlockRows = 96;
  using Head = BackwardHead<Scalar, kMaps>;
  using Sums = KeyValueSums<Scalar, kMaps>;
  using Rows = BackwardRows<Scalar, kMaps>;

  /// Takes the scratch of one worker; no block will have more than `max_rows` rows or see more than `max_keys` keys.
  BackwardBlock(Workspace& workspace, const Head& shape, Index max_rows, Index max_keys)
      : panel_rows_(round_up(std::min(max_rows, kBlockRows), kRows)) {
    const Index chunks = divide_up(max_keys, kChunk) + 1;
    panel_ = workspace.take<Scalar>(chunks * kPanels * panel_rows_ * kChunk);
    step_ = workspace.take<Scalar>(kPanels * panel_rows_ * kStride);
    chunk_factor_ = workspace.take<Scalar>(chunks * kMaps * kGroups * kPaddedRows);
    chunk_dot_ = workspace.take<Scalar>(chunks * kMaps * kGroups * kPaddedRows);
    for (Index map = 0; map < kMaps; ++map) {
      q_rows_[map] = workspace.take<Scalar>(kBlockRows * shape.d);
      q_columns_[map] = workspace.take<Scalar>(packed_strips_size<Scalar>(shape.d, kBlockRows));
      dq_[map] = workspace.take<Scalar>(kGroups * group_size(shape.d));
      softmax_[map] = workspace.take<RowSoftmax<Scalar>>(kGroups);
    }
    dout_rows_ = workspace.take<Scalar>(kBlockRows * shape.dv);
    dout_columns_ = workspace.take<Scalar>(packed_strips_size<Scalar>(shape.dv, kBlockRows));
  }

  /// Writes dQ and D_2 of the block's rows and adds what they contribute to dK / s and dV.
  template <typename Mask>
  void run(const Rows& block, const Head& head, const Sums& sums, const RowRange<Mask>& rows, Scalar scale) {
    const Index groups = divide_up(rows.count, kRows);
    const ScoreScale<Scalar> score_scale = split_scale<Mask>(scale);
    const ScaledExp2<Scalar> exp2(score_scale.of_exponent);
    bool finite = head.finite;
    for (Index map = 0; map < kMaps; ++map) {
      copy_rows(q_rows_[map], block.q[map], score_scale.of_queries);
      finite &= pack_columns(q_columns_[map], rows.count, block.q[map]);
      for (Index g = 0; g < groups; ++g) softmax_[map][g].reset();
      std::fill(dq_[map], dq_[map] + groups * group_size(head.d), Scalar(0));
    }
    copy_rows(dout_rows_, block.dout, Scalar(1));
    finite &= pack_columns(dout_columns_, rows.count, block.dout);

    const KeyRange keys = rows.keys_of_any();
    const Index begin = keys.begin / kChunk * kChunk;
    for (Index first_key = begin, chunk = 0; first_key < keys.end; first_key += kChunk, ++chunk) {
      const KeyRange columns = columns_of(keys, first_key);
      for (Index g = 0; g < groups; ++g) {
        fill_panel(head, rows.rows(g * kRows, kRows), g, groups, first_key, chunk, columns,
                   first_key + kChunk < keys.end, score_scale, exp2);
      }
    }
    finite &= set_factors(block, rows, divide_up(keys.end - begin, kChunk), exp2);
    for (Index first_key = begin, chunk = 0; first_key < keys.end; first_key += kChunk, ++chunk) {
      const KeyRange columns = columns_of(keys, first_key);
      differentiate(rows.count, chunk, columns);
      if (finite) {
        add_gradients(head, sums, rows, first_key, chunk, columns, first_key + kChunk < keys.end);
      } else {
        add_visible_gradients(head, sums, rows, first_key, columns);
      }
    }

    Scalar scales[kRows];
    std::fill(scales, scales + kRows, scale);
    for (Index map = 0; map < kMaps; ++map) {
      for (Index g = 0; g < groups; ++g) {
        const Index present = std::min(kRows, rows.count - g * kRows);
        write_rows(block.dq[map].middle_rows(g * kRows, present), dq_[map] + g * group_size(head.d), scales);
      }
    }
  }

 private:
  static constexpr Index kGroups = divide_up(kBlockRows, kRows);
  static constexpr Index kPanels = kMaps + 1;       // weights of each map, then dA
  static constexpr Index kStride = kChunk + kCols;  // of dS and A: not a power of 2, since columns are read

  static Index group_size(Index width) { return kRows * round_up(width, kCols); }
  static Index slot(Index chunk, Index map) { return (chunk * kMaps + map) * kGroups * kPaddedRows; }
  /// Map m's weights; panel kMaps is dA. [panel_rows_][kChunk].
  Scalar* panel(Index chunk, Index p) const { return panel_ + (chunk * kPanels + p) * panel_rows_ * kChunk; }
  /// dS of map m; step kMaps is A. [panel_rows_][kStride].
  Scalar* step(Index p) const { return step_ + p * panel_rows_ * kStride; }

  /// The columns of a chunk that some row of the block sees, up to the end of a packet and of a lowest tile.
  static KeyRange columns_of(const KeyRange& keys, Index first_key) {
    constexpr Index kStep = std::max(kLanes, kRows / 3);
    const Index begin = std::max<Index>(keys.begin - first_key, 0) / kCols * kCols;
    return {begin, std::min(round_up(keys.end - first_key, kStep), kChunk)};
  }

  /// What of `columns` some row of a group sees, as columns_of has it.
  static KeyRange columns_of_group(const KeyRange& keys, Index first_key, const KeyRange& columns) {
    const KeyRange seen = columns_of(keys, first_key);
    const Index begin = std::clamp(seen.begin, columns.begin, columns.end);
    return {begin, std::clamp(seen.end, begin, columns.end)};
  }

  /// Weights, relative to the base so far, dA, and Σ weight · dA, of one group and chunk; 0 where no row of the group
  /// sees a column.
  template <typename Mask>
  void fill_panel(const Head& head, const RowRange<Mask>& rows, Index g, Index groups, Index first_key, Index chunk,
                  const KeyRange& block_columns, bool more, const ScoreScale<Scalar>& scale,
                  const ScaledExp2<Scalar>& exp2) {
    const Index at = g * kRows * kChunk;
    const KeyRange columns = columns_of_group(rows.keys_of_any(), first_key, block_columns);
    for (Index p = 0; p < kPanels; ++p) {
      for (Index r = 0; r < rows.count; ++r) {
        fill_unseen(panel(chunk, p) + at + r * kChunk, block_columns, columns, Scalar(0));
      }
    }
    Scalar* const da = panel(chunk, kMaps) + at;
    const auto ahead = [&](const Scalar* next, Index p) {
      return more ? ChunkAhead<Scalar>{next, g, groups, panel(chunk + 1, p) + at, kRows * kChunk}
                  : ChunkAhead<Scalar>{};
    };
    const ChunkAhead<Scalar> after_values = ahead(head.values + (first_key + kChunk) * head.dv, kMaps);
    for (Index c = columns.begin; c < columns.end; c += kCols) {
      const LeftOperand<Scalar> dout{dout_rows_ + g * kRows * head.dv, head.dv, 1};
      add_product(da + c, kChunk, false, dout, head.values + (first_key + c) * head.dv, head.dv, rows.count,
                  columns.end - c, after_values.of_chunk(c * head.dv, kCols * head.dv),
                  after_values.of_panel(c, kChunk), kScoreChain);
    }
    const KeyRange all = rows.keys_of_all();
    if (HasBias<Mask> || first_key + columns.begin < all.begin || first_key + columns.end > all.end) {
      clear_hidden(da, kChunk, rows, first_key, columns);
    }
    for (Index map = 0; map < kMaps; ++map) {
      Scalar* const weights = panel(chunk, map) + at;
      const LeftOperand<Scalar> q{q_rows_[map] + g * kRows * head.d, head.d, 1};
      score_chunk(weights, q, head.keys[map] + first_key * head.d, head.d, rows, first_key, columns, scale,
                  ahead(head.keys[map] + (first_key + kChunk) * head.d, map));
      Scalar growth[kRows];
      softmax_[map][g].add_chunk(weights, weights, kChunk, rows.count, columns.begin, columns.end, exp2, growth);
      const Index values = slot(chunk, map) + g * kPaddedRows;
      std::copy(softmax_[map][g].base, softmax_[map][g].base + kPaddedRows, chunk_factor_ + values);
      for (Index r = 0; r < rows.count; ++r) {
        auto dot = simd::broadcast(Scalar(0));
        for (Index c = r * kChunk + columns.begin; c < r * kChunk + columns.end; c += kLanes) {
          dot = simd::fma(simd::load(weights + c), simd::load(da + c), dot);
        }
        chunk_dot_[values + r] = simd::reduce_add(dot);
      }
    }
  }

  /// 1/l_1, −λ/l_2 and D_m of every row; 0 for a row that saw no key. Returns whether all are finite.
  template <typename Mask>
  bool set_factors(const Rows& block, const RowRange<Mask>& rows, Index chunks, const ScaledExp2<Scalar>& exp2) {
    Scalar not_finite = 0;  // x · 0 is 0, or NaN
    for (Index row = 0; row < rows.count; ++row) {
      const Index g = row / kRows, r = row % kRows;
      for (Index map = 0; map < kMaps; ++map) {
        const Scalar sum = softmax_[map][g].sum(r);
        const Scalar inverse = sum == Scalar(0) ? Scalar(0) : Scalar(1) / sum;
        Scalar dot = 0;
        for (Index chunk = 0; chunk < chunks; ++chunk) {
          Scalar* const value = chunk_factor_ + slot(chunk, map) + g * kPaddedRows + r;
          // What turns the weights of the chunk into probabilities; 0 while the row has seen no key.
          *value = simd::first(exp2(simd::broadcast(*value - softmax_[map][g].base[r]))) * inverse;
          dot += chunk_dot_[slot(chunk, map) + g * kPaddedRows + r] * *value;
          if (map == 1) *value *= -block.lambda(rows.first + row, block.head_index);
          not_finite += *value * Scalar(0);
        }
        dots_[map][row] = dot;
        not_finite += dot * Scalar(0);
        if (map == 1) block.d2[row] = dot;
      }
    }
    return not_finite == Scalar(0);
  }

  /// Turns the weights and dA of a chunk into dS and A.
  void differentiate(Index rows, Index chunk, const KeyRange& columns) {
    for (Index row = 0; row < rows; ++row) {
      const Index value = row / kRows * kPaddedRows + row % kRows;
      simd::Packet<Scalar> factor[kMaps], dot[kMaps];
      for (Index map = 0; map < kMaps; ++map) {
        factor[map] = simd::broadcast(chunk_factor_[slot(chunk, map) + value]);
        dot[map] = simd::broadcast(dots_[map][row]);
      }
      const Index from = row * kChunk, to = row * kStride;
      for (Index c = columns.begin; c < columns.end; c += kLanes) {
        const auto da = simd::load(panel(chunk, kMaps) + from + c);
        auto sum = simd::broadcast(Scalar(0));
        for (Index map = 0; map < kMaps; ++map) {
          const auto p = simd::mul(simd::load(panel(chunk, map) + from + c), factor[map]);
          sum = map == 0 ? p : simd::add(sum, p);
          simd::store(step(map) + to + c, simd::mul(p, simd::sub(da, dot[map])));
        }
        simd::store(step(kMaps) + to + c, sum);
      }
    }
  }

  /// dQ += dS K, dK += dSᵀ Q, dV += Aᵀ g for one chunk. On the way the tiles of dK and dV that come next are fetched,
  /// and the panel and the columns of K of the next chunk, if there is one.
  template <typename Mask>
  void add_gradients(const Head& head, const Sums& sums, const RowRange<Mask>& rows, Index first_key, Index chunk,
                     const KeyRange& columns, bool more) {
    const auto add_transposed = [&](Scalar* to, Index p, const Scalar* b, Index width) {
      const Index piece = divide_up(panel_rows_ * kChunk, divide_up(kChunk, kRows) * divide_up(width, kCols));
      Ahead<Scalar> of_panel{more ? panel(chunk + 1, p) : nullptr, piece};
      for (Index k = columns.begin; k < columns.end; k += kRows) {
        Scalar* const tile = to + (first_key + k) * kCols;
        // None of the others has a gradient to add.
        const auto [begin, end] = rows.rows_that_see({first_key + k, first_key + k + kRows});
        add_products(tile, sums.padded_keys * kCols, {step(p) + begin * kStride + k, 1, kStride}, b + begin * kCols,
                     rows.count * kCols, std::min(kRows, columns.end - k), width, end - begin,
                     {tile + kRows * kCols, kRows * kCols}, sums.padded_keys * kCols, of_panel);
        if (more) of_panel.data += piece * divide_up(width, kCols);
      }
    };
    add_transposed(sums.dv, kMaps, dout_columns_, head.dv);
    const Index groups = divide_up(rows.count, kRows), strip = head.n_k * kCols;
    for (Index map = 0; map < kMaps; ++map) {
      add_transposed(sums.dk[map], map, q_columns_[map], head.d);
      for (Index g = 0; g < groups; ++g) {
        const Scalar* const next = head.key_columns[map] + (first_key + kChunk) * kCols;
        const ChunkAhead<Scalar> ahead{more ? next : nullptr, g, groups};
        const RowRange<Mask> group = rows.rows(g * kRows, kRows);
        const auto [begin, end] = columns_of_group(group.keys_of_any(), first_key, columns);
        add_products(dq_[map] + g * group_size(head.d), kRows * kCols,
                     {step(map) + g * kRows * kStride + begin, kStride, 1},
                     head.key_columns[map] + (first_key + begin) * kCols, strip, group.count, head.d,
                     std::min(end, head.n_k - first_key) - begin, ahead.of_chunk(0, kChunk * kCols), strip, {});
      }
    }
  }

  /// The same where something is not finite: a weight of 0 does not keep a NaN or Inf out, so only visible pairs meet.
  template <typename Mask>
  void add_visible_gradients(const Head& head, const Sums& sums, const RowRange<Mask>& rows, Index first_key,
                             const KeyRange& columns) {
    const auto add_row = [](Scalar* to, Index to_strip, Scalar factor, const Scalar* from, Index from_strip,
                            Index width) {
      for (Index c = 0; c < width; ++c) {
        to[c / kCols * to_strip + c % kCols] += factor * from[c / kCols * from_strip + c % kCols];
      }
    };
    const Index dk_strip = sums.padded_keys * kCols;
    for_each_visible(rows, first_key, columns, [&](Index r, Index k) {
      const Index key = (first_key + k) * kCols, at = r * kStride + k;
      add_row(sums.dv + key, dk_strip, step(kMaps)[at], dout_columns_ + r * kCols, rows.count * kCols, head.dv);
      for (Index map = 0; map < kMaps; ++map) {
        const Scalar ds = step(map)[at];
        add_row(sums.dk[map] + key, dk_strip, ds, q_columns_[map] + r * kCols, rows.count * kCols, head.d);
        add_row(dq_[map] + r / kRows * group_size(head.d) + r % kRows * kCols, kRows * kCols, ds,
                head.key_columns[map] + key, head.n_k * kCols, head.d);
      }
    });
  }

  Index panel_rows_;
  Scalar* panel_;             // [chunk][panel][panel_rows_][kChunk]
  Scalar* step_;              // [panel][panel_rows_][kStride]
  Scalar* chunk_factor_;      // [chunk][map][group][kPaddedRows]: what weights are relative to, then their factor
  Scalar* chunk_dot_;         // the same of Σ weight · dA
  Scalar* q_rows_[kMaps];     // [row][d], scaled
  Scalar* q_columns_[kMaps];  // [strip of d][row][kCols]
  Scalar* dq_[kMaps];         // [group][strip of d][kRows][kCols]: dQ / s
  Scalar* dout_rows_;         // [row][dv]
  Scalar* dout_columns_;      // [strip of dv][row][kCols]
  RowSoftmax<Scalar>* softmax_[kMaps];   // [group]
  Scalar dots_[kMaps][kGroups * kRows];  // D_m
};

}  // namespace diffattn::inline v0_1::detail
