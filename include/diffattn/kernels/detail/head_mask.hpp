#pragma once

// The mask of all heads, for a call that has but some of them.

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

/// `mask` as heads from first_head on meet it.
template <typename Mask>
struct HeadMask {
  const Mask& mask;
  Index first_head;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const { return mask.visible_keys(query, n_q, n_k); }

  auto bias(Index head, Index query, Index key, Index n_q, Index n_k) const requires HasBias<Mask> {
    return mask.bias(first_head + head, query, key, n_q, n_k);
  }

  bool same_for_all_heads(Index n_q) const { return detail::same_for_all_heads(mask, n_q); }

  template <typename T>
  void fill_bias(T* row, const BiasRow& of) const requires HasBias<Mask> {
    fill_biases(BiasOfMask<Mask>{mask}, row, {first_head + of.head, of.query, of.first_key, of.count, of.n_q, of.n_k});
  }
};

}  // namespace diffattn::inline v0_1::detail
