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
//
// Heads that share their second map (Heads::num_noise_heads) are taken one after the other in one block. The panel
// keeps P_2 from the first of them on, and −λ·(dA − D_2) adds up beside it: dS_2 = P_2 ∘ Σ −λ·(dA − D_2) meets Q_2 and
// K_2 once. Where a bias differs from head to head, each has a P_2 of its own, and only dQ_2 adds up.

#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward/backward_operands.hpp"
#include "diffattn/kernels/detail/backward/bias_gradient.hpp"
#include "diffattn/kernels/detail/backward/block_columns.hpp"
#include "diffattn/kernels/detail/backward/copied_rows.hpp"
#include "diffattn/kernels/detail/backward/map_gradients.hpp"
#include "diffattn/kernels/detail/backward/row_dots.hpp"
#include "diffattn/kernels/detail/forward/row_block.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar, Index kMaps>
class BackwardBlock {
  static constexpr Index kRows = Tile<Scalar>::kRows;
  static constexpr Index kCols = Tile<Scalar>::kCols;
  static constexpr Index kPaddedRows = RowSoftmax<Scalar>::kPaddedRows;

 public:
  /// Every block reads and writes the sums of dK and dV once, in products as deep as it has rows.
  static constexpr Index kBlockRows = 96;
  using Operands = HeadOperands<Scalar, kMaps>;
  using Gradients = HeadGradients<Scalar, kMaps>;
  using Head = BackwardHead<Scalar, kMaps>;
  using Sums = KeyValueSums<Scalar, kMaps>;

  /// Takes the scratch of one worker; no block will have more than `max_rows` rows or see more than `max_keys` keys.
  /// heads_of_noise: how many heads one second map is computed for.
  BackwardBlock(Workspace& workspace, const Head& shape, Index max_rows, Index max_keys, bool has_bias,
                Index heads_of_noise)
      : one_noise_(heads_of_noise > 1),
        panel_rows_(round_up(std::min(max_rows, kBlockRows), kRows)),
        copies_(workspace, shape, kBlockRows) {
    const Index chunks = divide_up(max_keys, kChunk) + 1;
    biases_ = has_bias ? workspace.take<Scalar>(kRows * kChunk) : nullptr;
    panel_ = workspace.take<Scalar>(chunks * kPanels * panel_rows_ * kChunk);
    shared_ = workspace.take<Scalar>(one_noise_ ? chunks * panel_rows_ * kChunk : 0);
    step_ = workspace.take<Scalar>(kPanels * panel_rows_ * kStride);
    chunk_factor_ = workspace.take<Scalar>(chunks * kMaps * kGroups * kPaddedRows);
    chunk_dot_ = workspace.take<Scalar>(chunks * kMaps * kGroups * kPaddedRows);
    for (Index map = 0; map < kMaps; ++map) {
      dq_[map] = workspace.take<Scalar>(kGroups * group_size(shape.d));
      softmax_[map] = workspace.take<RowSoftmax<Scalar>>(kGroups);
    }
  }

  /// Writes dQ and D_2 of `rows`, of the heads from rows.head on that share their second map, and adds what they
  /// contribute to dK / s and dV. head: the keys and values that they read; sums: theirs; dbias: those of a learned bias.
  template <typename Mask>
  void run(const Operands& in, const Gradients& grad, const Head& head, const Sums& sums, const HeadBiasSums& dbias,
           const RowRange<Mask>& rows) {
    finite_ = head.finite;
    for (Index i = 0; i < in.noise_sharers; ++i) {
      first_ = i == 0;
      last_ = i + 1 == in.noise_sharers;
      run_head(in, grad, head, sums, dbias, rows.of_head(rows.head + i));
    }
  }

 private:
  static constexpr Index kGroups = divide_up(kBlockRows, kRows);
  static constexpr Index kPanels = kMaps + 1;       // weights of each map, then dA
  static constexpr Index kStride = kChunk + kCols;  // of dS and A: not a power of 2, since columns are read

  /// The maps that the head at hand computes: the second only if the panel does not hold it already.
  Index maps_to_fill() const { return first_ || !one_noise_ ? kMaps : 1; }
  /// The maps whose dS is complete with the head at hand.
  Index maps_to_add() const { return last_ || !one_noise_ ? kMaps : 1; }

