#pragma once

// EncoderTape: what the backward pass of an Encoder needs of its forward pass. It is filled by encoder.forward(x, mask,
// tape), read by encoder.backward(dy, tape, grad), as often as you like, and used again for the next batch: for as many
// tokens without allocation.

#include <cstddef>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/models/encoder_config.hpp"
#include "diffattn/models/transformer_block.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar, typename Attention>
struct EncoderTape {
  std::vector<TransformerBlockTape<Scalar, Attention>> blocks;  ///< one a block
  std::vector<Matrix<Scalar>> inputs;                           ///< of each block, then of the last norm
  EncoderConfig<Attention> config;                              ///< of the encoder that filled it
  bool filled = false;                                          ///< the forward pass has come to its end

  /// Empties the tape for a forward pass on n tokens; nothing grows after the largest one.
  void begin(const EncoderConfig<Attention>& of, Index n) {
    filled = false;
    config = of;
    blocks.resize(static_cast<std::size_t>(of.num_layers));
    inputs.resize(blocks.size() + 1);
    for (Matrix<Scalar>& input : inputs) input.resize(n, of.attention.embed_dim);
  }

  /// Throws std::invalid_argument, naming `where`, unless an encoder with the same blocks has filled it. What is wrong
  /// with the attention's part of it, its layer says.
  void check(const char* where, const EncoderConfig<Attention>& of) const {
    if (!filled) detail::throw_invalid({where, ": backward needs a tape that forward(x, mask, tape) has filled"});
    if (config.num_layers != of.num_layers || config.hidden_dim != of.hidden_dim ||
        config.attention.embed_dim != of.attention.embed_dim || config.activation != of.activation ||
        config.norm != of.norm || config.norm_placement != of.norm_placement) {
      detail::throw_invalid({where, ": the tape was filled by an encoder of another configuration"});
    }
  }
};

}  // namespace diffattn::inline v0_1
