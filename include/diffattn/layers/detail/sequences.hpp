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
#include "diffattn/kernels/mask.hpp"
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
inline bool run_side_by_side(const SequenceLengths& lengths, Index workers) {
  double longest = 0, all = 0;
  for (Index s = 0; s < lengths.size(); ++s) {
    const double length = static_cast<double>(lengths[s]), work = length * length;
    longest = std::max(longest, work);
    all += work;
  }
  const Index rounds = (lengths.size() + workers - 1) / workers;
  return workers > 1 && longest * static_cast<double>(rounds * workers) <= 1.25 * all;
}

/// Calls f(sequence, workspace, executor) for each sequence: side by side, each on one worker, which wakes the threads
/// once; or, if that left some idle, one after another on all of them.
template <Executor E, typename F>
void for_each_sequence(const SequenceLengths& lengths, Workspace& workspace, E& executor, F&& f) {
  const Index count = lengths.size(), workers = executor.concurrency();
  const auto frame = workspace.frame();
  auto* const rows = workspace.take<SequenceRows>(count);
  for (Index s = 0, first = 0; s < count; ++s) {
    rows[s] = {s, first, lengths[s]};
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

/// Throws ShapeError unless x has embed_dim columns and y its shape.
inline void check_tokens(const char* where, Index embed_dim, Index x_rows, Index x_cols, Index y_rows, Index y_cols) {
  if (x_cols != embed_dim && x_rows == embed_dim) {
    throw_shape({where, ": x must have embed_dim = ", embed_dim, " columns, one token a row, got ", x_rows, " x ",
                 x_cols, ": did you mean x.transpose()?"});
  }
  if (x_cols != embed_dim) throw_shape(where, "x", x_rows, embed_dim, x_rows, x_cols);
  if (y_rows != x_rows || y_cols != embed_dim) throw_shape(where, "y", x_rows, embed_dim, y_rows, y_cols);
}

/// A mask that is not copied: a bias may hold memory, and decoding must not take any.
template <typename Mask>
struct MaskReference {
  const Mask& mask;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const { return mask.visible_keys(query, n_q, n_k); }
  auto bias(Index head, Index query, Index key, Index n_q, Index n_k) const requires HasBias<Mask> {
    return mask.bias(head, query, key, n_q, n_k);
  }
  bool same_for_all_heads(Index n_q) const { return detail::same_for_all_heads(mask, n_q); }
};

/// A view as one type of matrix, whatever its strides: what is a template on it is compiled once.
template <typename Scalar>
using StridedMap = Eigen::Map<Matrix<Scalar>, Eigen::Unaligned, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;
template <typename Scalar>
using ConstStridedMap =
    Eigen::Map<const Matrix<Scalar>, Eigen::Unaligned, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;

template <typename Scalar>
ConstStridedMap<Scalar> map_of(const StridedView<const Scalar>& view) {
  return {view.data, view.rows, view.cols, {view.row_stride, view.col_stride}};
}
template <typename Scalar>
StridedMap<Scalar> map_of(const StridedView<Scalar>& view) {
  return {view.data, view.rows, view.cols, {view.row_stride, view.col_stride}};
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
