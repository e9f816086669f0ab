#pragma once

// Cross-entropy on logits: the mean over counted tokens of −log softmax(logits)[target], and its gradient
//
//   d loss / d logits(i, c) = (softmax(logits)(i, c) − [c = target_i]) / count        0 in rows that do not count
//
// torch.nn.functional.cross_entropy with reduction="mean": no probabilities are stored, and the largest logit of a row
// is taken off first, so any finite logits give a finite loss and gradient.
//
// Shapes   logits (n x vocab), any strides; one target for each row, in [0, vocab) or `ignore_index`, −100 unless it is
//          given: such a row does not count.
// Aliasing the gradient may be written over the logits; no other overlap.
// Errors   ShapeError, or std::invalid_argument for a target out of range; before any work.
// Edges    nothing counted (all targets ignored, or n = 0): loss 0 and gradient 0, where PyTorch gives NaN. A NaN in a
//          row that counts makes the loss NaN; one in a row that does not is never seen.
// Memory   a sum for each row, from the workspace.
// Threads  a row is one task's, and the rows are added up in order: the same bits for any executor.

#include <algorithm>
#include <cmath>
#include <span>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"

namespace diffattn::inline v0_1 {

/// The target that counts for nothing unless another is given: PyTorch's default ignore_index.
inline constexpr Index kIgnoreTarget = -100;

struct CrossEntropyLoss {
  double mean = 0;  ///< nats a counted token
  Index count = 0;  ///< targets that were not ignored
};

namespace detail {

template <typename Logits>
Index check_targets(const Eigen::MatrixBase<Logits>& logits, std::span<const Index> targets, Index ignore) {
  constexpr const char* kName = "cross_entropy";
  const auto given = static_cast<Index>(targets.size());
  if (given != logits.rows()) {
    throw_shape(
        {kName, ": targets must have one entry for each of the ", logits.rows(), " rows of logits, got ", given});
  }
  Index count = 0;
  for (Index i = 0; i < given; ++i) {
    const Index target = targets[static_cast<std::size_t>(i)];
    if (target == ignore) continue;
    if (target < 0 || target >= logits.cols()) {
      throw_invalid({kName, ": target ", i, " must be in [0, ", logits.cols(), ") or ", ignore, ", got ", target});
    }
    ++count;
  }
  return count;
}

/// Adds up −log softmax over the counted rows; with a gradient, writes that too.
template <bool kWithGradient, typename Gradient, typename Logits, Executor E>
CrossEntropyLoss cross_entropy_rows(Gradient& gradient, const Logits& logits, std::span<const Index> targets,
                                    Index ignore, Workspace& workspace, E& executor) {
  using Scalar = typename Logits::Scalar;
  constexpr Index kRows = 16;
  const Index n = logits.rows(), count = check_targets(logits, targets, ignore);
  const auto frame = workspace.frame();
  auto* const losses = workspace.take<double>(n);
  executor.run((n + kRows - 1) / kRows, [&](Index task, Index /*worker*/) {
    for (Index i = task * kRows; i < std::min(n, (task + 1) * kRows); ++i) {
      const Index target = targets[static_cast<std::size_t>(i)];
      losses[i] = 0;
      if (target == ignore) {
        if constexpr (kWithGradient) gradient.row(i).setZero();
        continue;
      }
      const Scalar largest = logits.row(i).maxCoeff(), at_target = logits(i, target);
      if constexpr (kWithGradient) {
        gradient.row(i).array() = (logits.row(i).array() - largest).exp();
        const Scalar sum = gradient.row(i).sum();
        gradient.row(i) *= 1 / (sum * static_cast<Scalar>(count));
        gradient(i, target) -= 1 / static_cast<Scalar>(count);
        losses[i] =
            std::log(static_cast<double>(sum)) + (static_cast<double>(largest) - static_cast<double>(at_target));
      } else {
        const Scalar sum = (logits.row(i).array() - largest).exp().sum();
        losses[i] =
            std::log(static_cast<double>(sum)) + (static_cast<double>(largest) - static_cast<double>(at_target));
      }
    }
  });
  CrossEntropyLoss loss{0, count};
  for (Index i = 0; i < n; ++i) loss.mean += losses[i];
  if (count != 0) loss.mean /= static_cast<double>(count);
  return loss;
}

}  // namespace detail

/// The loss alone. A target of `ignore_index` does not count. Throws ShapeError for another number of targets than rows,
/// std::invalid_argument for a target out of range.
template <typename Logits, Executor E = Serial>
CrossEntropyLoss cross_entropy(const Eigen::MatrixBase<Logits>& logits, std::span<const Index> targets,
                               Index ignore_index = kIgnoreTarget, E&& executor = {}) {
  Workspace workspace;
  const detail::Readable<Logits> read(logits.derived());
  return detail::cross_entropy_rows<false>(read, read, targets, ignore_index, workspace, executor);
}

/// The loss, and its gradient into a matrix of yours: n x vocab, and `logits` itself if you need them no more. Throws as
/// above, and ShapeError for a gradient that is not n x vocab.
template <typename Gradient, typename Logits, Executor E = Serial>
CrossEntropyLoss cross_entropy_into(const Eigen::MatrixBase<Gradient>& gradient,
                                    const Eigen::MatrixBase<Logits>& logits, std::span<const Index> targets,
                                    Index ignore_index, Workspace& workspace, E&& executor = {}) {
  detail::check_shape("cross_entropy", "the gradient", gradient, logits.rows(), logits.cols());
  const detail::Readable<Logits> read(logits.derived());
  auto& writable = const_cast<Gradient&>(gradient.derived());  // Eigen's idiom for an output that may be a temporary
  return detail::cross_entropy_rows<true>(writable, read, targets, ignore_index, workspace, executor);
}

}  // namespace diffattn::inline v0_1
