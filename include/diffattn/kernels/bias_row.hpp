#pragma once

// The biases of consecutive keys, a row at a time: what the kernels read, whatever a bias offers.
//
// A bias that can be told for many keys at once is faster than one that is called for every pair. It has, besides its
// call operator,
//   void fill(T* row, const BiasRow& of) const        row[i] = its value for key of.first_key + i, i < of.count
// for T its own type of number, or as a template for any floating-point type T; then a finite value that T cannot hold
// is the lowest or the largest that it can. Biases without it are called pair by pair.

#include <algorithm>
#include <limits>
#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/simd.hpp"

namespace diffattn::inline v0_1 {

/// Keys [first_key, first_key + count) of n_k, as query `query` of n_q of head `head` meets them.
struct BiasRow {
  Index head;
  Index query;
  Index first_key;
  Index count;
  Index n_q;
  Index n_k;

  /// `num` of these keys from the i-th on, or what there is of them.
  BiasRow keys(Index i, Index num) const { return {head, query, first_key + i, std::min(num, count - i), n_q, n_k}; }
};

namespace detail {

/// What a bias returns.
template <typename Bias>
using BiasNumber = std::remove_cvref_t<std::invoke_result_t<const Bias&, Index, Index, Index, Index, Index>>;

/// A bias as a Scalar. -inf stays -inf and only that does: a finite one that Scalar cannot hold is the lowest or the
/// largest that it can.
template <typename Scalar, typename Number>
Scalar converted_bias(Number bias) {
  if constexpr (std::is_floating_point_v<Number> && sizeof(Number) > sizeof(Scalar)) {
    using Limits = std::numeric_limits<Scalar>;
    if (bias < Number(Limits::lowest()) && bias != -std::numeric_limits<Number>::infinity()) return Limits::lowest();
    if (bias > Number(Limits::max()) && bias != std::numeric_limits<Number>::infinity()) return Limits::max();
  }
  return static_cast<Scalar>(bias);
}

/// to[i] = converted_bias(from[i]).
template <typename Scalar, typename Number>
void convert_biases(Scalar* to, const Number* from, Index count) {
  Index i = 0;
  if constexpr (std::is_same_v<Scalar, Number>) {
    std::copy_n(from, count, to);
    return;
  } else if constexpr (std::is_same_v<Scalar, float> && std::is_same_v<Number, double>) {
    constexpr Index kLanes = simd::kLanes<double>;
    auto largest = simd::broadcast(0.0);
    for (; i + kLanes <= count; i += kLanes) {
      const auto bias = simd::loadu(from + i);
      largest = simd::max(largest, simd::max(bias, simd::sub(simd::broadcast(0.0), bias)));
      simd::store_as(to + i, bias);
    }
    if (simd::reduce_max(largest) > double(std::numeric_limits<float>::max())) i = 0;  // not all can be held
  }
  for (; i < count; ++i) to[i] = converted_bias<Scalar>(from[i]);
}

/// The same from a row of a matrix.
template <typename Scalar, typename Number>
void convert_biases(Scalar* to, const StridedView<const Number>& row) {
  if (row.col_stride == 1) return convert_biases(to, row.data, row.cols);
  for (Index i = 0; i < row.cols; ++i) to[i] = converted_bias<Scalar>(row(0, i));
}

/// row[i] = the bias of key of.first_key + i, as a T.
template <typename T, typename Bias>
void fill_biases(const Bias& bias, T* row, const BiasRow& of) {
  using Number = BiasNumber<Bias>;
  if constexpr (requires { bias.fill(row, of); }) {
    bias.fill(row, of);
  } else if constexpr (std::is_same_v<T, Number>) {
    for (Index i = 0; i < of.count; ++i) row[i] = bias(of.head, of.query, of.first_key + i, of.n_q, of.n_k);
  } else {
    constexpr Index kPiece = 128;
    Number some[kPiece];
    for (Index begin = 0; begin < of.count; begin += kPiece) {
      const BiasRow piece = of.keys(begin, kPiece);
      fill_biases(bias, some, piece);
      convert_biases(row + begin, some, piece.count);
    }
  }
}

/// The bias of a pair as a Scalar.
template <typename Scalar, typename Mask>
Scalar bias_of(const Mask& mask, Index head, Index query, Index key, Index n_q, Index n_k) {
  return converted_bias<Scalar>(mask.bias(head, query, key, n_q, n_k));
}

/// The bias of a mask, as one by itself.
template <typename Mask>
struct BiasOfMask {
  const Mask& mask;

  auto operator()(Index head, Index query, Index key, Index n_q, Index n_k) const {
    return mask.bias(head, query, key, n_q, n_k);
  }
  template <typename T>
  void fill(T* row, const BiasRow& of) const requires requires(const Mask& m, T* r, const BiasRow& o) {
    m.fill_bias(r, o);
  }
  { mask.fill_bias(row, of); }
};

template <typename Mask>
BiasOfMask(const Mask&) -> BiasOfMask<Mask>;

/// Whether a bias is -inf, which no integer is.
template <typename Number>
bool is_minus_infinity(Number bias) {
  using Limits = std::numeric_limits<Number>;
  return Limits::has_infinity && bias == -Limits::infinity();
}

/// a + b, where only -inf is -inf: two finite biases that add up to less than any number are the lowest number.
template <typename A, typename B>
auto sum_of_biases(A a, B b) {
  using Sum = decltype(a + b);
  const auto sum = static_cast<Sum>(a) + static_cast<Sum>(b);
  if (is_minus_infinity<Sum>(sum) && !is_minus_infinity(a) && !is_minus_infinity(b)) {
    return std::numeric_limits<Sum>::lowest();
  }
  return Sum(sum);
}

/// to[i] = sum_of_biases(a[i], b[i]).
template <typename Sum>
void add_biases(Sum* to, const Sum* a, const Sum* b, Index count) {
  Index i = 0;
  if constexpr (std::is_same_v<Sum, float> || std::is_same_v<Sum, double>) {
    using Limits = std::numeric_limits<Sum>;
    const auto hidden = simd::broadcast(-Limits::infinity()), lowest = simd::broadcast(Limits::lowest());
    for (; i + simd::kLanes<Sum> <= count; i += simd::kLanes<Sum>) {
      const auto x = simd::loadu(a + i), y = simd::loadu(b + i), sum = simd::add(x, y);
      const auto of_finite = simd::select_equal<Sum>(y, hidden, sum, simd::max(sum, lowest));
      simd::storeu(to + i, simd::select_equal<Sum>(x, hidden, sum, of_finite));
    }
  }
  for (; i < count; ++i) to[i] = static_cast<Sum>(sum_of_biases(a[i], b[i]));
}

/// row[i] = the sum of two biases of key of.first_key + i, as a T.
template <typename T, typename A, typename B>
void fill_bias_sums(const A& a, const B& b, T* row, const BiasRow& of) {
  using Sum = decltype(sum_of_biases(BiasNumber<A>(), BiasNumber<B>()));
  constexpr Index kPiece = 128;
  Sum of_a[kPiece], of_b[kPiece];
  for (Index begin = 0; begin < of.count; begin += kPiece) {
    const BiasRow piece = of.keys(begin, kPiece);
    fill_biases(a, of_a, piece);
    fill_biases(b, of_b, piece);
    add_biases(of_a, of_a, of_b, piece.count);
    convert_biases(row + begin, of_a, piece.count);
  }
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
