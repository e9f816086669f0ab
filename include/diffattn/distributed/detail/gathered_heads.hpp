#pragma once

// Keys and values of a group of heads, gathered from all ranks in the order of the sequence; and the gradients that
// every rank has for all of them, brought back to the rank whose rows they are and added up there.

#include <algorithm>
#include <span>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/distributed/sequence_placement.hpp"

namespace diffattn::inline v0_1::detail {

/// Columns of a matrix of somebody else's, whatever its strides: one type for all, which the kernels are compiled for.
template <typename Scalar>
using Columns = Eigen::Map<Matrix<Scalar>, Eigen::Unaligned, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;
template <typename Scalar>
using ConstColumns = Eigen::Map<const Matrix<Scalar>, Eigen::Unaligned, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;

template <typename Scalar>
Columns<Scalar> columns_of(const StridedView<Scalar>& view, Index first, Index count) {
  return {view.data + first * view.col_stride, view.rows, count, {view.row_stride, view.col_stride}};
}
template <typename Scalar>
ConstColumns<Scalar> columns_of(const StridedView<const Scalar>& view, Index first, Index count) {
  return {view.data + first * view.col_stride, view.rows, count, {view.row_stride, view.col_stride}};
}

/// All rows of the sequence, keys beside values: rows() x (key_cols + value_cols).
template <typename Scalar>
class GatheredHeads {
 public:
  GatheredHeads(const SequencePlacement& placement, Index key_cols, Index value_cols, Workspace& workspace)
      : placement_(placement),
        key_cols_(key_cols),
        width_(key_cols + value_cols),
        all_(workspace.take<Scalar>(placement.rows() * width_)),
        counts_(workspace.take<Index>(placement.ranks())),
        mine_(workspace.take<Index>(placement.ranks())) {}

  /// rows() x `count` columns from `first` on.
  StridedView<Scalar> keys() const { return {all_, placement_.rows(), key_cols_, width_, 1}; }
  StridedView<Scalar> values() const { return {all_ + key_cols_, placement_.rows(), width_ - key_cols_, width_, 1}; }

  /// Collective: from this rank's rows of both to those of all ranks.
  template <typename C>
  void gather(C& communicator, const ConstColumns<Scalar>& k, const ConstColumns<Scalar>& v) {
    Index row = 0;
    for (Index half = 0; half < 2; ++half) {
      const Index count = placement_.size_of_piece(placement_.piece_of(placement_.rank(), half));
      Scalar* const mine = half_begin(half) + before_mine(half) * width_;
      columns_of(StridedView<Scalar>{mine, count, width_, width_, 1}, 0, key_cols_) = k.middleRows(row, count);
      columns_of(StridedView<Scalar>{mine, count, width_, width_, 1}, key_cols_, width_ - key_cols_) =
          v.middleRows(row, count);
      row += count;
      communicator.all_gather(span_of(static_cast<const Scalar*>(mine), count), half_of(half), counts(half));
      if (half == 1) to_sequence_order();
    }
  }

  /// What add_up() takes of the workspace, in a frame of the caller's.
  void find_memory(Workspace& workspace) const {
    room_for_parts(placement_.size_of_piece(placement_.piece_of(placement_.rank(), 0)), workspace);
  }

  /// Collective: what all ranks have here for this rank's rows is added up in their order, into dk and dv. What is here
  /// is lost.
  template <typename C>
  void add_up(C& communicator, Columns<Scalar> dk, Columns<Scalar> dv, Workspace& workspace) {
    Index row = 0;
    for (Index half = 0; half < 2; ++half) {
      const auto frame = workspace.frame();
      const Index count = placement_.size_of_piece(placement_.piece_of(placement_.rank(), half));
      Scalar* const from_all = room_for_parts(count, workspace);
      if (half == 1) to_rank_order();
      std::fill_n(mine_, placement_.ranks(), count * width_);
      communicator.all_to_all(half_of(half), counts(half), span_of(from_all, placement_.ranks() * count),
                              std::span<const Index>(mine_, static_cast<std::size_t>(placement_.ranks())));
      for (Index rank = 0; rank < placement_.ranks(); ++rank) {
        const StridedView<Scalar> part{from_all + rank * count * width_, count, width_, width_, 1};
        add(dk, row, columns_of(part, 0, key_cols_), rank == 0);
        add(dv, row, columns_of(part, key_cols_, width_ - key_cols_), rank == 0);
      }
      row += count;
    }
  }

 private:
  /// For what every rank has for `count` rows of this one.
  Scalar* room_for_parts(Index count, Workspace& workspace) const {
    return workspace.take<Scalar>(placement_.ranks() * count * width_);
  }

  static void add(Columns<Scalar>& to, Index row, const Columns<Scalar>& part, bool first) {
    auto rows = to.middleRows(row, part.rows());
    if (first) {
      rows = part;
    } else {
      rows += part;
    }
  }

  Index first_of_half(Index half) const { return half * placement_.first_of_piece(placement_.ranks()); }
  Index end_of_half(Index half) const { return half == 1 ? placement_.rows() : first_of_half(1); }
  Scalar* half_begin(Index half) const { return all_ + first_of_half(half) * width_; }

  template <typename T>
  std::span<T> span_of(T* first, Index rows) const {
    return {first, static_cast<std::size_t>(rows * width_)};
  }
  std::span<Scalar> half_of(Index half) const {
    return span_of(half_begin(half), end_of_half(half) - first_of_half(half));
  }
  /// Rows of the ranks before this one, in a half that is in the order of ranks.
  Index before_mine(Index half) const {
    Index rows = 0;
    for (Index rank = 0; rank < placement_.rank(); ++rank) {
      rows += placement_.size_of_piece(placement_.piece_of(rank, half));
    }
    return rows;
  }
  /// Numbers of every rank in a half.
  std::span<const Index> counts(Index half) {
    for (Index rank = 0; rank < placement_.ranks(); ++rank) {
      counts_[rank] = placement_.size_of_piece(placement_.piece_of(rank, half)) * width_;
    }
    return {counts_, static_cast<std::size_t>(placement_.ranks())};
  }

  /// The late half comes in the order of ranks, which is that of its pieces from the last to the first: all of its rows
  /// are turned round, and then those of each piece.
  void to_sequence_order() {
    reverse_rows(first_of_half(1), placement_.rows());
    reverse_pieces();
  }
  void to_rank_order() {
    reverse_pieces();
    reverse_rows(first_of_half(1), placement_.rows());
  }
  void reverse_pieces() {
    for (Index piece = placement_.ranks(); piece < placement_.pieces(); ++piece) {
      reverse_rows(placement_.first_of_piece(piece), placement_.first_of_piece(piece + 1));
    }
  }
  void reverse_rows(Index first, Index end) {
    for (--end; first < end; ++first, --end) {
      std::swap_ranges(all_ + first * width_, all_ + (first + 1) * width_, all_ + end * width_);
    }
  }

  const SequencePlacement& placement_;
  Index key_cols_;
  Index width_;
  Scalar* all_;    // rows() x width
  Index* counts_;  // of each rank
  Index* mine_;    // of each rank
};

}  // namespace diffattn::inline v0_1::detail
