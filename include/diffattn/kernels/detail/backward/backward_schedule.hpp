#pragma once

// How the backward pass of all heads becomes tasks. dK and dV of a key head add up over all query rows that read it,
// so those rows are split into parts, how many depending on the shape alone: each part is a task that walks its row
// blocks in order and adds to sums of its own, and the parts' sums are added up in order. Who runs a task, and how many
// run at once, changes nothing in the result.

#include <algorithm>
#include <new>

#include "diffattn/core/executor_view.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward/backward_block.hpp"
#include "diffattn/kernels/detail/backward/backward_packing.hpp"
#include "diffattn/kernels/detail/backward/bias_gradient.hpp"
#include "diffattn/kernels/detail/backward/block_parts.hpp"
#include "diffattn/kernels/detail/backward/gradient_sums.hpp"
#include "diffattn/kernels/detail/mask_view.hpp"
#include "diffattn/kernels/detail/operands.hpp"

namespace diffattn::inline v0_1::detail {

/// The gradients of a call without queries or without keys.
template <typename Scalar, Index kMaps>
void write_zero_gradients(const HeadGradients<Scalar, kMaps>& grad) {
  for (Index map = 0; map < kMaps; ++map) {
    write_constant(grad.of_q[map], Scalar(0));
    write_constant(grad.of_k[map], Scalar(0));
  }
  write_constant(grad.of_v, Scalar(0));
  write_constant(grad.of_bias, Scalar(0));
  if (kMaps == 2) std::fill_n(grad.d2, grad.heads.num_heads * grad.dout.rows, Scalar(0));
}

/// run_heads_backward with its mask and its executor as they are viewed.
template <typename Scalar, Index kMaps, typename Mask, typename E>
void run_viewed_heads_backward(const HeadOperands<Scalar, kMaps>& in, const HeadGradients<Scalar, kMaps>& grad,
                               const Mask& mask, Workspace& workspace, E& executor) {
  using Block = BackwardBlock<Scalar, kMaps>;
  const Index n_q = in.n_q(), n_k = in.n_k(), kv_heads = in.heads.num_kv_heads, workers = executor.concurrency();
  if (n_q == 0 || n_k == 0) return write_zero_gradients(grad);

  const auto frame = workspace.frame();
  const BlockParts parts(in, mask, n_q, n_k, Block::kBlockRows, workspace);
  const Index wave = std::min(kv_heads, workers);               // key heads packed at a time
  const Index slots = std::min(wave * parts.count(), workers);  // tasks at a time, each with sums of its own
  BackwardPacking<Scalar, kMaps> packing(in, keys_of_any_query(mask, n_q, n_k), wave, workspace);
  const GradientSums<Scalar, kMaps> sums(in, grad, slots, workspace);
  const BiasGradientSums<Scalar> bias_sums(grad.of_bias, in.heads_per_kv_head(), slots, workspace);
  auto* const scratch = workspace.take<Block>(workers);
  const Index most_keys = parts.most_keys();
  // A learned bias has a gradient from each head by itself.
  const Index heads_of_noise = bias_sums.wanted() ? 1 : heads_with_one_noise_map(in, mask, n_q);
  for (Index worker = 0; worker < workers; ++worker) {
    new (scratch + worker) Block(workspace, packing.shape(), n_q, most_keys, HasBias<Mask>, heads_of_noise);
  }

  for (Index first_head = 0; first_head < kv_heads; first_head += wave) {
    const Index present = std::min(wave, kv_heads - first_head);
    packing.pack(first_head, present, executor);
    // Task t is part t / present of key head t % present.
    for (Index first_task = 0; first_task < present * parts.count(); first_task += slots) {
      const Index tasks = std::min(slots, present * parts.count() - first_task);
      executor.run(tasks, [&](Index slot, Index worker) {
        const Index i = (first_task + slot) % present;
        const BlockPart& part = parts[(first_task + slot) / present];
        sums.clear(slot, part.keys);
        bias_sums.clear(slot);
        for (Index b = part.begin; b < part.end; ++b) {
          const auto rows = parts.rows_of((first_head + i) * in.heads_per_kv_head(), b);
          scratch[worker].run(in, grad, packing[i], sums[slot], bias_sums[slot], rows);
        }
      });
      const Index pieces = divide_up(n_k, kPieceKeys);
      executor.run(std::min(tasks, present) * pieces, [&](Index index, Index /*worker*/) {
        const Index row = index % pieces * kPieceKeys, count = std::min(kPieceKeys, n_k - row);
        for (Index slot = index / pieces; slot < tasks; slot += present) {
          const Index task = first_task + slot;
          sums.write(slot, first_head + task % present, row, count, parts[task / present].keys, task >= present);
        }
      });
      for (Index task = first_task; task < first_task + tasks; ++task) {
        bias_sums.write(task - first_task, first_head + task % present, task >= present);
      }
    }
  }
}

/// The gradients of all heads, and D of the second map where grad.d2 points.
template <typename Scalar, Index kMaps, typename Mask, Executor E>
void run_heads_backward(const HeadOperands<Scalar, kMaps>& in, const HeadGradients<Scalar, kMaps>& grad,
                        const Mask& mask, Workspace& workspace, E& executor) {
  check_keys_are_here<E>();
  const ViewedMaskOfBackward<Scalar, Mask> seen(mask);
  ViewedExecutor<E> viewed(executor);
  run_viewed_heads_backward(in, grad, seen, workspace, viewed);
}

}  // namespace diffattn::inline v0_1::detail
