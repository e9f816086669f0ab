#pragma once

// How the backward pass of all heads becomes tasks. dK and dV of a key head add up over all query rows that read it,
// so those rows are split into parts, how many depending on the shape alone: each part is a task that walks its row
// blocks in order and adds to sums of its own, and the parts' sums are added up in order. Who runs a task, and how many
// run at once, changes nothing in the result.

#include <algorithm>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward_block.hpp"
#include "diffattn/kernels/detail/head_operands.hpp"

namespace diffattn::inline v0_1::detail {

/// The gradients of one call; columns as in HeadOperands. dk is the same view twice when the maps share their keys.
template <typename Scalar, Index kMaps>
struct HeadGradients {
  StridedView<const Scalar> dout;
  StridedView<Scalar> dq[kMaps];
  StridedView<Scalar> dk[kMaps];
  StridedView<Scalar> dv;

  bool shared_keys() const { return dk[0].data == dk[kMaps - 1].data; }
};

/// to = sums · factor, or += : rows [first, first + count) of a gradient.
template <typename Scalar>
void write_sums(const StridedView<Scalar>& to, const Scalar* sums, Index padded_keys, Index first, Index count,
                Scalar factor, bool add) {
  constexpr Index kCols = Tile<Scalar>::kCols;
  for (Index col = 0; col < to.cols; col += kCols, sums += padded_keys * kCols) {
    const Index present = std::min(kCols, to.cols - col);
    for (Index key = first; key < first + count; ++key) {
      Scalar* const row = &to(key, col);
      const Scalar* const from = sums + key * kCols;
      if (add) {
        for (Index c = 0; c < present; ++c) row[c * to.col_stride] += from[c] * factor;
      } else {
        for (Index c = 0; c < present; ++c) row[c * to.col_stride] = from[c] * factor;
      }
    }
  }
}

template <typename Scalar>
bool all_finite(const StridedView<const Scalar>& view) {
  Scalar not_finite = 0;  // x · 0 is 0, or NaN
  for (Index i = 0; i < view.rows; ++i) {
    for (Index j = 0; j < view.cols; ++j) not_finite += view(i, j) * Scalar(0);
  }
  return not_finite == Scalar(0);
}

/// d2: [head][query], D of the second map (dλ = −D); kMaps = 1 has none.
template <typename Scalar, Index kMaps, typename Mask, Executor E>
void run_heads_backward(const HeadOperands<Scalar, kMaps>& in, const HeadGradients<Scalar, kMaps>& grad, Scalar* d2,
                        const Mask& mask, Workspace& workspace, E& executor) {
  using Block = BackwardBlock<Scalar, kMaps>;
  constexpr Index kPieceRows = 512;      // keys packed, and written, by one task
  constexpr Index kMostParts = 8;        // tasks of a call with one key head
  constexpr Index kLeastPartBlocks = 8;  // row blocks that make a part worth its sums
  const Index n_q = in.q[0].rows, n_k = in.k[0].rows, kv_heads = in.heads.num_kv_heads;
  if (n_q == 0 || n_k == 0) {
    for (Index map = 0; map < kMaps; ++map) {
      write_constant(grad.dq[map], Scalar(0));
      write_constant(grad.dk[map], Scalar(0));
    }
    write_constant(grad.dv, Scalar(0));
    if (kMaps == 2) std::fill(d2, d2 + in.heads.num_heads * n_q, Scalar(0));
    return;
  }

  const auto frame = workspace.frame();
  const Index group = in.heads.num_heads / kv_heads;  // query heads that share a key head
  const Index blocks = divide_up(n_q, Block::kBlockRows), all_blocks = group * blocks;
  const Index parts = std::clamp<Index>(all_blocks / kLeastPartBlocks, 1, divide_up(kMostParts, kv_heads));
  const Index workers = executor.concurrency();
  const Index wave = std::min(kv_heads, workers);       // key heads packed at a time
  const Index slots = std::min(wave * parts, workers);  // tasks at a time, each with sums of its own
  const Index pieces = divide_up(n_k, kPieceRows), key_maps = in.shared_keys() ? 1 : kMaps;

  const auto row_range = [&](Index block) {
    const Index first = block * Block::kBlockRows;
    return RowRange<Mask>{mask, first, std::min(Block::kBlockRows, n_q - first), n_q, n_k};
  };
  Index max_keys = 0;
  for (Index block = 0; block < blocks; ++block) {
    const KeyRange keys = row_range(block).keys_of_any();
    max_keys = std::max(max_keys, keys.end - keys.begin);
  }

  typename Block::Head shape;
  shape.n_k = n_k;
  shape.d = in.d;
  shape.dv = in.dv;
  const Index keys_size = packed_strips_size<Scalar>(n_k, in.d), values_size = packed_strips_size<Scalar>(n_k, in.dv);
  const Index columns_size = packed_strips_size<Scalar>(in.d, n_k);
  auto* const heads = workspace.take<typename Block::Head>(wave);
  auto* const finite = workspace.take<bool>(wave * pieces);
  auto* const keys = workspace.take<Scalar>(wave * key_maps * keys_size);
  auto* const key_columns = workspace.take<Scalar>(wave * key_maps * columns_size);
  auto* const values = workspace.take<Scalar>(wave * values_size);

  typename Block::Sums sums;
  sums.padded_keys = round_up(n_k, Tile<Scalar>::kCols);
  const Index dk_size = packed_strips_size<Scalar>(in.d, sums.padded_keys);
  const Index dk_maps = grad.shared_keys() ? 1 : kMaps;
  const Index sums_size = dk_maps * dk_size + packed_strips_size<Scalar>(in.dv, sums.padded_keys);
  auto* const all_sums = workspace.take<Scalar>(slots * sums_size);
  const auto sums_of = [&](Index slot) {
    typename Block::Sums result = sums;
    for (Index map = 0; map < kMaps; ++map) {
      result.dk[map] = all_sums + slot * sums_size + std::min(map, dk_maps - 1) * dk_size;
    }
    result.dv = all_sums + slot * sums_size + dk_maps * dk_size;
    return result;
  };
  auto* const scratch = workspace.take<Block>(workers);
  for (Index worker = 0; worker < workers; ++worker) new (scratch + worker) Block(workspace, shape, n_q, max_keys);

  for (Index first_head = 0; first_head < kv_heads; first_head += wave) {
    const Index present = std::min(wave, kv_heads - first_head);
    executor.run(present * pieces, [&](Index task, Index /*worker*/) {
      const Index i = task / pieces, head = first_head + i, row = task % pieces * kPieceRows;
      const Index count = std::min(kPieceRows, n_k - row);
      bool all = true;
      for (Index map = 0; map < key_maps; ++map) {
        const auto view = in.k[map].middle_cols(head * in.k_step, in.d);
        pack_transposed(keys + (i * key_maps + map) * keys_size, view, row, count);
        all &= pack_columns(key_columns + (i * key_maps + map) * columns_size + row * Tile<Scalar>::kCols, n_k,
                            view.middle_rows(row, count));
      }
      const auto view = in.v.middle_cols(head * in.dv, in.dv);
      pack_transposed(values + i * values_size, view, row, count);
      finite[task] = all && all_finite(view.middle_rows(row, count));
    });
    for (Index i = 0; i < present; ++i) {
      heads[i] = shape;
      for (Index map = 0; map < kMaps; ++map) {
        const Index packed = i * key_maps + std::min(map, key_maps - 1);
        heads[i].keys[map] = keys + packed * keys_size;
        heads[i].key_columns[map] = key_columns + packed * columns_size;
      }
      heads[i].values = values + i * values_size;
      heads[i].finite = std::all_of(finite + i * pieces, finite + (i + 1) * pieces, [](bool yes) { return yes; });
    }

    // Task t is part t / present of key head t % present.
    for (Index first_task = 0; first_task < present * parts; first_task += slots) {
      const Index tasks = std::min(slots, present * parts - first_task);
      executor.run(tasks, [&](Index slot, Index worker) {
        const Index task = first_task + slot, i = task % present, part = task / present;
        std::fill(all_sums + slot * sums_size, all_sums + (slot + 1) * sums_size, Scalar(0));
        for (Index b = all_blocks * part / parts; b < all_blocks * (part + 1) / parts; ++b) {
          const Index head = (first_head + i) * group + b / blocks;
          const RowRange<Mask> rows = row_range(b % blocks);
          typename Block::Rows block;
          for (Index map = 0; map < kMaps; ++map) {
            block.q[map] = in.q[map].block(rows.first, head * in.q_step, rows.count, in.d);
            block.dq[map] = grad.dq[map].block(rows.first, head * in.q_step, rows.count, in.d);
          }
          block.dout = grad.dout.block(rows.first, head * in.dv, rows.count, in.dv);
          if (kMaps == 2) block.d2 = d2 + head * n_q + rows.first;
          block.lambda = in.lambda;
          block.head_index = head;
          scratch[worker].run(block, heads[i], sums_of(slot), rows, in.scale);
        }
      });
      const Index heads_written = std::min(tasks, present);
      executor.run(heads_written * pieces, [&](Index index, Index /*worker*/) {
        const Index row = index % pieces * kPieceRows, count = std::min(kPieceRows, n_k - row);
        for (Index slot = index / pieces; slot < tasks; slot += present) {
          const Index task = first_task + slot, head = first_head + task % present;
          const bool add = task >= present;
          const typename Block::Sums from = sums_of(slot);
          for (Index map = 0; map < dk_maps; ++map) {
            write_sums(grad.dk[map].middle_cols(head * in.k_step, in.d), from.dk[map], from.padded_keys, row, count,
                       in.scale, add);
          }
          write_sums(grad.dv.middle_cols(head * in.dv, in.dv), from.dv, from.padded_keys, row, count, Scalar(1), add);
        }
      });
    }
  }
}

}  // namespace diffattn::inline v0_1::detail
