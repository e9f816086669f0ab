#pragma once

// One layer of a Decoder, pre-norm, as the paper has it (section 2.2) and Llama:
//
//   x += attention(attention_norm(x));   x += feed_forward(feed_forward_norm(x))
//
// It is a TransformerBlock, which has all but what a cache adds. The Decoder has checked what its passes are given.
//
// Parameters (visit_parameters): input_layernorm, self_attn, post_attention_layernorm, mlp.

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rms_norm.hpp"
#include "diffattn/models/feed_forward.hpp"
#include "diffattn/models/transformer_block.hpp"

namespace diffattn::inline v0_1 {

/// What backward_in_place needs of forward_into, beside x.
template <typename Scalar, typename Attention>
using DecoderBlockTape = TransformerBlockTape<Scalar, Attention>;

template <typename Scalar, typename Attention>
struct DecoderBlock : TransformerBlock<Scalar, Attention, RmsNorm<Scalar>> {
  using Base = TransformerBlock<Scalar, Attention, RmsNorm<Scalar>>;
  using typename Base::Weight;

  DecoderBlock(const typename Attention::Config& config, Index hidden_dim, double norm_eps,
               Arithmetic arithmetic = Arithmetic::scalar)
      : Base(config, RmsNorm<Scalar>(config.embed_dim, norm_eps),
             FeedForward<Scalar, Weight>(config.embed_dim, hidden_dim, Activation::swiglu, false, arithmetic)) {}

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("input_layernorm", self.attention_norm, visitor);
    visit_part("self_attn", self.attention, visitor);
    visit_part("post_attention_layernorm", self.feed_forward_norm, visitor);
    visit_part("mlp", self.feed_forward, visitor);
  }

  using Base::forward_in_place;

  /// The same for the tokens that follow those in `cache`, which they join: a KvCache, or a batch of them, one a row.
  template <typename Cache, AttentionMask Mask, Executor E>
  void forward_in_place(MatrixMap<Scalar>& x, Cache& cache, const Mask& mask, Workspace& workspace, E& executor) const {
    Base::forward_around(x, workspace, executor, [&](MatrixMap<Scalar>& y, const MatrixMap<Scalar>& normed) {
      this->attention.forward_into(y, normed, cache, mask, workspace, executor);
    });
  }
};

}  // namespace diffattn::inline v0_1
