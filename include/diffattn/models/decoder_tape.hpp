#pragma once

// DecoderTape: what the backward pass of a Decoder needs of its forward pass.
//
// A tape is filled by decoder.logits(tokens, lengths, tape), read by decoder.backward(dlogits, tape, grad), and used
// again for the next batch: for as many tokens without allocation. With `recompute` it keeps but the input of every
// block, and backward runs each block forward once more (activation checkpointing, Chen et al., arXiv 1604.06174):
// about a third more work, one block's memory instead of all blocks', and the same gradients bit for bit. That is for a
// CausalMask only.

#include <cstddef>
#include <iterator>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/layers/sequences.hpp"
#include "diffattn/models/decoder_block.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar, typename Attention>
struct DecoderTape {
  bool recompute = false;  ///< set it before the forward pass

  std::vector<Index> tokens;
  std::vector<Index> lengths;
  std::vector<DecoderBlockTape<Scalar, Attention>> blocks;  ///< one a block; one for all with `recompute`
  std::vector<Matrix<Scalar>> inputs;                       ///< of each block, then of the last norm
  Matrix<Scalar> hidden;                                    ///< after the last norm
  bool filled = false;                                      ///< the forward pass has come to its end

  /// The tape of block `layer`.
  DecoderBlockTape<Scalar, Attention>& block(std::size_t layer) { return blocks[recompute ? 0 : layer]; }

  /// Empties the tape for a forward pass of `num_layers` blocks on these tokens; nothing grows after the largest one.
  template <typename Tokens>
  void begin(const Tokens& new_tokens, const SequenceLengths& new_lengths, std::size_t num_layers, Index embed_dim) {
    filled = false;
    tokens.assign(std::begin(new_tokens), std::end(new_tokens));
    lengths.clear();
    for (Index s = 0; s < new_lengths.size(); ++s) lengths.push_back(new_lengths[s]);
    blocks.resize(recompute ? 1 : num_layers);
    inputs.resize(num_layers + 1);
    const auto n = static_cast<Index>(tokens.size());
    for (Matrix<Scalar>& input : inputs) input.resize(n, embed_dim);
    hidden.resize(n, embed_dim);
  }

  /// Throws std::invalid_argument, naming `where`, unless a decoder of this many blocks and this width has filled it.
  void check(const char* where, std::size_t num_layers, Index embed_dim) const {
    if (!filled) {
      detail::throw_invalid({where, ": backward needs a tape that logits(tokens, lengths, tape) has filled"});
    }
    if (inputs.size() != num_layers + 1 || blocks.size() != (recompute ? 1 : num_layers) ||
        hidden.cols() != embed_dim) {
      detail::throw_invalid({where, ": the tape was filled by a decoder of another configuration"});
    }
  }
};

}  // namespace diffattn::inline v0_1