  template <typename Mask>
  void run_head(const Operands& in, const Gradients& grad, const Head& head, const Sums& sums,
                const HeadBiasSums& dbias, const RowRange<Mask>& rows) {
    const Index groups = divide_up(rows.count, kRows);
    const ScoreScale<Scalar> scale = split_scale<Mask>(in.scale);
    const ScaledExp2<Scalar> exp2(scale.of_exponent);
    finite_ &= copies_.copy(in, grad, rows, first_ ? kMaps : 1, scale.of_queries);
    for (Index map = 0; map < kMaps; ++map) {
      for (Index g = 0; g < groups && map < maps_to_fill(); ++g) softmax_[map][g].reset();
      if (map == 0 || first_) std::fill(dq_[map], dq_[map] + groups * group_size(in.d), Scalar(0));
    }
    const KeyRange keys = rows.keys_of_any();
    Index chunks = 0;
    for_each_chunk(keys, [&](const BlockChunk& chunk) {
      ++chunks;
      const KeyRange columns = block_columns<Scalar>(keys, chunk.first_key);
      for (Index g = 0; g < groups; ++g) {
        fill_panel(head, rows.rows(g * kRows, kRows), g, groups, chunk, columns, scale, exp2);
      }
    });
    finite_ &= set_factors(in, grad, rows, chunks, exp2);
    for_each_chunk(keys, [&](const BlockChunk& chunk) {
      const KeyRange columns = block_columns<Scalar>(keys, chunk.first_key);
      differentiate(rows.count, chunk.number, columns);
      if constexpr (HasLearnedBias<Mask>) {
        const Scalar* ds[kMaps];
        for (Index map = 0; map < kMaps; ++map) ds[map] = step(map);
        if (dbias.sums != nullptr) {
          add_bias_gradients(dbias.row(rows.head), ds, kStride, rows, chunk.first_key, columns, finite_);
        }
      }
      if (finite_) {
        add_gradients(head, sums, rows, chunk, columns);
      } else {
        add_visible_gradients(head, sums, rows, chunk.first_key, columns);
      }
    });
    for (Index map = 0; map < (last_ ? kMaps : 1); ++map) {
      write_groups(grad.queries(map, rows.head).middle_rows(rows.first, rows.count), dq_[map], in.scale);
    }
  }

  static Index group_size(Index width) { return kRows * round_up(width, kCols); }
  static Index slot(Index chunk, Index map) { return (chunk * kMaps + map) * kGroups * kPaddedRows; }
  /// Map m's weights; panel kMaps is dA. [panel_rows_][kChunk].
  Scalar* panel(Index chunk, Index p) const { return panel_ + (chunk * kPanels + p) * panel_rows_ * kChunk; }
  /// dS of map m; step kMaps is A. [panel_rows_][kStride].
  Scalar* step(Index p) const { return step_ + p * panel_rows_ * kStride; }

  /// dA, weights relative to the base so far, and Σ weight · dA, of one group and chunk; 0 where no row of the group
  /// sees a column.
  template <typename Mask>
  void fill_panel(const Head& head, const RowRange<Mask>& rows, Index g, Index groups, const BlockChunk& chunk,
                  const KeyRange& of_block, const ScoreScale<Scalar>& scale, const ScaledExp2<Scalar>& exp2) {
    const Index at = g * kRows * kChunk, next_key = chunk.first_key + kChunk;
    const KeyRange columns = group_columns<Scalar>(rows.keys_of_any(), chunk.first_key, of_block);
    if constexpr (HasBias<Mask>) fill_biases(biases_, kChunk, rows, chunk.first_key, columns);
    for (Index p = 0; p < kPanels; ++p) {
      if (p < kMaps && p >= maps_to_fill()) continue;
      for (Index r = 0; r < rows.count; ++r) {
        fill_unseen(panel(chunk.number, p) + at + r * kChunk, of_block, columns, Scalar(0));
      }
    }
    const auto ahead = [&](const Scalar* next, Index p) {
      return chunk.last ? ChunkAhead<Scalar>{}
                        : ChunkAhead<Scalar>{next, g, groups, panel(chunk.number + 1, p) + at, kRows * kChunk};
    };
    Scalar* const da = panel(chunk.number, kMaps) + at;
    multiply_values(da, copies_.dout_rows + g * kRows * head.dv, head, rows, chunk.first_key, columns, biases_,
                    ahead(head.values + next_key * head.dv, kMaps));
    for (Index map = 0; map < kMaps; ++map) {
      Scalar* const weights = panel(chunk.number, map) + at;
      const Index values = slot(chunk.number, map) + g * kPaddedRows;
      if (map >= maps_to_fill()) {
        set_dots(chunk_dot_ + values, weights, da, kChunk, rows.count, columns);
        continue;
      }
      const LeftOperand<Scalar> q{copies_.q_rows[map] + g * kRows * head.d, head.d, 1};
      score_chunk(weights, q, head.keys[map] + chunk.first_key * head.d, head.d, rows, chunk.first_key, columns, scale,
                  ahead(head.keys[map] + next_key * head.d, map), biases_);
      Scalar growth[kRows];
      softmax_[map][g].add_chunk(weights, weights, kChunk, rows.count, columns.begin, columns.end, exp2, growth);
      std::copy(softmax_[map][g].base, softmax_[map][g].base + kPaddedRows, chunk_factor_ + values);
      set_dots(chunk_dot_ + values, weights, da, kChunk, rows.count, columns);
    }
  }

