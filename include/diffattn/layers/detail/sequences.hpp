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
#include "diffattn/core/sizes.hpp"
#include "diffattn/layers/rotary.hpp"

namespace diffattn::inline v0_1::detail {

/// Throws std::invalid_argument unless the lengths are 0 or more and add up to `rows`.
inline void check_lengths(const char* where, std::span<const Index> lengths, Index rows) {
  Index sum = 0;
  for (const Index length : lengths) {
    if (length < 0) throw_invalid({where, ": a sequence cannot have ", length, " tokens"});
    sum += std::min(length, std::numeric_limits<Index>::max() - sum);
  }
  if (sum != rows) {
    throw_shape({where, ": the lengths of the sequences must add up to the ", rows, " rows of x, got ", sum});
  }
}

/// Calls f(first row, tokens) for each sequence.
template <typename F>
void for_each_sequence(std::span<const Index> lengths, F&& f) {
  Index first = 0;
  for (const Index length : lengths) {
    f(first, length);
    first += length;
  }
}

/// Calls f(first, count) for pieces of `rows` rows, spread over the executor.
template <Executor E, typename F>
void for_each_row_block(Index rows, E& executor, F&& f) {
  constexpr Index kRows = 64;
  executor.run((rows + kRows - 1) / kRows,
               [&](Index task, Index /*worker*/) { f(task * kRows, std::min(kRows, rows - task * kRows)); });
}

/// Throws std::invalid_argument naming the field unless it is at least 1.
inline void check_positive(const char* where, const char* field, Index value) {
  if (value < 1) {
    throw_invalid({where, ": ", field, " must be at least 1, got ", value});
  }
}

/// The value, once it is known to be at least 1: for constructors, which need their numbers before their body.
inline Index checked_positive(const char* where, const char* field, Index value) {
  check_positive(where, field, value);
  return value;
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

/// Scratch seen as a matrix with contiguous rows.
template <typename Scalar>
using MatrixMap = Eigen::Map<Matrix<Scalar>>;

/// Rows [first, first + count), as the same type: Eigen's middleRows is another, and every type costs compile time.
template <typename Scalar>
MatrixMap<Scalar> rows_of(MatrixMap<Scalar>& matrix, Index first, Index count) {
  return MatrixMap<Scalar>(matrix.data() + first * matrix.cols(), count, matrix.cols());
}

template <typename Scalar>
Eigen::Map<const Matrix<Scalar>> rows_of(const Matrix<Scalar>& matrix, Index first, Index count) {
  return {matrix.data() + first * matrix.cols(), count, matrix.cols()};
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
