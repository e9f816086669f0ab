#pragma once

// Where the keys of one rank's cache stand in the sequence that ranks share, and a mask of the sequence as those keys
// meet it.

#include <algorithm>
#include <vector>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/bias.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

/// Keys in the order of the sequence, in runs that stand behind each other in it.
class CachedPositions {
 public:
  /// The next `count` keys of the cache stand at `position` and behind it, which is behind all there are.
  void append(Index position, Index count) {
    if (!runs_.empty() && runs_.back().position + runs_.back().count == position) {
      runs_.back().count += count;
    } else {
      runs_.push_back({size(), position, count});
    }
  }
  /// Finds memory for one more run: the next append() does not fail.
  void reserve_run() {
    if (runs_.size() == runs_.capacity()) runs_.reserve(2 * runs_.size() + 2);
  }
  /// Forgets the keys at `position` and behind it.
  void truncate(Index position) {
    while (!runs_.empty() && runs_.back().position >= position) runs_.pop_back();
    if (!runs_.empty()) runs_.back().count = std::min(runs_.back().count, position - runs_.back().position);
  }

  Index size() const { return runs_.empty() ? 0 : runs_.back().first + runs_.back().count; }
  /// How many of the keys stand before `position`.
  Index before(Index position) const {
    const auto behind = [](Index p, const Run& run) { return p <= run.position; };
    const auto run = std::upper_bound(runs_.begin(), runs_.end(), position, behind);
    if (run == runs_.begin()) return 0;
    const Run& last = *(run - 1);
    return last.first + std::min(last.count, position - last.position);
  }
  Index position(Index key) const {
    const auto behind = [](Index k, const Run& run) { return k < run.first; };
    const Run& run = *(std::upper_bound(runs_.begin(), runs_.end(), key, behind) - 1);
    return run.position + key - run.first;
  }

 private:
  struct Run {
    Index first;  // key
    Index position;
    Index count;
  };
  std::vector<Run> runs_;
};

/// `mask`, of all `tokens` tokens, for the keys that are here.
template <typename Mask>
struct CachedMask {
  const Mask& mask;
  const CachedPositions& positions;
  Index tokens;

  KeyRange visible_keys(Index query, Index n_q, Index /*n_k*/) const {
    const KeyRange seen = mask.visible_keys(query, n_q, tokens);
    return {positions.before(seen.begin), positions.before(std::max(seen.begin, seen.end))};
  }
  auto bias(Index head, Index query, Index key, Index n_q, Index /*n_k*/) const requires HasBias<Mask> {
    return mask.bias(head, query, positions.position(key), n_q, tokens);
  }
  bool same_for_all_heads(Index n_q) const { return detail::same_for_all_heads(mask, n_q); }
};

}  // namespace diffattn::inline v0_1::detail