  /// 1/l_1, −λ/l_2 (or both, where heads share P_2) and D_m of every row; 0 for one that saw no key. Returns whether
  /// all are finite.
  template <typename Mask>
  bool set_factors(const Operands& in, const Gradients& grad, const RowRange<Mask>& rows, Index chunks,
                   const ScaledExp2<Scalar>& exp2) {
    Scalar not_finite = 0;  // x · 0 is 0, or NaN
    for (Index row = 0; row < rows.count; ++row) {
      const Index g = row / kRows, r = row % kRows;
      for (Index map = 0; map < kMaps; ++map) {
        const Scalar inverse = normaliser(softmax_[map][g].sum(r));
        Scalar dot = 0;
        for (Index chunk = 0; chunk < chunks; ++chunk) {
          Scalar* const value = chunk_factor_ + slot(chunk, map) + g * kPaddedRows + r;
          // What turns the weights of the chunk into probabilities; 0 while the row has seen no key.
          if (map < maps_to_fill()) {
            *value = simd::first(exp2(simd::broadcast(*value - softmax_[map][g].base[r]))) * inverse;
          }
          dot += chunk_dot_[slot(chunk, map) + g * kPaddedRows + r] * *value;
          if (map == 1 && !one_noise_) *value *= -in.lambda(rows.first + row, rows.head);
          not_finite += *value * Scalar(0);
        }
        dots_[map][row] = dot;
        not_finite += dot * Scalar(0);
        if (map == 1) grad.second_dots(rows.head)[rows.first + row] = dot;
      }
      if (one_noise_) {
        minus_lambda_[row] = -in.lambda(rows.first + row, rows.head);
        not_finite += minus_lambda_[row] * dots_[kMaps - 1][row] * Scalar(0);
      }
    }
    return not_finite == Scalar(0);
  }

  /// Turns the weights and dA of a chunk into dS and A.
  void differentiate(Index rows, Index chunk, const KeyRange& columns) {
    for (Index row = 0; row < rows; ++row) {
      const Index value = row / kRows * kPaddedRows + row % kRows, from = row * kChunk, to = row * kStride;
      MapRow<Scalar, kMaps> of_row;
      Scalar* ds[kMaps];
      for (Index map = 0; map < kMaps; ++map) {
        of_row.weights[map] = panel(chunk, map) + from;
        of_row.factor[map] = chunk_factor_[slot(chunk, map) + value];
        of_row.dot[map] = dots_[map][row];
        ds[map] = step(map) + to;
      }
      of_row.da = panel(chunk, kMaps) + from;
      if constexpr (kMaps == 2) {
        if (one_noise_) {
          differentiate_row_of_group(ds, step(kMaps) + to, shared_ + chunk * panel_rows_ * kChunk + from, of_row,
                                     minus_lambda_[row], first_, last_, columns);
          continue;
        }
      }
      differentiate_row(ds, step(kMaps) + to, of_row, columns);
    }
  }

