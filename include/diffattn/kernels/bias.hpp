#pragma once

// Biases: what is added to the scores of the pairs that a mask shows; with_bias(mask, bias) of mask.hpp joins the two.
//
//   with_bias(CausalMask{}, AlibiBias{alibi_slopes(num_heads)})        a slope for every head
//   with_bias(FullMask{}, MatrixBias(m))                               any numbers, -inf where a pair is masked
//   with_bias(mask, RelativeBias(table)), with_bias(mask, IndexedBias(table, column))      learned: learned_bias.hpp
//   with_bias(mask, [](Index head, Index query, Index key, Index n_q, Index n_k) { return …; })      one of your own
//
// A bias is called with (head, query, key, n_q, n_k) and returns a number that is added to scale * q·k. `head` is the
// query head (of a differential kernel the differential head, whose two maps have the same bias). Only -inf masks: a
// finite bias of any size makes a score like any other. A bias may also have
//   void check(const char* where, Index num_heads, Index n_q, Index n_k) const
// which throws if it could not be meant for that many heads, queries and keys; it is asked before any work;
//   void fill(T* row, const BiasRow& of) const
// which tells it for many keys at once and makes it cheaper (bias_row.hpp);
//   bool same_for_all_heads(Index n_q) const
// which says that it does not look at `head` when there are n_q queries (mask.hpp).

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/simd.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/kernels/bias_row.hpp"
#include "diffattn/kernels/learned_bias.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// row[i] = distance(first + i) for whole packets of `count` numbers, made of |first|, |first + 1|, …. Returns how many.
template <typename Number, typename T, typename Set>
EIGEN_ALWAYS_INLINE Index fill_ramp(T* row, Index first, Index count, Set&& set) {
  constexpr Index kLanes = simd::kLanes<Number>;
  alignas(simd::kMostAlignment) static constexpr auto kFromZero = [] {
    std::array<Number, static_cast<std::size_t>(kLanes)> lanes{};
    for (std::size_t lane = 0; lane < lanes.size(); ++lane) lanes[lane] = static_cast<Number>(lane);
    return lanes;
  }();
  const auto step = simd::broadcast(static_cast<Number>(kLanes)), zero = simd::broadcast(Number(0));
  auto at = simd::add(simd::load(kFromZero.data()), simd::broadcast(static_cast<Number>(first)));
  Index i = 0;
  const auto set_some = [&] {
    set(row + i, simd::max(at, simd::sub(zero, at)));
    at = simd::add(at, step);
    i += kLanes;
  };
  while (i + 4 * kLanes <= count) {
#pragma GCC unroll 4
    for (int packet = 0; packet < 4; ++packet) set_some();
  }
  while (i + kLanes <= count) set_some();
  return i;
}

/// row[i] = slope · |first + i|, as the product of two doubles.
template <typename T>
Index fill_ramp_of_doubles(T* row, Index first, Index count, double slope) {
  const auto slopes = simd::broadcast(slope);
  return fill_ramp<double>(row, first, count,
                           [&](T* to, const auto& distance) { simd::store_as(to, simd::mul(slopes, distance)); });
}

/// The same in half the instructions, from the two halves of the slope: but for a rounding of a rounding, which is rare,
/// the fused sum is what the product of doubles rounds to.
inline Index fill_ramp_of_floats(float* row, Index first, Index count, double slope) {
  const float high = static_cast<float>(slope);
  const auto upper = simd::broadcast(high), lower = simd::broadcast(static_cast<float>(slope - double(high)));
  return fill_ramp<float>(row, first, count, [&](float* to, const auto& distance) {
    simd::storeu(to, simd::fma(distance, upper, simd::mul(distance, lower)));
  });
}

/// Whether they are enough for slope · distance, `farthest` at most.
inline bool floats_hold_ramp(double slope, double farthest) {
  constexpr double kWhole = 16777216, kSmallest = 1e-30, kLargest = 1e30;
  return farthest < kWhole && std::abs(slope) >= kSmallest && std::abs(slope) <= kLargest;
}

}  // namespace detail

/// Attention with linear biases (Press et al., arXiv 2108.12409): -slope * distance to the query's own position, before
/// it and behind it alike. Costs a copy of its slopes wherever it is copied.
class AlibiBias {
 public:
  /// The same slope for every head.
  AlibiBias(double slope = 0) : slope_(slope) {}
  /// One slope for each head: refused, with ShapeError, by a call with another number of heads.
  explicit AlibiBias(std::vector<double> slopes) : slopes_(std::move(slopes)) {
    if (slopes_.empty()) detail::throw_invalid({"AlibiBias: slopes must hold one for every head, got none"});
  }

  /// The slope of a query head.
  double slope(Index head) const { return slopes_.empty() ? slope_ : slopes_[static_cast<std::size_t>(head)]; }

  double operator()(Index head, Index query, Index key, Index n_q, Index n_k) const {
    const Index distance = query - n_q + n_k - key;
    return -slope(head) * static_cast<double>(distance < 0 ? -distance : distance);
  }

  /// The biases of a row of keys (bias_row.hpp).
  template <typename T>
  void fill(T* row, const BiasRow& of) const {
    const double slope_here = -slope(of.head);
    const Index first = of.first_key - (of.query - of.n_q + of.n_k);  // ahead of the query by so much
    const double farthest = static_cast<double>(std::max(-first, first + of.count));
    Index filled = 0;
    if constexpr (std::is_same_v<T, float> && simd::kFusesMultiplyAdd) {
      if (detail::floats_hold_ramp(slope_here, farthest)) {
        filled = detail::fill_ramp_of_floats(row, first, of.count, slope_here);
      }
    }
    if (filled == 0 && std::abs(slope_here) * farthest <= kLargest<T>) {
      filled = detail::fill_ramp_of_doubles(row, first, of.count, slope_here);
    }
    for (Index i = filled; i < of.count; ++i) {
      row[i] = detail::converted_bias<T>((*this)(of.head, of.query, of.first_key + i, of.n_q, of.n_k));
    }
  }

