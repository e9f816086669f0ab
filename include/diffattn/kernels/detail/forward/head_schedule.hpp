#pragma once

// Which way a call goes, and how its heads become tasks. A handful of queries and keys, and a few queries, have ways of
// their own (few_rows/). Otherwise keys and values of a head are packed once, and then every block of query rows of
// every query head that reads them is a task (block_tasks.hpp).

#include <algorithm>

#include "diffattn/core/executor_view.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/few_rows/few_rows_in_place.hpp"
#include "diffattn/kernels/detail/few_rows/small_problem.hpp"
#include "diffattn/kernels/detail/forward/block_tasks.hpp"
#include "diffattn/kernels/detail/forward/packed_heads.hpp"
#include "diffattn/kernels/detail/forward/row_block.hpp"
#include "diffattn/kernels/detail/mask_view.hpp"
#include "diffattn/kernels/detail/operands.hpp"

namespace diffattn::inline v0_1::detail {

/// Attention in row blocks, for any number of queries and keys, at least one of each.
template <typename Block, typename Mask, Executor E>
void run_blocks(const typename Block::Operands& in, const Mask& mask, Workspace& workspace, E& executor) {
  const auto frame = workspace.frame();
  const Index kv_heads = in.heads.num_kv_heads, workers = executor.concurrency();
  BlockTasks<Block, Mask> tasks(in, mask, in.n_k());
  const Index wave = workers == 1 ? 1 : std::min(kv_heads, divide_up(kTasksPerWorker * workers, tasks.of_key_head()));
  HeadPacking<typename Block::Operands> packing(in, keys_of_any_query(mask, in.n_q(), in.n_k()), wave, workspace);
  tasks.take_scratch(packing.shape(), tasks.most_keys(), workspace, workers);
  for (Index first = 0; first < kv_heads; first += wave) {
    const Index count = std::min(wave, kv_heads - first);
    packing.pack(first, count, executor);
    tasks.run(first, count, packing, executor);
  }
}

/// run_heads with its mask and its executor as they are viewed.
template <typename Block, typename Mask, typename E>
void run_viewed_heads(const typename Block::Operands& in, const Mask& mask, Workspace& workspace, E& executor) {
  using Operands = typename Block::Operands;
  if (in.n_q() == 0) return;
  if (in.n_k() == 0) {
    for (const auto& statistics : in.statistics) statistics.clear();
    return write_constant(in.out, typename Operands::Result(0));
  }
  using Small = SmallProblem<Operands, Mask>;
  if (Small::suits(in)) return Small::run(in, mask, executor);
  using InPlace = InPlaceSource<Operands>;
  if (InPlace::suits(in)) {
    return FewRows<Operands, Mask, InPlace>::run(in, {}, in.n_k(), mask, workspace, executor);
  }
  run_blocks<Block>(in, mask, workspace, executor);
}

/// Attention of all heads, by whichever way is the fastest for its sizes. Block: StandardBlock or DifferentialBlock.
template <typename Block, typename Mask, Executor E>
void run_heads(const typename Block::Operands& in, const Mask& mask, Workspace& workspace, E& executor) {
  check_keys_are_here<E>();
  const ViewedMask<typename Block::Operands::Scalar, Mask> seen(mask);
  ViewedExecutor<E> viewed(executor);
  run_viewed_heads<Block>(in, seen, workspace, viewed);
}

}  // namespace diffattn::inline v0_1::detail
