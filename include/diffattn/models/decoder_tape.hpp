#pragma once

// What the backward pass of a Decoder needs of its forward pass.
//
// A tape is filled by decoder.logits(tokens, lengths, tape), read by decoder.backward(dlogits, tape, grad), and used
// again for the next batch: for as many tokens without allocation. With `recompute` it keeps but the input of every
// block, and backward runs each block forward once more (activation checkpointing, Chen et al., arXiv 1604.06174):
// about a third more work, one block's memory instead of all blocks', and the same gradients bit for bit.

#include <vector>

#include "diffattn/core/matrix.hpp"
#include "diffattn/models/feed_forward.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar, typename Attention>
struct DecoderBlockTape {
  typename Attention::Tape attention;
  typename FeedForward<Scalar>::Tape feed_forward;
  Matrix<Scalar> attended;  ///< n x embed_dim: x + attention(norm(x)), before the second norm
};

template <typename Scalar, typename Attention>
struct DecoderTape {
  bool recompute = false;  ///< set it before the forward pass

  std::vector<Index> tokens;
  std::vector<Index> lengths;
  std::vector<DecoderBlockTape<Scalar, Attention>> blocks;  ///< one a block; one for all with `recompute`
  std::vector<Matrix<Scalar>> inputs;                       ///< of each block, then of the last norm
  Matrix<Scalar> hidden;                                    ///< after the last norm
  bool filled = false;
};

}  // namespace diffattn::inline v0_1
