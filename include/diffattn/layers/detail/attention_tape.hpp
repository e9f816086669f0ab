#pragma once

// What the backward pass of an attention layer needs of its forward pass.

#include <vector>

#include "diffattn/core/matrix.hpp"
#include "diffattn/layers/detail/remembered_mask.hpp"

namespace diffattn::inline v0_1::detail {

/// What two layers have in common whose tapes and gradients fit each other.
struct AttentionShape {
  Index embed_dim = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  Index parameters = 0;  ///< how many numbers: biases and what variants add
  bool operator==(const AttentionShape&) const = default;
};

template <typename Scalar>
struct AttentionTape {
  Matrix<Scalar> x, q, k, v;  ///< q and k turned
  Matrix<Scalar> memory;      ///< what keys and values were made of, if it was not x
  Matrix<Scalar> attended;    ///< the heads' results, before finish_heads
  Matrix<Scalar> lambda;      ///< one a token and head, where the variant has them
  std::vector<Index> lengths, memory_lengths;
  RememberedMask mask;
  AttentionShape shape;  ///< of the layer that filled it
  bool filled = false;
  bool of_memory = false;  ///< filled by forward_cross

  /// How many keys each sequence has.
  const std::vector<Index>& key_lengths() const { return of_memory ? memory_lengths : lengths; }
};

}  // namespace diffattn::inline v0_1::detail
