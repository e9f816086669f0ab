#pragma once

// Masks: which keys a query sees, and what is added to their scores.
//
//   FullMask{} · CausalMask{} · SlidingWindowMask{window} · PrefixMask{prefix} · PaddingMask{num_valid}
//   both(mask, mask)                                    what both let a query see
//   with_bias(mask, bias)                               and a bias of bias.hpp, or your own, for what the mask shows
//
// Masks are aligned to the bottom right: query i of n_q sits at position i + n_k - n_q among the keys, so that the last
// query sees what a decoding step would see. A query that sees no key gives a row of exact zeros. Whatever a masked key
// or its value holds, NaN and Inf included, never reaches the output; NaN in a visible one does. Keys that no query of
// a block sees are skipped, chunk by chunk: a window and a padding make a call cheaper.
//
// A mask is any type with
//   KeyRange visible_keys(Index query, Index n_q, Index n_k) const      keys [begin, end), 0 <= begin, end <= n_k,
//                                                                       neither of them decreasing in `query`
// and, if it likes,
//   number bias(Index head, Index query, Index key, Index n_q, Index n_k) const      added to scale * q·k; -inf masks
//   void fill_bias(T* row, const BiasRow& of) const                                  many of them at once (bias_row.hpp)
//   void check(const char* where, Index num_heads, Index n_q, Index n_k) const       throws what could not be meant
//   bool same_for_all_heads(Index n_q) const      whether its bias is: then heads share a map of noise (Heads) for the
//                                                 price of one. Left out: no, each head's is computed by itself
// `head` is the query head, of a differential kernel the differential head. Masks nest in both() and with_bias():
// with_bias(both(CausalMask{}, PaddingMask{n}), AlibiBias{slopes}).

#include <algorithm>
#include <concepts>
#include <limits>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/bias.hpp"

namespace diffattn::inline v0_1 {

/// Keys begin <= j < end; empty when begin >= end.
struct KeyRange {
  Index begin;
  Index end;
};

namespace detail {

/// Refuses a negative field of a mask by name.
inline void check_mask_field(const char* where, const char* field, Index value) {
  if (value < 0) throw_invalid({where, ": the ", field, " must be 0 or more, got ", value});
}

}  // namespace detail

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
/// A window of 0 sees nothing; a negative one is refused.
struct SlidingWindowMask {
  Index window = 0;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    const Index position = query - n_q + n_k;
    const Index end = std::clamp<Index>(position + 1, 0, n_k);
    return {window > position ? 0 : std::min(position - window + 1, end), end};
  }
  void check(const char* where, Index /*num_heads*/, Index /*n_q*/, Index /*n_k*/) const {
    detail::check_mask_field(where, "window of SlidingWindowMask", window);
  }
};

/// Every query sees the first `prefix` keys, and those up to its own position: a prompt that is read both ways before
/// a text that is not. A prefix of 0 is the causal mask; a negative one is refused.
struct PrefixMask {
  Index prefix = 0;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    return {0, std::clamp<Index>(std::max(query - n_q + n_k + 1, prefix), 0, n_k)};
  }
  void check(const char* where, Index /*num_heads*/, Index /*n_q*/, Index /*n_k*/) const {
    detail::check_mask_field(where, "prefix of PrefixMask", prefix);
  }
};

/// Only the first `num_valid` keys are there, all of them if there are fewer. The others are padding, and cost nothing.
/// A negative num_valid is refused.
struct PaddingMask {
  Index num_valid = 0;

  KeyRange visible_keys(Index /*query*/, Index /*n_q*/, Index n_k) const { return {0, std::min(num_valid, n_k)}; }
  void check(const char* where, Index /*num_heads*/, Index /*n_q*/, Index /*n_k*/) const {
    detail::check_mask_field(where, "num_valid of PaddingMask", num_valid);
  }
};

namespace detail {

template <typename Mask>
concept HasBias = requires(const Mask& mask, Index i) {
  mask.bias(i, i, i, i, i);
};

/// Refuses a mask, or a bias, that could not be meant, before any work. What is declared otherwise than mask.hpp says
/// would be left out without a word, and is refused by the compiler.
template <typename Mask>
void check_mask(const char* where, const Mask& mask, Index num_heads, Index n_q, Index n_k) {
  constexpr bool has_check = requires { mask.check(where, num_heads, n_q, n_k); };
  static_assert(
      HasBias<Mask> || !requires { mask.bias(n_q, n_q, n_q, n_q); },
      "diffattn: bias() of a mask takes (head, query, key, n_q, n_k)");
  static_assert(
      has_check || !requires { mask.check(where, n_q, n_k); },
      "diffattn: check() of a mask or a bias takes (where, num_heads, n_q, n_k)");
  if constexpr (has_check) mask.check(where, num_heads, n_q, n_k);
}

/// Whether every head sees the same scores under a mask, or a bias, of a call with n_q queries: those that have no bias
/// do, and those that say so.
template <typename Mask>
bool same_for_all_heads(const Mask& mask, Index n_q) {
  if constexpr (requires { mask.same_for_all_heads(n_q); }) {
    return mask.same_for_all_heads(n_q);
  } else {
    return !HasBias<Mask> && !std::is_invocable_v<const Mask&, Index, Index, Index, Index, Index>;
  }
}

/// Whether the bias, if there is one, leaves key `key` visible. The range is not looked at.
template <typename Mask>
bool bias_shows(const Mask& mask, Index head, Index query, Index key, Index n_q, Index n_k) {
  if constexpr (HasBias<Mask>) {
    return !is_minus_infinity(mask.bias(head, query, key, n_q, n_k));
  } else {
    return true;
  }
}

}  // namespace detail

