#pragma once

// The gradient of a learned bias over several sequences: each has one of its own, which are added up in order, so that
// it does not matter which of them run side by side.

#include <optional>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/workspace.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar>
class BiasGradients {
 public:
  /// to: what they are added to. No data: the gradient is not wanted.
  BiasGradients(const StridedView<Scalar>& to, Index sequences, Workspace& workspace)
      : to_(to),
        sequences_(to.data == nullptr ? 0 : sequences),
        gradients_(workspace.take<Scalar>(sequences_ * to.rows * to.cols)) {}

  /// Where that of one sequence is written, if it is wanted.
  std::optional<StridedView<Scalar>> of_sequence(Index number) const {
    if (sequences_ == 0) return std::nullopt;
    return StridedView<Scalar>{gradients_ + number * to_.rows * to_.cols, to_.rows, to_.cols, to_.cols, 1};
  }

  /// Adds those of all sequences to what the caller has.
  void add_up() const {
    for (Index s = 0; s < sequences_; ++s) {
      const StridedView<Scalar> from = *of_sequence(s);
      for (Index head = 0; head < to_.rows; ++head) {
        for (Index column = 0; column < to_.cols; ++column) to_(head, column) += from(head, column);
      }
    }
  }

 private:
  StridedView<Scalar> to_;
  Index sequences_;
  Scalar* gradients_;  // [sequence][head][column]
};

}  // namespace diffattn::inline v0_1::detail
