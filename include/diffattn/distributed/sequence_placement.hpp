#pragma once

// Where the rows of one long sequence are when several ranks share it: in zigzag. The sequence is cut into 2R pieces,
// as even as they come, and rank r has pieces r and 2R − 1 − r, so that under a causal mask all ranks have the same
// work: the early piece sees little, the late one much. Without a mask it does no harm.
//
//   const SequencePlacement placement(n, communicator.size(), communicator.rank());
//   Matrix<float> mine = placement.rows_of(x);        // of a matrix with a row for each token: those of this rank
//   placement.visible_pairs(CausalMask{});            // what this rank has to do, in pairs of a query and a key
//
// The rows of a rank keep the order of the sequence.

#include <algorithm>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1 {

/// Which rows of a sequence are on which rank, seen from one of them.
class SequencePlacement {
 public:
  /// Of `rows` rows over `ranks` ranks, for rank `rank`. Throws std::invalid_argument for more ranks than rows, and for
  /// a rank that is none.
  SequencePlacement(Index rows, Index ranks, Index rank) : rows_(rows), ranks_(ranks), rank_(rank) {
    if (ranks < 1 || rank < 0 || rank >= ranks) {
      detail::throw_invalid({"SequencePlacement: rank must be from 0 to ", ranks - 1, ", got ", rank});
    }
    if (rows < ranks) {
      detail::throw_invalid({"SequencePlacement: a sequence of ", rows, " rows cannot be spread over ", ranks,
                             " ranks: each must have one row at least"});
    }
  }

  /// How many rows the sequence has.
  Index rows() const { return rows_; }
  /// How many ranks share it.
  Index ranks() const { return ranks_; }
  /// The rank that this is.
  Index rank() const { return rank_; }

  /// 2R.
  Index pieces() const { return 2 * ranks_; }
  /// The first row of a piece; rows() for piece 2R.
  Index first_of_piece(Index piece) const {
    // What is left over goes to the pieces from 0 on and then from 2R − 1 down: to every rank once before any twice.
    const Index least = rows_ / pieces(), left = rows_ % pieces();
    return piece * least + std::min(piece, std::min(left, ranks_)) +
           std::max<Index>(piece - (pieces() - std::max<Index>(left - ranks_, 0)), 0);
  }
  /// How many rows a piece has.
  Index size_of_piece(Index piece) const { return first_of_piece(piece + 1) - first_of_piece(piece); }
  /// The early (0) or the late (1) piece of a rank.
  Index piece_of(Index of_rank, Index half) const { return half == 0 ? of_rank : pieces() - 1 - of_rank; }

  /// How many rows a rank has.
  Index rows_of_rank(Index of_rank) const {
    return size_of_piece(piece_of(of_rank, 0)) + size_of_piece(piece_of(of_rank, 1));
  }
  /// How many rows this rank has.
  Index mine() const { return rows_of_rank(rank_); }
  /// Where the row of this rank stands in the sequence.
  Index position(Index row) const {
    const Index early = size_of_piece(piece_of(rank_, 0));
    return row < early ? first_of_piece(piece_of(rank_, 0)) + row : first_of_piece(piece_of(rank_, 1)) + row - early;
  }

  /// The rank that has the row which stands at `position`, from 0 to rows() − 1. O(ranks()).
  Index rank_of(Index position) const {
    Index piece = 0;
    while (first_of_piece(piece + 1) <= position) ++piece;
    return std::min(piece, pieces() - 1 - piece);
  }

  /// f(first, count, position) for both pieces of this rank: its rows [first, first + count) stand at `position` and
  /// behind it in the sequence.
  template <typename F>
  void for_each_piece(F&& f) const {
    Index first = 0;
    for (Index half = 0; half < 2; ++half) {
      const Index piece = piece_of(rank_, half), count = size_of_piece(piece);
      f(first, count, first_of_piece(piece));
      first += count;
    }
  }

  /// How many pairs of a query and a key attention under `mask` computes on this rank: its work, which is to be the same
  /// on all ranks. O(mine()).
  template <AttentionMask Mask>
  Index visible_pairs(const Mask& mask) const {
    Index pairs = 0;
    for (Index row = 0; row < mine(); ++row) {
      const KeyRange seen = mask.visible_keys(position(row), rows_, rows_);
      pairs += std::max<Index>(std::min(seen.end, rows_) - std::max<Index>(seen.begin, 0), 0);
    }
    return pairs;
  }

  /// The rows of this rank, mine() x x.cols(), of an x that has all of them. Throws ShapeError.
  template <typename X>
  Matrix<typename X::Scalar> rows_of(const Eigen::MatrixBase<X>& x) const {
    detail::check_shape("SequencePlacement", "x", x, rows_, x.cols());
    Matrix<typename X::Scalar> result(mine(), x.cols());
    for_each_piece([&](Index first, Index count, Index position) {
      result.middleRows(first, count) = x.middleRows(position, count);
    });
    return result;
  }

  /// The elements of this rank of a vector that has one for each row: tokens, for one. Throws ShapeError.
  template <typename T>
  std::vector<T> elements_of(const std::vector<T>& all) const {
    if (static_cast<Index>(all.size()) != rows_) {
      detail::throw_shape("SequencePlacement", "the elements", rows_, 1, static_cast<Index>(all.size()), 1);
    }
    std::vector<T> result;
    result.reserve(static_cast<std::size_t>(mine()));
    for_each_piece([&](Index, Index count, Index position) {
      result.insert(result.end(), all.begin() + position, all.begin() + position + count);
    });
    return result;
  }

 private:
  Index rows_;
  Index ranks_;
  Index rank_;
};

}  // namespace diffattn::inline v0_1
