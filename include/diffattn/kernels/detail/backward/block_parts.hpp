#pragma once

// The row blocks of one key head, split into parts of about equal work: each part is a task that walks its blocks in
// order and adds to sums of its own. A block is that of one query head, or of all that share their second map.

#include <algorithm>

#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward/backward_block.hpp"
#include "diffattn/kernels/detail/visible_pairs.hpp"

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

/// The blocks of a call, in parts. How many depends on the shape alone.
template <typename Mask>
class BlockParts {
 public:
  BlockParts(const HeadLayout& layout, const Mask& mask, Index n_q, Index n_k, Index block_rows, Workspace& workspace)
      : mask_(mask),
        n_q_(n_q),
        n_k_(n_k),
        heads_of_block_(layout.noise_sharers),
        block_rows_(block_rows),
        blocks_(divide_up(n_q, block_rows)) {
    const Index all = layout.heads_per_kv_head() / heads_of_block_ * blocks_;
    count_ = std::clamp<Index>(std::min(all, all * heads_of_block_ / kLeastBlocks), 1,
                               divide_up(kMostParts, layout.heads.num_kv_heads));
    parts_ = workspace.take<BlockPart>(count_);
    split_blocks(parts_, count_, all, [&](Index b) { return rows(0, b % blocks_).keys_of_any(); });
  }

  /// Of each key head.
  Index count() const { return count_; }
  const BlockPart& operator[](Index part) const { return parts_[part]; }

  /// The most keys that a block sees.
  Index most_keys() const {
    Index most = 0;
    for (Index block = 0; block < blocks_; ++block) {
      const KeyRange keys = rows(0, block).keys_of_any();
      most = std::max(most, keys.end - keys.begin);
    }
    return most;
  }

  /// The rows of block `b` of a part, where first_head is the first query head that reads its key head; of the first
  /// head of the block, if it has several.
  RowRange<Mask> rows_of(Index first_head, Index b) const {
    return rows(first_head + b / blocks_ * heads_of_block_, b % blocks_);
  }

 private:
  static constexpr Index kMostParts = 8;    // of a call with one key head
  static constexpr Index kLeastBlocks = 8;  // of one head, that make a part worth its sums

  RowRange<Mask> rows(Index head, Index block) const {
    const Index first = block * block_rows_;
    return {mask_, head, first, std::min(block_rows_, n_q_ - first), n_q_, n_k_};
  }

  const Mask& mask_;
  Index n_q_;
  Index n_k_;
  Index heads_of_block_;
  Index block_rows_;
  Index blocks_;  // of one query head
  Index count_;
  BlockPart* parts_;
};

}  // namespace diffattn::inline v0_1::detail
