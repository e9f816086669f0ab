#pragma once

// Where the (m, l) of a call's rows go, or come from: how attention over parts of the keys is put together again
// (kernels/softmax_statistics.hpp). Every way of the kernels asks total() for what it divides a row's weights by.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/detail/scores.hpp"
#include "diffattn/kernels/detail/softmax.hpp"

namespace diffattn::inline v0_1::detail {

/// (m, l) of one map, n_q x num_heads each. No data: nobody wants them. Otherwise they are handed out; or, once they
/// are `given`, weights are divided by these sums and not by those of the keys that the call has seen itself.
template <typename Scalar>
struct RowStatistics {
  RowStatistics() = default;
  RowStatistics(const StridedView<Scalar>& of_m, const StridedView<Scalar>& of_l, bool are_given = false)
      : m(of_m), l(of_l), given(are_given) {}

  StridedView<Scalar> m, l;
  bool given = false;

  bool handed_out() const { return m.data != nullptr && !given; }

  /// What makes probabilities of the weights of a row, which are relative to own.base and sum to own.sum.
  Scalar total(Index row, Index head, const BaseAndSum<Scalar>& own, const ScoreScale<Scalar>& scale) const {
    return m.data == nullptr ? own.sum : exchanged_total(row, head, own, scale);
  }

  /// For a head that shares the map of another.
  void copy_head(Index from, Index to) const {
    for (Index row = 0; handed_out() && row < m.rows; ++row) {
      m(row, to) = m(row, from);
      l(row, to) = l(row, from);
    }
  }

  /// Of rows that see no key, all of them.
  void clear() const {
    for (Index row = 0; handed_out() && row < m.rows; ++row) {
      for (Index head = 0; head < m.cols; ++head) {
        m(row, head) = kMinusInfinity<Scalar>;
        l(row, head) = Scalar(0);
      }
    }
  }

  /// Those of one row.
  RowStatistics of_row(Index row) const {
    if (m.data == nullptr) return *this;
    return {m.middle_rows(row, 1), l.middle_rows(row, 1), given};
  }

 private:
  /// Out of line: calls that want none should not pay for it.
  EIGEN_DONT_INLINE Scalar exchanged_total(Index row, Index head, const BaseAndSum<Scalar>& own,
                                           const ScoreScale<Scalar>& scale) const {
    // A base is a score but for a factor, which is 1 under a bias: e^score = 2^(of_exponent · base). What rounding takes
    // off the largest score goes to the sum, so that only differences of scores are rounded, as within one softmax.
    using Limits = std::numeric_limits<Scalar>;
    const auto factor = static_cast<Scalar>(static_cast<double>(scale.of_exponent) * std::numbers::ln2);
    const Scalar product = own.base * factor, largest = std::clamp(product, Limits::lowest(), Limits::max());
    const Scalar rest = std::isfinite(product) ? std::fma(own.base, factor, -product) : Scalar(0);
    if (given) {
      const Scalar all = l(row, head);
      return all == Scalar(0) ? Scalar(0) : all * std::exp((m(row, head) - largest) - rest);
    }
    const bool seen = own.sum != Scalar(0);
    m(row, head) = seen ? largest : kMinusInfinity<Scalar>;
    l(row, head) = seen ? own.sum * std::exp(rest) : Scalar(0);
    return own.sum;
  }
};

}  // namespace diffattn::inline v0_1::detail
