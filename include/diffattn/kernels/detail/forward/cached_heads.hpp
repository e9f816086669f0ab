#pragma once

// How a call against packed pages becomes tasks: a few queries go page by page (few_rows_packed.hpp), more of them in
// row blocks, as head_schedule.hpp has them, but with nothing left to pack.

#include <algorithm>
#include <type_traits>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/few_rows/few_rows_packed.hpp"
#include "diffattn/kernels/detail/forward/row_block.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/key_value_pages.hpp"

namespace diffattn::inline v0_1::detail {

/// `count` values of strips, widened to Scalar.
template <typename Scalar, typename Storage>
void widen(Scalar* to, const Storage* from, Index count) {
  for (Index i = 0; i < count; i += simd::kLanes<Scalar>) simd::store(to + i, simd::load_as<Scalar>(from + i));
}

template <typename Block, typename Scalar, typename Storage, typename Mask, Executor E>
void run_cached_heads(const HeadOperands<Scalar, Block::kMaps>& in, const KeyValuePages<Storage>& cache,
                      const Mask& mask, Workspace& workspace, E& executor) {
  constexpr Index kDecodeQueries = 4;
  const Index n_q = in.q[0].rows, n_k = cache.n_k;
  if (n_q == 0) return;
  if (n_q <= kDecodeQueries || n_k == 0) {
    const PackedSource<Storage> source{cache};
    return FewRows<Scalar, Block::kMaps, Mask, PackedSource<Storage>>::run(in, source, n_k, mask, workspace, executor);
  }

  const auto frame = workspace.frame();
  const ScoreScale<Scalar> scale = split_scale<Mask>(in.scale);
  const Index group = in.heads.num_heads / in.heads.num_kv_heads, blocks = divide_up(n_q, Block::kBlockRows);
  const Index pages = divide_up(n_k, kPageKeys), key_maps = cache.shape.key_maps, workers = executor.concurrency();
  const Index keys_size = cache.shape.keys_size(), values_size = cache.shape.values_size();
  auto* const parts = workspace.take<PackedPart<Scalar>>(pages);
  PackedHead<Scalar> packed;
  packed.pages = parts;
  packed.value_stride = packed.page_keys = kPageKeys;
  packed.n_k = n_k;
  packed.d = in.d;
  packed.dv = in.dv;
  // Pages of a narrower type are widened, one head at a time.
  Scalar* widened = nullptr;
  if constexpr (!std::is_same_v<Scalar, Storage>) {
    widened = workspace.take<Scalar>(pages * (key_maps * keys_size + values_size));
  }
  auto* const scratch = workspace.take<Block>(workers);
  for (Index worker = 0; worker < workers; ++worker) new (scratch + worker) Block(workspace, packed, n_k);

  for (Index head = 0; head < in.heads.num_kv_heads; ++head) {
    executor.run(pages, [&](Index page, Index /*worker*/) {
      PackedPart<Scalar>& part = parts[page];
      if constexpr (std::is_same_v<Scalar, Storage>) {
        for (Index map = 0; map < Block::kMaps; ++map) {
          part.keys[map] = cache.keys(page, head, std::min(map, key_maps - 1));
        }
        part.values = cache.values(page, head);
      } else {
        Scalar* to = widened + page * (key_maps * keys_size + values_size);
        for (Index map = 0; map < Block::kMaps; ++map) part.keys[map] = to + std::min(map, key_maps - 1) * keys_size;
        for (Index map = 0; map < key_maps; ++map, to += keys_size) {
          widen(to, cache.keys(page, head, map), keys_size);
        }
        widen(to, cache.values(page, head), values_size);
        part.values = to;
      }
    });
    packed.finite_values = true;
    for (Index page = 0; page < pages; ++page) packed.finite_values &= cache.finite_values(page, head);

    executor.run(group * blocks, [&](Index task, Index worker) {
      const Index first = (blocks - 1 - task % blocks) * Block::kBlockRows, query_head = head * group + task / blocks;
      const RowRange<Mask> rows{mask, query_head, first, std::min(Block::kBlockRows, n_q - first), n_q, n_k};
      StridedView<const Scalar> q[Block::kMaps];
      for (Index map = 0; map < Block::kMaps; ++map) {
        q[map] = in.q[map].block(first, query_head * in.q_step, rows.count, in.d);
      }
      scratch[worker].run(in.out.block(first, query_head * in.dv, rows.count, in.dv), q, packed, rows, scale, in.lambda,
                          in.lse, query_head);
    });
  }
}

}  // namespace diffattn::inline v0_1::detail
