#pragma once

// What a softmax over some of the keys leaves behind, so that it can be put together with others over other keys:
//
//   m = the score that l is relative to, the largest of the row or one close below it        −inf: no key was seen
//   l = Σ exp(score − m) over the keys seen                                                  0: no key was seen
//   log_sum_exp(statistics) = m + log l                                                      −inf: no key was seen
//
// for every query row and head, n_q x H each. Scores are s·q·k + bias. Of disjoint sets of keys, merge() makes those of
// all of them (Milakov and Gimelshein, arXiv 1805.02867). Who hands them out: partial_attention.hpp,
// attention_in_phases.hpp. Only their combination m + log l is determined: m may be another score for the same keys
// when a call takes another way.
//
// A NaN or +inf among the scores makes l NaN, and then all that is merged with it, as it does within one softmax.

#include <cmath>
#include <initializer_list>
#include <limits>
#include <span>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

/// (m, l) of every query row and head, n_q x H each; float, double, or what reference.hpp computes in.
template <typename Scalar>
struct SoftmaxStatistics {
  Matrix<Scalar> m;
  Matrix<Scalar> l;

  /// n_q x num_heads of either. Allocates only when they grow.
  void resize(Index n_q, Index num_heads) {
    m.resize(n_q, num_heads);
    l.resize(n_q, num_heads);
  }
};

/// Those of both maps of differential heads.
template <typename Scalar>
struct DiffSoftmaxStatistics {
  SoftmaxStatistics<Scalar> first;
  SoftmaxStatistics<Scalar> second;
};

/// m + log l, n_q x H: the logarithm of Σ exp(score) of every row; −inf for one that has seen no key.
template <typename Scalar>
Matrix<Scalar> log_sum_exp(const SoftmaxStatistics<Scalar>& statistics) {
  detail::check_shape("log_sum_exp", "l", statistics.l, statistics.m.rows(), statistics.m.cols());
  Matrix<Scalar> result = statistics.m;
  for (Index i = 0; i < result.size(); ++i) {
    if (statistics.l.data()[i] != Scalar(0)) result.data()[i] += std::log(statistics.l.data()[i]);
  }
  return result;
}

namespace detail {

/// (m, l) of one row from those of its parts, which of(i) returns as a pair of numbers; parts that saw no key count for
/// nothing. In the order of the parts, so that the same parts give the same bits.
template <typename Scalar, typename Of>
void merge_row(Scalar& m, Scalar& l, Index parts, const Of& of) {
  Scalar largest = -std::numeric_limits<Scalar>::infinity(), sum = 0;
  for (Index i = 0; i < parts; ++i) {
    const auto [part_m, part_l] = of(i);
    if (part_l != Scalar(0) && part_m > largest) largest = part_m;
  }
  for (Index i = 0; i < parts; ++i) {
    const auto [part_m, part_l] = of(i);
    if (part_l != Scalar(0)) sum += part_l * std::exp(part_m - largest);
  }
  m = largest;
  l = sum;
}

template <typename Scalar>
struct RowOfStatistics {
  Scalar m, l;
};

/// Throws std::invalid_argument without parts, ShapeError unless all have the shape of the first.
template <typename Scalar, typename Part, typename StatisticsOf>
void check_parts(const char* where, std::span<const Part> parts, const StatisticsOf& of) {
  if (parts.empty()) throw_invalid({where, ": there must be at least one part"});
  const Matrix<Scalar>& first = of(parts[0]).m;
  for (const Part& part : parts) {
    check_shape(where, "m", of(part).m, first.rows(), first.cols());
    check_shape(where, "l", of(part).l, first.rows(), first.cols());
  }
}

}  // namespace detail

/// The statistics of all keys from those of disjoint sets of them. In the order of the parts: the same parts give the
/// same bits. Throws std::invalid_argument without parts, ShapeError for parts of several shapes.
template <typename Scalar>
SoftmaxStatistics<Scalar> merge(std::span<const SoftmaxStatistics<Scalar>> parts) {
  using Statistics = SoftmaxStatistics<Scalar>;
  detail::check_parts<Scalar>("merge", parts, [](const Statistics& part) -> const Statistics& { return part; });
  Statistics all;
  all.resize(parts[0].m.rows(), parts[0].m.cols());
  for (Index at = 0; at < all.m.size(); ++at) {
    detail::merge_row(all.m.data()[at], all.l.data()[at], static_cast<Index>(parts.size()), [&](Index i) {
      const Statistics& part = parts[static_cast<std::size_t>(i)];
      return detail::RowOfStatistics<Scalar>{part.m.data()[at], part.l.data()[at]};
    });
  }
  return all;
}

/// The statistics of two disjoint sets of keys together. Throws ShapeError.
template <typename Scalar>
SoftmaxStatistics<Scalar> merge(const SoftmaxStatistics<Scalar>& a, const SoftmaxStatistics<Scalar>& b) {
  const SoftmaxStatistics<Scalar> parts[] = {a, b};
  return merge(std::span<const SoftmaxStatistics<Scalar>>(parts));
}

}  // namespace diffattn::inline v0_1
