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

/// One of several sequences: which, and where its queries and its keys lie in the rows of theirs.
struct SequenceRows {
  Index number;
  Index first;
  Index count;
  Index first_key;
  Index num_keys;
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

/// Whether sequences give all workers about as much to do when each stays with one; attention's work is the pairs.
inline bool run_side_by_side(const SequenceLengths& lengths, const SequenceLengths& key_lengths, Index workers) {
  double longest = 0, all = 0;
  for (Index s = 0; s < lengths.size(); ++s) {
    const double work = static_cast<double>(lengths[s]) * static_cast<double>(key_lengths[s]);
    longest = std::max(longest, work);
    all += work;
  }
  const Index rounds = (lengths.size() + workers - 1) / workers;
  return workers > 1 && longest * static_cast<double>(rounds * workers) <= 1.25 * all;
}

/// Calls f(sequence, workspace, executor) for each sequence: side by side, each on one worker, which wakes the threads
/// once; or, if that left some idle, one after another on all of them. Queries and keys have as many sequences.
template <Executor E, typename F>
requires(!spreads_sequences<E>) void for_each_sequence(const SequenceLengths& lengths,
                                                       const SequenceLengths& key_lengths, Workspace& workspace,
                                                       E& executor, F&& f) {
  const Index count = lengths.size(), workers = executor.concurrency();
  const auto frame = workspace.frame();
  auto* const rows = workspace.take<SequenceRows>(count);
  for (Index s = 0, first = 0, first_key = 0; s < count; ++s) {
    rows[s] = {s, first, lengths[s], first_key, key_lengths[s]};
    first += rows[s].count;
    first_key += rows[s].num_keys;
  }
  if (!run_side_by_side(lengths, key_lengths, workers)) {
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

/// The same for the rows that this rank has of the one sequence that ranks share.
template <Executor E, typename F>
requires(spreads_sequences<E>) void for_each_sequence(const SequenceLengths& lengths,
                                                      const SequenceLengths& key_lengths, Workspace& workspace,
                                                      E& executor, F&& f) {
  f(SequenceRows{0, 0, lengths[0], 0, key_lengths[0]}, workspace, executor);
}

/// Throws ShapeError unless x, or what `name` says, has embed_dim columns.
inline void check_width(const char* where, const char* name, Index embed_dim, Index x_rows, Index x_cols) {
  if (x_cols != embed_dim && x_rows == embed_dim) {
    throw_shape({where, ": ", name, " must have embed_dim = ", embed_dim, " columns, one token a row, got ", x_rows,
                 " x ", x_cols, ": did you mean ", name, ".transpose()?"});
  }
  if (x_cols != embed_dim) throw_shape(where, name, x_rows, embed_dim, x_rows, x_cols);
}

/// Throws ShapeError unless x has embed_dim columns and y its shape.
inline void check_tokens(const char* where, Index embed_dim, Index x_rows, Index x_cols, Index y_rows, Index y_cols) {
  check_width(where, "x", embed_dim, x_rows, x_cols);
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
  template <typename T>
  void fill_bias(T* row, const BiasRow& of) const requires HasBias<Mask> {
    fill_biases(BiasOfMask<Mask>{mask}, row, of);
  }
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

/// Rows [first, first + count) of a matrix in which heads lie side by side.
template <typename Scalar>
struct HeadRows {
  MatrixMap<Scalar>& matrix;
  Index heads;
  Index first;
  Index count;
};

/// f(first, count, position) for the rows that stand at `position` of their sequence and behind it: all of them, or,
/// where ranks share the sequence, those of each piece that is here.
template <typename E, typename F>
void for_each_run(E& executor, Index count, Index position, const F& f) {
  if constexpr (spreads_sequences<E> && !spreads_caches<E>) {
    executor.placement().for_each_piece(f);
  } else {
    f(Index{0}, count, position);
  }
}

/// Turns the queries and keys of a sequence, whose first ones stand at `position`; or, transposed, their gradients back.
template <typename Scalar, Executor E>
void rotate_rows(const std::optional<Rotary<Scalar>>& rotary, const HeadRows<Scalar>& q, const HeadRows<Scalar>& k,
                 Index position, E& executor, Turn turn) {
  if (!rotary) return;
  for_each_row_block(std::max(q.count, k.count), executor, [&](Index row, Index rows) {
    for (const HeadRows<Scalar>* part : {&q, &k}) {
      const Index count = std::min(rows, part->count - row);
      if (count <= 0) continue;
      rotary->apply(writable_view_of(rows_of(part->matrix, part->first + row, count)), part->heads, position + row,
                    position + part->count, turn);
    }
  });
}

}  // namespace diffattn::inline v0_1::detail
