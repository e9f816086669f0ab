#pragma once

// A mask over all the keys that a cache has ever held, for kernels that see those from some position on.

#include <algorithm>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

/// `mask` as it would be if `first_key` more keys stood in front of those there are. What it shows of them is left out,
/// and so are the first `lead` of those there are.
template <typename Mask>
struct ShiftedMask {
  const Mask& mask;
  Index first_key;
  Index lead = 0;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    const KeyRange keys = mask.visible_keys(query, n_q, first_key + n_k);
    return {std::max(keys.begin - first_key, lead), std::max(keys.end - first_key, lead)};
  }

  auto bias(Index head, Index query, Index key, Index n_q, Index n_k) const requires HasBias<Mask> {
    return mask.bias(head, query, first_key + key, n_q, first_key + n_k);
  }

  bool same_for_all_heads(Index n_q) const { return detail::same_for_all_heads(mask, n_q); }

  template <typename T>
  void fill_bias(T* row, const BiasRow& of) const requires HasBias<Mask> {
    fill_biases(BiasOfMask<Mask>{mask}, row,
                {of.head, of.query, first_key + of.first_key, of.count, of.n_q, first_key + of.n_k});
  }
};

}  // namespace diffattn::inline v0_1::detail
