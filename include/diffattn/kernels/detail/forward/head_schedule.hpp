#pragma once

// How the heads of one call become tasks: keys and values of a head are packed once, then every block of query rows of
// every query head that reads them is a task of its own. No two tasks write the same value and none adds to another's,
// so the result does not depend on who runs them.

#include <algorithm>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/few_rows/few_rows_in_place.hpp"
#include "diffattn/kernels/detail/few_rows/small_problem.hpp"
#include "diffattn/kernels/detail/forward/row_block.hpp"
#include "diffattn/kernels/detail/operands.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Block, typename Scalar, typename Mask, Executor E>
void run_heads(const HeadOperands<Scalar, Block::kMaps>& in, const Mask& mask, Workspace& workspace, E& executor) {
  constexpr Index kPackRows = 512;  // keys packed by one task
  const Index n_q = in.q[0].rows, n_k = in.k[0].rows;
  if (n_q == 0) return;
  if (n_k == 0) {
    for (const auto& lse : in.lse) write_constant(lse, kMinusInfinity<Scalar>);
    return write_constant(in.out, Scalar(0));
  }
  using Small = SmallProblem<Scalar, Block::kMaps, Mask>;
  if (Small::suits(in)) return Small::run(in, mask, executor);
  using InPlace = InPlaceSource<Scalar, Block::kMaps>;
  if (InPlace::suits(in)) {
    return FewRows<Scalar, Block::kMaps, Mask, InPlace>::run(in, {}, n_k, mask, workspace, executor);
  }

  const auto frame = workspace.frame();
  const ScoreScale<Scalar> scale = split_scale<Mask>(in.scale);
  const Index key_maps = in.shared_keys() ? 1 : Block::kMaps;
  const Index group = in.heads.num_heads / in.heads.num_kv_heads;  // query heads that share a key head
  const Index blocks = divide_up(n_q, Block::kBlockRows);
  const Index workers = executor.concurrency();
  // One key head at a time keeps the packed copy small; several threads want enough tasks to share out evenly.
  const Index wave = workers == 1 ? 1 : std::min(in.heads.num_kv_heads, divide_up(32 * workers, group * blocks));

  const auto row_range = [&](Index head, Index block) {
    const Index first = block * Block::kBlockRows;
    return RowRange<Mask>{mask, head, first, std::min(Block::kBlockRows, n_q - first), n_q, n_k};
  };
  Index max_keys = 0;
  for (Index block = 0; block < blocks; ++block) {
    const KeyRange keys = row_range(0, block).keys_of_any();
    max_keys = std::max(max_keys, keys.end - keys.begin / kChunk * kChunk);
  }

  const Index keys_size = packed_strips_size<Scalar>(n_k, in.d), values_size = packed_strips_size<Scalar>(in.dv, n_k);
  auto* const heads = workspace.take<PackedHead<Scalar>>(wave);
  const Index pieces = divide_up(n_k, kPackRows);
  auto* const finite = workspace.take<bool>(wave * pieces);
  auto* const keys = workspace.take<Scalar>(wave * key_maps * keys_size);
  auto* const values = workspace.take<Scalar>(wave * values_size);
  PackedHead<Scalar> shape;
  shape.value_stride = shape.n_k = n_k;
  shape.d = in.d;
  shape.dv = in.dv;
  auto* const scratch = workspace.take<Block>(workers);
  for (Index worker = 0; worker < workers; ++worker) {
    new (scratch + worker) Block(workspace, shape, max_keys, std::min(n_q, Block::kBlockRows));
  }

  for (Index first_head = 0; first_head < in.heads.num_kv_heads; first_head += wave) {
    const Index present = std::min(wave, in.heads.num_kv_heads - first_head);
    for (Index i = 0; i < present; ++i) {
      heads[i] = shape;
      for (Index map = 0; map < Block::kMaps; ++map) {
        heads[i].keys[map] = keys + (i * key_maps + std::min(map, key_maps - 1)) * keys_size;
      }
      heads[i].values = values + i * values_size;
    }

    executor.run(present * pieces, [&](Index task, Index /*worker*/) {
      const Index i = task / pieces, head = first_head + i, row = task % pieces * kPackRows;
      const Index count = std::min(kPackRows, n_k - row);
      for (Index map = 0; map < key_maps; ++map) {
        pack_transposed(keys + (i * key_maps + map) * keys_size, in.k[map].middle_cols(head * in.k_step, in.d), row,
                        count);
      }
      finite[task] = pack_columns(values + i * values_size + row * Tile<Scalar>::kCols, n_k,
                                  in.v.block(row, head * in.dv, count, in.dv), true);
    });
    for (Index i = 0; i < present; ++i) {
      heads[i].finite_values =
          std::all_of(finite + i * pieces, finite + (i + 1) * pieces, [](bool yes) { return yes; });
    }

    executor.run(present * group * blocks, [&](Index task, Index worker) {
      // Head by head, so that packed keys stay in cache; within one, the last rows, which see most under a causal mask,
      // go first, so that short tasks are left for the end.
      const Index block = blocks - 1 - task % blocks, i = task / blocks / group;
      const Index head = first_head * group + task / blocks;
      const RowRange<Mask> rows = row_range(head, block);
      StridedView<const Scalar> q[Block::kMaps];
      for (Index map = 0; map < Block::kMaps; ++map) {
        q[map] = in.q[map].block(rows.first, head * in.q_step, rows.count, in.d);
      }
      scratch[worker].run(in.out.block(rows.first, head * in.dv, rows.count, in.dv), q, heads[i], rows, scale,
                          in.lambda, in.lse, head);
    });
  }
}

}  // namespace diffattn::inline v0_1::detail