  /// dQ += dS K, dK += dSᵀ Q, dV += Aᵀ g for one chunk. On the way the tiles of dK and dV that come next are fetched,
  /// and the panel and the columns of K of the next chunk, if there is one.
  template <typename Mask>
  void add_gradients(const Head& head, const Sums& sums, const RowRange<Mask>& rows, const BlockChunk& chunk,
                     const KeyRange& columns) {
    add_transposed(sums.dv, kMaps, copies_.dout_columns, head.dv, sums.padded_keys, rows, chunk, columns);
    for (Index map = 0; map < maps_to_add(); ++map) {
      add_transposed(sums.dk[map], map, copies_.q_columns[map], head.d, sums.padded_keys, rows, chunk, columns);
      add_query_gradients(dq_[map], step(map), kStride, head, map, rows, chunk, columns);
    }
  }

  /// to += (step p)ᵀ b, a tile of keys at a time. to: [strip of width][padded_keys][kCols]; b: [strip][row][kCols].
  template <typename Mask>
  void add_transposed(Scalar* to, Index p, const Scalar* b, Index width, Index padded_keys, const RowRange<Mask>& rows,
                      const BlockChunk& chunk, const KeyRange& columns) {
    const Index piece = divide_up(panel_rows_ * kChunk, divide_up(kChunk, kRows) * divide_up(width, kCols));
    Ahead<Scalar> of_panel{chunk.last ? nullptr : panel(chunk.number + 1, p), piece};
    for (Index k = columns.begin; k < columns.end; k += kRows) {
      const Index key = chunk.first_key + k;
      Scalar* const tile = to + key * kCols;
      // None of the others has a gradient to add.
      const auto [begin, end] = rows.rows_that_see({key, key + kRows});
      add_products(tile, padded_keys * kCols, {step(p) + begin * kStride + k, 1, kStride}, b + begin * kCols,
                   rows.count * kCols, std::min(kRows, columns.end - k), width, end - begin,
                   {tile + kRows * kCols, kRows * kCols}, padded_keys * kCols, of_panel);
      if (!chunk.last) of_panel.data += piece * divide_up(width, kCols);
    }
  }

  /// The same where something is not finite: a weight of 0 does not keep a NaN or Inf out, so only visible pairs meet.
  template <typename Mask>
  void add_visible_gradients(const Head& head, const Sums& sums, const RowRange<Mask>& rows, Index first_key,
                             const KeyRange& columns) {
    const Index dk_strip = sums.padded_keys * kCols;
    for_each_visible(rows, first_key, columns, [&](Index r, Index k) {
      const Index key = (first_key + k) * kCols, at = r * kStride + k;
      add_packed_row(sums.dv + key, dk_strip, step(kMaps)[at], copies_.dout_columns + r * kCols, rows.count * kCols,
                     head.dv);
      for (Index map = 0; map < maps_to_add(); ++map) {
        const Scalar ds = step(map)[at];
        add_packed_row(sums.dk[map] + key, dk_strip, ds, copies_.q_columns[map] + r * kCols, rows.count * kCols,
                       head.d);
        add_packed_row(dq_[map] + r / kRows * group_size(head.d) + r % kRows * kCols, kRows * kCols, ds,
                       head.key_columns[map] + key, head.n_k * kCols, head.d);
      }
    });
  }

  bool one_noise_;                   // whether heads that share the queries of their second map share the map
  bool first_ = true, last_ = true;  // of these heads is at hand
  bool finite_ = false;              // all of them so far
  Index panel_rows_;
  CopiedRows<Scalar, kMaps> copies_;
  Scalar* biases_;        // [kRows][kChunk], of a group and chunk
  Scalar* panel_;         // [chunk][panel][panel_rows_][kChunk]
  Scalar* shared_;        // [chunk][panel_rows_][kChunk]: Σ −λ·(dA − D_2) of the heads so far
  Scalar* step_;          // [panel][panel_rows_][kStride]
  Scalar* chunk_factor_;  // [chunk][map][group][kPaddedRows]: what weights are relative to, then their factor
  Scalar* chunk_dot_;     // the same of Σ weight · dA
  Scalar* dq_[kMaps];     // [group][strip of d][kRows][kCols]: dQ / s
  RowSoftmax<Scalar>* softmax_[kMaps];   // [group]
  Scalar dots_[kMaps][kGroups * kRows];  // D_m
  Scalar minus_lambda_[kGroups * kRows];
};

}  // namespace diffattn::inline v0_1::detail
