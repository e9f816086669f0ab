#pragma once

// How the backward pass of all heads becomes tasks. dK and dV of a key head add up over all query rows that read it,
// so those rows are split into parts, how many depending on the shape alone: each part is a task that walks its row
// blocks in order and adds to sums of its own, and the parts' sums are added up in order. Who runs a task, and how many
// run at once, changes nothing in the result.

#include <algorithm>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward/backward_block.hpp"
#include "diffattn/kernels/detail/operands.hpp"

namespace diffattn::inline v0_1::detail {

/// The row blocks [begin, end) that one task walks, and keys that include all that they see.
struct BlockPart {
  Index begin;
  Index end;
  KeyRange keys;
};

/// Splits `blocks` row blocks into parts of about equal work; keys_of(b) are the keys that block b sees.
template <typename KeysOf>
void split_blocks(BlockPart* parts, Index num_parts, Index blocks, const KeysOf& keys_of) {
  const auto work_of = [&](Index b) { return keys_of(b).end - keys_of(b).begin + 1; };
  Index all_work = 0, work = 0, block = 0;
  for (Index b = 0; b < blocks; ++b) all_work += work_of(b);
  for (Index p = 0; p < num_parts; ++p) {
    parts[p] = {block, block, keys_of(std::min(block, blocks - 1))};
    for (; block < blocks && work < all_work * (p + 1) / num_parts; ++block) {
      const KeyRange keys = keys_of(block);
      parts[p].keys = {std::min(parts[p].keys.begin, keys.begin), std::max(parts[p].keys.end, keys.end)};
      parts[p].end = block + 1;
      work += work_of(block);
    }
  }
}

/// to = sums · factor, or += : rows [first, first + count) of a gradient. Rows that come next are fetched on the way.
template <typename Scalar>
void write_sums(const StridedView<Scalar>& to, const Scalar* sums, Index padded_keys, Index first, Index count,
                Scalar factor, bool add) {
  constexpr Index kCols = Tile<Scalar>::kCols, kLanes = Tile<Scalar>::kLanes, kAhead = 16;
  const auto factors = simd::broadcast(factor);
  for (Index key = first; key < first + count; ++key) {
    for (Index col = 0; col < to.cols; col += kCols) {
      const Index present = std::min(kCols, to.cols - col);
      Scalar* const row = &to(key, col);
      const Scalar* const from = sums + col * padded_keys + key * kCols;
      Index c = 0;
      for (; to.col_stride == 1 && c + kLanes <= present; c += kLanes) {
        const auto product = simd::mul(simd::load(from + c), factors);
        simd::prefetch(from + c, kAhead * kCols);
        simd::prefetch(row + c, kAhead * to.row_stride);
        simd::storeu(row + c, add ? simd::add(simd::loadu(row + c), product) : product);
      }
      for (; c < present; ++c) {
        const Scalar product = from[c] * factor;
        Scalar& element = row[c * to.col_stride];
        element = add ? element + product : product;
      }
    }
  }
}

template <typename Scalar>
bool all_finite(const StridedView<const Scalar>& view) {
  constexpr Index kLanes = simd::kLanes<Scalar>;
  auto not_finite = simd::broadcast(Scalar(0));  // x · 0 is 0, or NaN
  Scalar last_not_finite = 0;
  for (Index i = 0; i < view.rows; ++i) {
    Index j = 0;
    for (; view.col_stride == 1 && j + kLanes <= view.cols; j += kLanes) {
      not_finite = simd::fma(simd::loadu(&view(i, j)), simd::broadcast(Scalar(0)), not_finite);
    }
    for (; j < view.cols; ++j) last_not_finite += view(i, j) * Scalar(0);
  }
  return simd::reduce_add(not_finite) + last_not_finite == Scalar(0);
}

/// d2: [head][query], D of the second map (dλ = −D); kMaps = 1 has none.
template <typename Scalar, Index kMaps, typename Mask, Executor E>
void run_heads_backward(const HeadOperands<Scalar, kMaps>& in, const HeadGradients<Scalar, kMaps>& grad, Scalar* d2,
                        const Mask& mask, Workspace& workspace, E& executor) {
  using Block = BackwardBlock<Scalar, kMaps>;
  constexpr Index kCols = Tile<Scalar>::kCols;
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

  const auto row_range = [&](Index head, Index block) {
    const Index first = block * Block::kBlockRows;
    return RowRange<Mask>{mask, head, first, std::min(Block::kBlockRows, n_q - first), n_q, n_k};
  };
  Index max_keys = 0;
  for (Index block = 0; block < blocks; ++block) {
    const KeyRange keys = row_range(0, block).keys_of_any();
    max_keys = std::max(max_keys, keys.end - keys.begin);
  }
  auto* const part_of = workspace.take<BlockPart>(parts);
  split_blocks(part_of, parts, all_blocks, [&](Index b) { return row_range(0, b % blocks).keys_of_any(); });

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
                            view.middle_rows(row, count), true);
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
        // Whole chunks, since tiles at the end of what a block sees reach further.
        const Index first = part_of[part].keys.begin / kChunk * kChunk * kCols;
        const Index last = std::min(round_up(part_of[part].keys.end, kChunk), sums.padded_keys) * kCols;
        for (Scalar* strip = all_sums + slot * sums_size; strip < all_sums + (slot + 1) * sums_size;
             strip += sums.padded_keys * kCols) {
          std::fill(strip + first, strip + last, Scalar(0));
        }
        for (Index b = part_of[part].begin; b < part_of[part].end; ++b) {
          const Index head = (first_head + i) * group + b / blocks;
          const RowRange<Mask> rows = row_range(head, b % blocks);
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
          const KeyRange seen = part_of[task / present].keys;
          const Index begin = std::clamp(seen.begin, row, row + count), end = std::clamp(seen.end, begin, row + count);
          const auto write = [&](const StridedView<Scalar>& to, const Scalar* sums_of_slot, Scalar factor) {
            write_sums(to, sums_of_slot, from.padded_keys, begin, end - begin, factor, add);
            if (add) return;
            write_constant(to.middle_rows(row, begin - row), Scalar(0));
            write_constant(to.middle_rows(end, row + count - end), Scalar(0));
          };
          for (Index map = 0; map < dk_maps; ++map) {
            write(grad.dk[map].middle_cols(head * in.k_step, in.d), from.dk[map], in.scale);
          }
          write(grad.dv.middle_cols(head * in.dv, in.dv), from.dv, Scalar(1));
        }
      });
    }
  }
}

}  // namespace diffattn::inline v0_1::detail
