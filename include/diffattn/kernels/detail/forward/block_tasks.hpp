#pragma once

// The row blocks of one call as tasks: every block of query rows of every query head is one, or of all query heads that
// share a map of noise. No two tasks write the same value and none adds to another's, so the result does not depend on
// who runs them.

#include <algorithm>
#include <new>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/detail/forward/packed_heads.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/detail/scores.hpp"

namespace diffattn::inline v0_1::detail {

/// The blocks of a call with n_k keys. Block: StandardBlock or DifferentialBlock.
template <typename Block, typename Mask>
class BlockTasks {
  using Operands = typename Block::Operands;
  using Scalar = typename Operands::Scalar;

 public:
  BlockTasks(const Operands& in, const Mask& mask, Index n_k)
      : in_(in),
        mask_(mask),
        n_k_(n_k),
        heads_of_task_(heads_with_one_noise_map(in, mask, in.n_q())),
        blocks_(divide_up(in.n_q(), kBlockRows)),
        scale_(split_scale<Mask>(in.scale)) {}

  /// Tasks of one key head: the blocks of its sharers.
  Index of_key_head() const { return in_.heads_per_kv_head() / heads_of_task_ * blocks_; }

  /// The most keys that a block sees, counted from the start of the chunk that the first is in.
  Index most_keys() const {
    Index most = 0;
    for (Index block = 0; block < blocks_; ++block) {
      const KeyRange keys = rows(0, block).keys_of_any();
      most = std::max(most, keys.end - keys.begin / kChunk * kChunk);
    }
    return most;
  }

  /// Takes scratch for every worker, for blocks that see up to max_keys keys.
  template <typename Packed>
  void take_scratch(const PackedHead<Packed>& shape, Index max_keys, Workspace& workspace, Index workers) {
    scratch_ = workspace.take<Block>(workers);
    for (Index worker = 0; worker < workers; ++worker) {
      new (scratch_ + worker) Block(workspace, shape, max_keys, std::min(in_.n_q(), kBlockRows), HasBias<Mask>);
    }
  }

  /// Runs the blocks of key heads [first, first + count); packed[i] is the i-th of them.
  template <typename Packed, typename E>
  void run(Index first, Index count, const Packed& packed, E& executor) const {
    executor.run(count * of_key_head(), [&](Index task, Index worker) {
      // Head by head, so that packed keys stay in cache; within one, the last rows, which see most under a causal mask,
      // go first, so that short tasks are left for the end.
      const Index head = first * in_.heads_per_kv_head() + task / blocks_ * heads_of_task_;
      const Index block = blocks_ - 1 - task % blocks_;
      scratch_[worker].run(in_, packed[task / of_key_head()], rows(head, block), heads_of_task_, scale_);
    });
  }

 private:
  RowRange<Mask> rows(Index head, Index block) const {
    const Index first = block * kBlockRows;
    return {mask_, head, first, std::min(kBlockRows, in_.n_q() - first), in_.n_q(), n_k_};
  }

  const Operands& in_;
  const Mask& mask_;
  Index n_k_;
  Index heads_of_task_;
  Index blocks_;  // of one query head
  ScoreScale<Scalar> scale_;
  Block* scratch_ = nullptr;  // of each worker
};

}  // namespace diffattn::inline v0_1::detail
