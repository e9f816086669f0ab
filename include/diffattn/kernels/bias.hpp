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
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/simd.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/kernels/bias_row.hpp"
#include "diffattn/kernels/learned_bias.hpp"

namespace diffattn::inline v0_1 {

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
    constexpr Index kLanes = simd::kLanes<double>;
    const double slope_here = -slope(of.head);
    const Index first = of.first_key - (of.query - of.n_q + of.n_k);  // ahead of the query by so much
    Index i = 0;
    // Where T can hold all of them. The products are those of the call operator.
    if (std::abs(slope_here) * static_cast<double>(std::max(-first, first + of.count)) <= kLargest<T>) {
      alignas(simd::kMostAlignment) double lanes[kLanes];
      for (Index lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<double>(first + lane);
      const auto slopes = simd::broadcast(slope_here), step = simd::broadcast(static_cast<double>(kLanes));
      auto key = simd::load(lanes);
      const auto set_some = [&] {
        const auto distance = simd::max(key, simd::sub(simd::broadcast(0.0), key));
        simd::store_as(row + i, simd::mul(slopes, distance));
        key = simd::add(key, step);
        i += kLanes;
      };
      while (i + 4 * kLanes <= of.count) {
#pragma GCC unroll 4
        for (int packet = 0; packet < 4; ++packet) set_some();
      }
      while (i + kLanes <= of.count) set_some();
    }
    for (; i < of.count; ++i) {
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
    detail::convert_biases(row, matrix_.block(from, of.first_key, 1, of.count));
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