/// What with_bias returns.
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

  /// The biases of a row of keys (bias_row.hpp).
  template <typename T>
  void fill_bias(T* row, const BiasRow& of) const {
    if constexpr (detail::HasBias<Mask>) {
      detail::fill_bias_sums(detail::BiasOfMask<Mask>{mask}, added, row, of);
    } else {
      detail::fill_biases(added, row, of);
    }
  }

  static constexpr int kLearnedBiases = detail::count_learned_biases<Mask>() + (LearnedBias<Bias> ? 1 : 0);
  /// The one bias that learns.
  const auto& learned_bias() const requires(kLearnedBiases == 1) {
    if constexpr (LearnedBias<Bias>) {
      return added;
    } else {
      return mask.learned_bias();
    }
  }

  void check(const char* where, Index num_heads, Index n_q, Index n_k) const {
    detail::check_mask(where, mask, num_heads, n_q, n_k);
    detail::check_mask(where, added, num_heads, n_q, n_k);
  }

  bool same_for_all_heads(Index n_q) const {
    return detail::same_for_all_heads(mask, n_q) && detail::same_for_all_heads(added, n_q);
  }
};

/// What `mask` shows, with `bias` added to its scores (bias.hpp). Biases nest and add up. Holds copies of both.
template <typename Mask, typename Bias>
BiasedMask<Mask, Bias> with_bias(const Mask& mask, const Bias& bias) {
  static_assert(std::is_invocable_v<const Bias&, Index, Index, Index, Index, Index>,
                "diffattn: a bias is called with (head, query, key, n_q, n_k)");
  return {mask, bias};
}

/// What both() returns.
template <typename First, typename Second>
struct BothMasks {
  First first;
  Second second;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    const KeyRange a = first.visible_keys(query, n_q, n_k), b = second.visible_keys(query, n_q, n_k);
    // Of nothing, the begin falls back to the end: neither end decreases from query to query, since none of theirs
    // does.
    const Index end = std::min(a.end, b.end);
    return {std::min(std::max(a.begin, b.begin), end), end};
  }

  auto bias(Index head, Index query, Index key, Index n_q, Index n_k) const
      requires(detail::HasBias<First> || detail::HasBias<Second>) {
    if constexpr (!detail::HasBias<First>) {
      return second.bias(head, query, key, n_q, n_k);
    } else if constexpr (!detail::HasBias<Second>) {
      return first.bias(head, query, key, n_q, n_k);
    } else {
      return detail::sum_of_biases(first.bias(head, query, key, n_q, n_k), second.bias(head, query, key, n_q, n_k));
    }
  }

  /// The biases of a row of keys (bias_row.hpp).
  template <typename T>
  void fill_bias(T* row, const BiasRow& of) const requires(detail::HasBias<First> || detail::HasBias<Second>) {
    if constexpr (!detail::HasBias<First>) {
      detail::fill_biases(detail::BiasOfMask<Second>{second}, row, of);
    } else if constexpr (!detail::HasBias<Second>) {
      detail::fill_biases(detail::BiasOfMask<First>{first}, row, of);
    } else {
      detail::fill_bias_sums(detail::BiasOfMask<First>{first}, detail::BiasOfMask<Second>{second}, row, of);
    }
  }

  static constexpr int kLearnedBiases = detail::count_learned_biases<First>() + detail::count_learned_biases<Second>();
  /// The one bias that learns.
  const auto& learned_bias() const requires(kLearnedBiases == 1) {
    if constexpr (detail::HasLearnedBias<First>) {
      return first.learned_bias();
    } else {
      return second.learned_bias();
    }
  }

  void check(const char* where, Index num_heads, Index n_q, Index n_k) const {
    detail::check_mask(where, first, num_heads, n_q, n_k);
    detail::check_mask(where, second, num_heads, n_q, n_k);
  }

  bool same_for_all_heads(Index n_q) const {
    return detail::same_for_all_heads(first, n_q) && detail::same_for_all_heads(second, n_q);
  }
};

/// What both masks let a query see; their biases add up. both(SlidingWindowMask{512}, PaddingMask{n}), for one. Holds
/// copies of both.
template <typename First, typename Second>
BothMasks<First, Second> both(const First& first, const Second& second) {
  return {first, second};
}

/// What the kernels require of a mask.
template <typename M>
concept AttentionMask = requires(const M& mask, Index i) {
  { mask.visible_keys(i, i, i) } -> std::same_as<KeyRange>;
};

}  // namespace diffattn::inline v0_1
