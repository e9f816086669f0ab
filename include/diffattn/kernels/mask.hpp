#pragma once

// Masks: which keys a query sees, and what is added to their scores.
//
// Masks are aligned to the bottom right: query i of n_q sits at position i + n_k - n_q among the keys, so that the last
// query sees what a decoding step would see. A query that sees no key gives a row of exact zeros. Whatever a masked key
// or its value holds, NaN and Inf included, never reaches the output; NaN in a visible one does.
//
// A mask is any type with
//   KeyRange visible_keys(Index query, Index n_q, Index n_k) const      keys [begin, end), 0 <= begin, end <= n_k,
//                                                                       neither of them decreasing in `query`
// and, when it has a bias, also
//   number bias(Index head, Index query, Index key, Index n_q, Index n_k) const
//                                                                       added to scale * q·k; -inf masks the key
// with_bias(mask, bias) joins the two; biases nest: with_bias(with_bias(CausalMask{}, AlibiBias{m}), PaddingBias{n}).

#include <algorithm>
#include <concepts>
#include <limits>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

/// Keys begin <= j < end; empty when begin >= end.
struct KeyRange {
  Index begin;
  Index end;
};

/// Every query sees every key.
struct FullMask {
  KeyRange visible_keys(Index /*query*/, Index /*n_q*/, Index n_k) const { return {0, n_k}; }
};

/// Query i sees the keys up to its own position: j <= i + n_k - n_q.
struct CausalMask {
  KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    return {0, std::clamp<Index>(query - n_q + n_k + 1, 0, n_k)};  // in this order nothing overflows
  }
};

/// Query i sees the last `window` keys up to its own position p = i + n_k - n_q: those in (p - window, p].
/// A window of 0 sees nothing; a negative one is refused when the mask is used.
struct SlidingWindowMask {
  Index window = 0;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    const Index position = query - n_q + n_k;
    const Index end = std::clamp<Index>(position + 1, 0, n_k);
    return {window > position ? 0 : std::min(position - window + 1, end), end};
  }
};

/// Attention with linear biases (Press et al., arXiv 2108.12409): -slope * distance to the query's own position.
struct AlibiBias {
  double slope = 0;

  double operator()(Index /*head*/, Index query, Index key, Index n_q, Index n_k) const {
    const Index distance = query - n_q + n_k - key;
    return -slope * static_cast<double>(distance < 0 ? -distance : distance);
  }
};

/// Only the first `num_valid` keys are real, the rest is padding.
struct PaddingBias {
  Index num_valid = 0;

  double operator()(Index /*head*/, Index /*query*/, Index key, Index /*n_q*/, Index /*n_k*/) const {
    return key < num_valid ? 0.0 : -std::numeric_limits<double>::infinity();
  }
};

/// Any n_q x n_k matrix of biases, -inf where a key is masked. Read in place: it must outlive the mask and, where a
/// tape keeps the mask, the backward pass. A temporary Matrix is refused; a temporary Map or Block is a view like any
/// other.
template <typename Scalar>
class MatrixBias {
 public:
  template <typename Derived>
  explicit MatrixBias(const Eigen::DenseBase<Derived>& matrix) : matrix_(detail::view_of(matrix)) {}
  /// Would be gone before it is read: give the matrix a name.
  template <typename Derived>
  explicit MatrixBias(const Eigen::PlainObjectBase<Derived>&& temporary) = delete;

  Scalar operator()(Index /*head*/, Index query, Index key, Index /*n_q*/, Index /*n_k*/) const {
    return matrix_(query, key);
  }

  void check(const char* where, Index /*num_heads*/, Index n_q, Index n_k) const {
    if (matrix_.rows != n_q || matrix_.cols != n_k) {
      detail::throw_shape(where, "the bias matrix", n_q, n_k, matrix_.rows, matrix_.cols);
    }
  }

 private:
  StridedView<const Scalar> matrix_;
};

template <typename Derived>
MatrixBias(const Eigen::DenseBase<Derived>&) -> MatrixBias<typename Derived::Scalar>;