  void check(const char* where, Index num_heads, Index /*n_q*/, Index /*n_k*/) const {
    const Index count = static_cast<Index>(slopes_.size());
    if (count != 0 && count != num_heads) {
      detail::throw_shape(
          {where, ": the slopes of AlibiBias must be ", num_heads, ", one for every head, got ", count});
    }
  }
  bool same_for_all_heads(Index /*n_q*/) const { return slopes_.empty(); }

 private:
  template <typename T>
  static constexpr double kLargest = static_cast<double>(std::numeric_limits<T>::max());

  double slope_ = 0;
  std::vector<double> slopes_;  // empty: slope_ for all
};

/// The slopes of Press et al. for this many heads, steepest first: 2^(-8/n), 2^(-16/n), … 2^(-8) for n heads, n a power
/// of two. Others take those of the next lower power, and then every second one of twice as many heads, as the authors'
/// code has it. Throws std::invalid_argument for less than one head.
inline std::vector<double> alibi_slopes(Index num_heads) {
  detail::check_positive("alibi_slopes", "num_heads", num_heads);
  Index power = 1;  // the largest that is no more than num_heads
  while (power <= num_heads / 2) power *= 2;
  const auto slope = [](Index number, Index of) {
    return std::exp2(-8 * static_cast<double>(number) / static_cast<double>(of));
  };
  std::vector<double> slopes;
  for (Index i = 0; i < power; ++i) slopes.push_back(slope(i + 1, power));
  for (Index i = 0; i < num_heads - power; ++i) slopes.push_back(slope(2 * i + 1, 2 * power));
  return slopes;
}

/// Only the first `num_valid` keys are real, the rest is padding. PaddingMask says the same and is cheaper: it skips what
/// it hides, where a bias is asked for every pair.
struct PaddingBias {
  Index num_valid = 0;

  double operator()(Index /*head*/, Index /*query*/, Index key, Index /*n_q*/, Index /*n_k*/) const {
    return key < num_valid ? 0.0 : -std::numeric_limits<double>::infinity();
  }

  /// The biases of a row of keys (bias_row.hpp).
  template <typename T>
  void fill(T* row, const BiasRow& of) const {
    const Index shown = std::clamp<Index>(num_valid - of.first_key, 0, of.count);
    std::fill_n(row, shown, T(0));
    std::fill_n(row + shown, of.count - shown, -std::numeric_limits<T>::infinity());
  }

  void check(const char* where, Index /*num_heads*/, Index /*n_q*/, Index /*n_k*/) const {
    if (num_valid < 0) {
      detail::throw_invalid({where, ": num_valid of PaddingBias must be 0 or more, got ", num_valid});
    }
  }
  bool same_for_all_heads(Index /*n_q*/) const { return true; }
};

/// Any matrix of biases, -inf where a key is masked: n_q x n_k for all heads alike, or (num_heads * n_q) x n_k, that of
/// one head below the other. Another shape is refused with ShapeError. Read in place: it must outlive the mask and,
/// where a tape keeps the mask, the backward pass. A temporary Matrix is refused; a temporary Map or Block is a view
/// like any other.
template <typename Scalar>
class MatrixBias {
 public:
  template <typename Derived>
  explicit MatrixBias(const Eigen::DenseBase<Derived>& matrix) : matrix_(detail::view_of(matrix)) {}
  /// Would be gone before it is read: give the matrix a name.
  template <typename Derived>
  explicit MatrixBias(const Eigen::PlainObjectBase<Derived>&& temporary) = delete;

  Scalar operator()(Index head, Index query, Index key, Index n_q, Index /*n_k*/) const {
    return matrix_(matrix_.rows == n_q ? query : head * n_q + query, key);
  }

  /// The biases of a row of keys (bias_row.hpp).
  template <typename T>
  void fill(T* row, const BiasRow& of) const {
    const Index from = matrix_.rows == of.n_q ? of.query : of.head * of.n_q + of.query;
    const StridedView<const Scalar> biases = matrix_.block(from, of.first_key, 1, of.count);
    // Kernels come back for the keys behind these, after other rows.
    constexpr Index kLine = 64 / static_cast<Index>(sizeof(Scalar));
    if (biases.col_stride == 1) {
      for (Index i = 0; i < of.count; i += kLine) simd::prefetch(biases.data, of.count + i);
    }
    detail::convert_biases(row, biases);
  }

  void check(const char* where, Index num_heads, Index n_q, Index n_k) const {
    if (matrix_.cols == n_k && (matrix_.rows == n_q || matrix_.rows == num_heads * n_q)) return;
    if (num_heads == 1) detail::throw_shape(where, "the bias matrix", n_q, n_k, matrix_.rows, matrix_.cols);
    detail::throw_shape({where, ": the bias matrix must be ", n_q, " x ", n_k, " for all heads, or ", num_heads * n_q,
                         " x ", n_k, " with one head below the other, got ", matrix_.rows, " x ", matrix_.cols});
  }
  bool same_for_all_heads(Index n_q) const { return matrix_.rows == n_q; }

 private:
  StridedView<const Scalar> matrix_;
};

template <typename Derived>
MatrixBias(const Eigen::DenseBase<Derived>&) -> MatrixBias<typename Derived::Scalar>;

}  // namespace diffattn::inline v0_1
