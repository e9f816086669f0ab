#pragma once

// What the attention layers share: several sequences stacked in the rows of one matrix, and the checks at a layer's
// door.

#include <algorithm>
#include <limits>
#include <optional>
#include <span>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/row_blocks.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/layers/rotary.hpp"
#include "diffattn/layers/sequences.hpp"

namespace diffattn::inline v0_1::detail {

/// One of several sequences: which, and where its rows lie.
struct SequenceRows {
  Index number;
  Index first;
  Index count;
};

/// An executor that is another one, or Serial: one type for both, since every type costs compile time.
template <Executor E>
struct SequenceExecutor {
  E* executor;  // null: Serial

  Index concurrency() const { return executor == nullptr ? 1 : executor->concurrency(); }
  template <typename Task>
  void run(Index count, Task&& task) {
    if (executor == nullptr) return Serial::run(count, task);
    executor->run(count, task);
  }
};

/// Whether sequences give all workers about as much to do when each stays with one; attention's work is the square.
inline bool run_side_by_side(std::span<const Index> lengths, Index workers) {
  double longest = 0, all = 0;
  for (const Index length : lengths) {
    const double work = static_cast<double>(length) * static_cast<double>(length);
    longest = std::max(longest, work);
    all += work;
  }
  const Index rounds = (static_cast<Index>(lengths.size()) + workers - 1) / workers;
  return workers > 1 && longest * static_cast<double>(rounds * workers) <= 1.25 * all;
}

/// Calls f(sequence, workspace, executor) for each sequence: side by side, each on one worker, which wakes the threads
/// once; or, if that left some idle, one after another on all of them.
template <Executor E, typename F>
void for_each_sequence(std::span<const Index> lengths, Workspace& workspace, E& executor, F&& f) {
  const auto count = static_cast<Index>(lengths.size()), workers = executor.concurrency();
  const auto frame = workspace.frame();
  auto* const rows = workspace.take<SequenceRows>(count);
  for (Index s = 0, first = 0; s < count; ++s) {
    rows[s] = {s, first, lengths[static_cast<std::size_t>(s)]};
    first += rows[s].count;
  }
  if (!run_side_by_side(lengths, workers)) {
    SequenceExecutor<E> all{&executor};
    for (Index s = 0; s < count; ++s) f(rows[s], workspace, all);
    return;
  }
  const std::span<Workspace> shares = workspace.shares(workers);
  executor.run(count, [&](Index s, Index worker) {
    SequenceExecutor<E> alone{nullptr};
    f(rows[s], shares[static_cast<std::size_t>(worker)], alone);
  });
}

/// embed_dim / parts. Throws std::invalid_argument unless it divides.
inline Index checked_head_dim(const char* where, Index embed_dim, const char* parts_name, Index parts) {
  check_positive(where, "embed_dim", embed_dim);
  if (embed_dim % parts != 0) {
    throw_invalid({where, ": ", parts_name, " = ", parts, " must divide embed_dim = ", embed_dim});
  }
  return embed_dim / parts;
}

template <typename Scalar>
std::optional<Rotary<Scalar>> make_rotary(const std::optional<RotaryConfig>& config, Index head_dim) {
  if (!config) return std::nullopt;
  return Rotary<Scalar>(*config, head_dim);
}

/// Turns the queries and keys of `tokens` tokens from row `first` on, the first of which stands at `position`; or,
/// transposed, their gradients back.
template <typename Scalar, Executor E>
void rotate_rows(const std::optional<Rotary<Scalar>>& rotary, MatrixMap<Scalar>& q, Index q_heads, MatrixMap<Scalar>& k,
                 Index k_heads, Index first, Index tokens, Index position, E& executor, Turn turn = Turn::forward) {
  if (!rotary) return;
  for_each_row_block(tokens, executor, [&](Index row, Index count) {
    rotary->apply(writable_view_of(rows_of(q, first + row, count)), q_heads, position + row, position + tokens, turn);
    rotary->apply(writable_view_of(rows_of(k, first + row, count)), k_heads, position + row, position + tokens, turn);
  });
}

}  // namespace diffattn::inline v0_1::detail