namespace detail {

template <typename Mask>
concept HasBias = requires(const Mask& mask, Index i) {
  mask.bias(i, i, i, i, i);
};

/// Refuses a mask that could not be meant, before any work.
template <typename Mask>
void check_mask(const char* where, const Mask& mask, Index num_heads, Index n_q, Index n_k) {
  if constexpr (requires { mask.check(where, num_heads, n_q, n_k); }) mask.check(where, num_heads, n_q, n_k);
}

inline void check_mask(const char* where, const SlidingWindowMask& mask, Index /*num_heads*/, Index /*n_q*/,
                       Index /*n_k*/) {
  if (mask.window < 0) {
    throw_invalid({where, ": the window of SlidingWindowMask must be 0 or more, got ", mask.window});
  }
}

/// The bias of a pair as a Scalar. -inf stays -inf and only that does: a finite one that Scalar cannot hold is the
/// lowest or the largest that it can.
template <typename Scalar, typename Mask>
Scalar bias_of(const Mask& mask, Index head, Index query, Index key, Index n_q, Index n_k) {
  const auto bias = mask.bias(head, query, key, n_q, n_k);
  using Bias = std::remove_cv_t<decltype(bias)>;
  if constexpr (std::is_floating_point_v<Bias> && sizeof(Bias) > sizeof(Scalar)) {
    using Limits = std::numeric_limits<Scalar>;
    if (bias < Bias(Limits::lowest()) && bias != -std::numeric_limits<Bias>::infinity()) return Limits::lowest();
    if (bias > Bias(Limits::max()) && bias != std::numeric_limits<Bias>::infinity()) return Limits::max();
  }
  return static_cast<Scalar>(bias);
}

/// Whether the bias, if there is one, leaves key `key` visible. The range is not looked at.
template <typename Mask>
bool bias_shows(const Mask& mask, Index head, Index query, Index key, Index n_q, Index n_k) {
  if constexpr (HasBias<Mask>) {
    const auto bias = mask.bias(head, query, key, n_q, n_k);
    return bias != -std::numeric_limits<std::remove_cv_t<decltype(bias)>>::infinity();
  } else {
    return true;
  }
}

/// a + b, where only -inf is -inf: two finite biases that add up to less than any number are the lowest number.
template <typename A, typename B>
auto sum_of_biases(A a, B b) {
  using Sum = decltype(a + b);
  using Limits = std::numeric_limits<Sum>;
  const bool masked = a == -std::numeric_limits<A>::infinity() || b == -std::numeric_limits<B>::infinity();
  const Sum sum = a + b;
  return sum == -Limits::infinity() && !masked ? Limits::lowest() : sum;
}

}  // namespace detail

/// A mask together with a bias for what it lets through.
template <typename Mask, typename Bias>
struct BiasedMask {
  Mask mask;
  Bias added;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const { return mask.visible_keys(query, n_q, n_k); }

  auto bias(Index head, Index query, Index key, Index n_q, Index n_k) const {
    if constexpr (detail::HasBias<Mask>) {
      return detail::sum_of_biases(mask.bias(head, query, key, n_q, n_k), added(head, query, key, n_q, n_k));
    } else {
      return added(head, query, key, n_q, n_k);
    }
  }

  void check(const char* where, Index num_heads, Index n_q, Index n_k) const {
    detail::check_mask(where, mask, num_heads, n_q, n_k);
    if constexpr (requires { added.check(where, num_heads, n_q, n_k); }) added.check(where, num_heads, n_q, n_k);
  }
};

template <typename Mask, typename Bias>
BiasedMask<Mask, Bias> with_bias(const Mask& mask, const Bias& bias) {
  return {mask, bias};
}

/// Requires of a mask what the kernels need of it.
template <typename M>
concept AttentionMask = requires(const M& mask, Index i) {
  { mask.visible_keys(i, i, i) } -> std::same_as<KeyRange>;
};

}  // namespace diffattn::inline v0_1
