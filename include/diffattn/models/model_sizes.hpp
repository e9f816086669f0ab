#pragma once

// The models of the paper (Ye et al., arXiv 2410.05258, tables 9 and 10), and what a model of given sizes costs,
// computed from the sizes alone: nothing is allocated.
//
//   for (const ModelSize& size : kPaperModels) size.parameters() …
//   Decoder<float, MultiheadDiffAttention<float>> model(differential_config<float>(kPaperModels[0]));
//   Decoder<float, MultiheadAttention<float>> baseline(standard_config<float>(kPaperModels[0]));
//
// A Differential Transformer has num_heads differential heads, its Transformer twice as many of the same width. The
// feed-forward width is 8/3 of embed_dim, to the nearest integer; the vocabulary that of cl100k_base, 100,288. With one
// matrix for embedding and head the counts round to the names that the paper gives its models, 0.83 to 13.1 billion.

#include "diffattn/core/matrix.hpp"
#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/models/decoder.hpp"

namespace diffattn::inline v0_1 {

struct ModelSize {
  const char* name;
  Index embed_dim;
  Index num_layers;
  Index num_heads;  ///< differential heads
  Index hidden_dim;
  Index vocab_size = 100288;

  /// Width of one map's queries and keys.
  constexpr Index head_dim() const { return embed_dim / (2 * num_heads); }

  /// Weights of the linear layers, the head among them: what a token is multiplied with.
  constexpr Index matrix_parameters() const {
    return num_layers * (4 * embed_dim * embed_dim + 3 * embed_dim * hidden_dim) + vocab_size * embed_dim;
  }
  /// All that the differential model learns, embedding and head one matrix. Its Transformer lacks λ and the head norms.
  constexpr Index parameters() const {
    return matrix_parameters() + num_layers * (2 * embed_dim + 6 * head_dim()) + embed_dim;
  }
  /// Floating-point operations of the forward pass of one token that sees `context` tokens: as many for the
  /// Transformer.
  constexpr double flop_per_token(Index context) const {
    return 2.0 * static_cast<double>(matrix_parameters()) +
           4.0 * static_cast<double>(num_layers * embed_dim) * static_cast<double>(context);
  }
  /// Bytes of keys and values a token, `value_bytes` each: as many for the Transformer.
  constexpr Index cache_bytes_per_token(Index value_bytes) const { return num_layers * 2 * embed_dim * value_bytes; }
};

/// 830M to 13.1B, the scaling experiments of table 10; and the 3B of the main comparison, table 9.
inline constexpr ModelSize kPaperModels[] = {{"830M", 1536, 24, 8, 4096},    {"1.4B", 2048, 24, 8, 5461},
                                             {"2.8B", 2560, 32, 10, 6827},   {"6.8B", 4096, 32, 16, 10923},
                                             {"13.1B", 5120, 40, 20, 13653}, {"3B", 3072, 28, 12, 8192}};

/// The Differential Transformer of this size.
template <typename Scalar>
DecoderConfig<MultiheadDiffAttention<Scalar>> differential_config(const ModelSize& size) {
  return {.vocab_size = size.vocab_size,
          .num_layers = size.num_layers,
          .hidden_dim = size.hidden_dim,
          .attention = {.embed_dim = size.embed_dim, .num_heads = size.num_heads, .rotary = RotaryConfig{}},
          .tied_head = true};
}

/// The Transformer that it is compared with: twice the heads, of the same width.
template <typename Scalar>
DecoderConfig<MultiheadAttention<Scalar>> standard_config(const ModelSize& size) {
  return {.vocab_size = size.vocab_size,
          .num_layers = size.num_layers,
          .hidden_dim = size.hidden_dim,
          .attention = {.embed_dim = size.embed_dim, .num_heads = 2 * size.num_heads, .rotary = RotaryConfig{}},
          .tied_head = true};
}

}  // namespace diffattn::inline v0_1
