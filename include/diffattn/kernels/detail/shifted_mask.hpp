#pragma once

// A mask over all the keys that a cache has ever held, for kernels that see those from some position on.

#include <algorithm>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

/// `mask` as it would be if `first_key` more keys stood in front of those there are. What it shows of them is left out.
template <typename Mask>
struct ShiftedMask {
  const Mask& mask;
  Index first_key;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    const KeyRange keys = mask.visible_keys(query, n_q, first_key + n_k);
    return {std::max<Index>(keys.begin - first_key, 0), std::max<Index>(keys.end - first_key, 0)};
  }

  auto bias(Index head, Index query, Index key, Index n_q, Index n_k) const requires HasBias<Mask> {
    return mask.bias(head, query, first_key + key, n_q, first_key + n_k);
  }

  bool same_for_all_heads(Index n_q) const { return detail::same_for_all_heads(mask, n_q); }
};

}  // namespace diffattn::inline v0_1::detail
