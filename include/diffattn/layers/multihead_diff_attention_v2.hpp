#pragma once

// Multi-head differential attention, second version (Microsoft, January 2026, multihead_flashdiffv2.py): λ is learned
// per token and head, both maps of a head share keys and values, and there is neither norm nor λ_init.
//
//   O_i = (P_{2i} − σ(λ_i) P_{2i+1}) V_g,   λ = x W_λᵀ,   y = Concat(O_1 … O_h) W_Oᵀ
//
// num_heads (h) counts differential heads: q has 2h heads of width head_dim, the pair (2i, 2i+1) reads key and value
// head i / (num_heads / num_kv_heads). head_dim is free.
//
// Parameters (visit_parameters): q_proj, k_proj, v_proj, lambda_proj, o_proj.
// How it is called, shapes, errors, threads: attention_layer.hpp.

#include <cmath>
#include <cstdint>
#include <optional>

#include "diffattn/layers/attention_layer.hpp"

namespace diffattn::inline v0_1 {

struct MultiheadDiffAttentionV2Config {
  Index embed_dim = 0;
  Index num_heads = 0;                                ///< differential heads
  Index num_kv_heads = 0;                             ///< divides num_heads; 0 = num_heads
  Index head_dim = 0;                                 ///< 0 = embed_dim / (2·num_heads)
  std::optional<RotaryConfig> rotary = std::nullopt;  ///< no position embedding if left out
  bool bias = false;                                  ///< biases on the five projections
  std::uint64_t seed = 0;                             ///< of the initial parameters
  Arithmetic arithmetic = Arithmetic::scalar;         ///< of the projections, but for that of λ
};

/// A λ for every token and head, and nothing after a head.
template <typename ScalarType, typename Weight>
class DiffV2Variant {
 public:
  using Scalar = ScalarType;
  using Config = MultiheadDiffAttentionV2Config;
  using WeightMatrix = Weight;

  Linear<Scalar, Weight> lambda_proj;  ///< num_heads x embed_dim
  Linear<Scalar, Weight> o_proj;       ///< embed_dim x num_heads·head_dim

 protected:
  static constexpr const char* kName = "MultiheadDiffAttentionV2";
  static constexpr Index kQueryMaps = 2, kKeyMaps = 1;
  static constexpr auto kOutput = &DiffV2Variant::o_proj;
  static constexpr LambdaSource kLambda = LambdaSource::token;
  static constexpr bool kFinishesHeads = false;

  explicit DiffV2Variant(const Config& config)
      : lambda_proj(config.embed_dim, config.num_heads, config.bias),
        o_proj(config.num_heads * config.head_dim, config.embed_dim, config.bias) {}

  static Index value_dim(const Config& config) { return config.head_dim; }
  void initialize(Initializer& random) {
    lambda_proj.initialize(random);
    o_proj.initialize(random);
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("lambda_proj", self.lambda_proj, visitor);
    visit_part("o_proj", self.o_proj, visitor);
  }

  static Scalar lambda_of(Scalar logit) { return Scalar(1) / (Scalar(1) + std::exp(-logit)); }
  static Scalar lambda_slope(Scalar lambda) { return lambda * (Scalar(1) - lambda); }
};

/// Initial parameters are those of nn.Linear. Weight: the matrix type of the projections' weights, as linear.hpp says.
template <typename Scalar, typename Weight = Matrix<Scalar>>
class MultiheadDiffAttentionV2 : public AttentionLayer<DiffV2Variant<Scalar, Weight>> {
 public:
  using AttentionLayer<DiffV2Variant<Scalar, Weight>>::AttentionLayer;
};

}  // namespace diffattn::inline v0_1
