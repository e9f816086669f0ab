#pragma once

// DecoderConfig: the sizes of a Decoder, and what its layers' attention is like.
//
//   DecoderConfig<MultiheadDiffAttention<float>> config{.vocab_size = 256, .num_layers = 4, .hidden_dim = 512, …};
//
// Tested by tests/models/decoder_test.cpp.

#include <any>
#include <cstdint>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/layers/arithmetic.hpp"
#include "diffattn/models/transformer_block.hpp"

namespace diffattn::inline v0_1 {

template <typename Attention>
struct DecoderConfig {
  Index vocab_size = 0;
  Index num_layers = 0;
  Index hidden_dim = 0;                        ///< inner width of the feed-forward layers
  typename Attention::Config attention{};      ///< of every layer; depth and seed are set for each
  bool tied_head = false;                      ///< the logits are products with the embedding
  double norm_eps = 1e-5;                      ///< of the norms before attention, before feed-forward, before the head
  std::uint64_t seed = 0;                      ///< of the initial parameters
  Arithmetic arithmetic = Arithmetic::scalar;  ///< of all products with weights; or attention.arithmetic, of its own
  /// What a checkpoint says beside all this, kept for who writes the model back: load_diffllama puts it here.
  std::any origin{};

  /// The attention of layer `layer`, from 0: its depth, which λ_init follows, and a seed of its own.
  typename Attention::Config attention_of(Index layer) const {
    return detail::attention_of_layer<Attention>(attention, seed, layer, arithmetic);
  }
};

namespace detail {

/// Throws std::invalid_argument that names the field unless all sizes are at least 1 and the weights can be counted.
/// What is wrong with the attention, its layer says.
template <typename Attention>
const DecoderConfig<Attention>& checked(const char* where, const DecoderConfig<Attention>& config) {
  const Index embed_dim = config.attention.embed_dim;
  check_positive(where, "vocab_size", config.vocab_size);
  check_positive(where, "num_layers", config.num_layers);
  check_positive(where, "hidden_dim", config.hidden_dim);
  check_positive(where, "attention.embed_dim", embed_dim);
  checked_product(where, "vocab_size·embed_dim", {config.vocab_size, embed_dim});
  checked_product(where, "num_layers·hidden_dim·embed_dim", {config.num_layers, config.hidden_dim, embed_dim});
  return config;
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
