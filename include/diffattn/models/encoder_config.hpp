#pragma once

// EncoderConfig: the sizes of an Encoder, what its layers' attention is like, and what stands around it.
//
//   EncoderConfig<MultiheadDiffAttention<float>> config{.num_layers = 4, .hidden_dim = 256,
//                                                       .attention = {.embed_dim = 64, .num_heads = 2}};
//
// Tested by tests/models/encoder_test.cpp.

#include <cstdint>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/layers/arithmetic.hpp"
#include "diffattn/models/activation.hpp"
#include "diffattn/models/norm.hpp"
#include "diffattn/models/transformer_block.hpp"

namespace diffattn::inline v0_1 {

template <typename Attention>
struct EncoderConfig {
  Index num_layers = 0;
  Index hidden_dim = 0;                      ///< inner width of the feed-forward layers
  typename Attention::Config attention{};    ///< of every layer; depth and seed are set for each
  Activation activation = Activation::gelu;  ///< of the feed-forward layers
  bool bias = false;                         ///< in the feed-forward layers; attention.bias says so of attention
  NormKind norm = NormKind::layer_norm;
  NormPlacement norm_placement = NormPlacement::before;  ///< before each layer and at the end, or behind each layer
  double norm_eps = 1e-5;
  std::uint64_t seed = 0;                      ///< of the initial parameters
  Arithmetic arithmetic = Arithmetic::scalar;  ///< of all products with weights; or attention.arithmetic, of its own

  /// The attention of layer `layer`, from 0: its depth, which λ_init follows, and a seed of its own.
  typename Attention::Config attention_of(Index layer) const {
    return detail::attention_of_layer<Attention>(attention, seed, layer, arithmetic);
  }
};

namespace detail {

/// Throws std::invalid_argument that names the field unless all sizes are at least 1 and the weights can be counted.
/// What is wrong with the attention, its layer says.
template <typename Attention>
const EncoderConfig<Attention>& checked(const char* where, const EncoderConfig<Attention>& config) {
  const Index embed_dim = config.attention.embed_dim;
  check_positive(where, "num_layers", config.num_layers);
  check_positive(where, "hidden_dim", config.hidden_dim);
  check_positive(where, "attention.embed_dim", embed_dim);
  checked_product(where, "num_layers·hidden_dim·embed_dim", {config.num_layers, config.hidden_dim, embed_dim});
  return config;
}

/// Whether encoders of the two have parameters of the same shapes and do the same with them: what a tape and a gradient
/// of one must share with the other.
template <typename Attention>
bool same_shape(const EncoderConfig<Attention>& a, const EncoderConfig<Attention>& b) {
  return a.num_layers == b.num_layers && a.hidden_dim == b.hidden_dim && a.activation == b.activation &&
         a.bias == b.bias && a.norm == b.norm && a.norm_placement == b.norm_placement &&
         a.attention.embed_dim == b.attention.embed_dim && a.attention.num_heads == b.attention.num_heads &&
         a.attention.num_kv_heads == b.attention.num_kv_heads && a.attention.head_dim == b.attention.head_dim &&
         a.attention.bias == b.attention.bias;
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
