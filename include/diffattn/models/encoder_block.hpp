#pragma once

// One layer of an Encoder: a TransformerBlock with the norm and the feed-forward layer that its configuration names.
//
// Parameters (visit_parameters): attention_norm, self_attn, feed_forward_norm, mlp.

#include "diffattn/core/matrix.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/models/encoder_config.hpp"
#include "diffattn/models/norm.hpp"
#include "diffattn/models/transformer_block.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar, typename Attention>
struct EncoderBlock : TransformerBlock<Scalar, Attention, Norm<Scalar>> {
  using Base = TransformerBlock<Scalar, Attention, Norm<Scalar>>;
  using typename Base::Weight;

  /// Layer `layer` of an encoder, from 0.
  EncoderBlock(const EncoderConfig<Attention>& config, Index layer)
      : Base(config.attention_of(layer), Norm<Scalar>(config.norm, config.attention.embed_dim, config.norm_eps),
             FeedForward<Scalar, Weight>(config.attention.embed_dim, config.hidden_dim, config.activation, config.bias,
                                         config.arithmetic),
             config.norm_placement) {}

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("attention_norm", self.attention_norm, visitor);
    visit_part("self_attn", self.attention, visitor);
    visit_part("feed_forward_norm", self.feed_forward_norm, visitor);
    visit_part("mlp", self.feed_forward, visitor);
  }
};

}  // namespace diffattn::inline v0_1
