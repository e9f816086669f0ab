#pragma once

// Multi-head attention, the baseline that differential attention is compared with: the layer of the official
// multihead_attention.py, on the same parts and of the same quality. y = Concat(softmax(s·Q_h K_gᵀ) V_g) W_Oᵀ.
//
// d = embed_dim / num_heads, or as head_dim says. Query head h reads key and value head g = h / (num_heads /
// num_kv_heads). A layer with twice the heads of a MultiheadDiffAttention has the same d and, but for λ and the norm,
// the same parameters.
//
// Parameters (visit_parameters): q_proj, k_proj, v_proj, out_proj.
// How it is called, shapes, errors, threads: attention_layer.hpp.

#include <cstdint>
#include <optional>

#include "diffattn/layers/attention_layer.hpp"

namespace diffattn::inline v0_1 {

struct MultiheadAttentionConfig {
  Index embed_dim = 0;
  Index num_heads = 0;
  Index num_kv_heads = 0;                             ///< divides num_heads; 0 = num_heads
  Index head_dim = 0;                                 ///< d; 0 = embed_dim / num_heads
  std::optional<RotaryConfig> rotary = std::nullopt;  ///< no position embedding if left out
  bool bias = false;                                  ///< biases on the four projections
  std::uint64_t seed = 0;                             ///< of the initial parameters
  Arithmetic arithmetic = Arithmetic::scalar;         ///< of the projections
};

/// One softmax a head, and nothing after it.
template <typename ScalarType, typename Weight>
class StandardVariant {
 public:
  using Scalar = ScalarType;
  using Config = MultiheadAttentionConfig;
  using WeightMatrix = Weight;

  Linear<Scalar, Weight> out_proj;  ///< embed_dim x num_heads·d

 protected:
  static constexpr const char* kName = "MultiheadAttention";
  static constexpr Index kQueryMaps = 1, kKeyMaps = 1;
  static constexpr auto kOutput = &StandardVariant::out_proj;
  static constexpr LambdaSource kLambda = LambdaSource::none;
  static constexpr bool kFinishesHeads = false;

  explicit StandardVariant(const Config& config)
      : out_proj(config.num_heads * config.head_dim, config.embed_dim, config.bias) {}

  static Index value_dim(const Config& config) { return config.head_dim; }
  void initialize(Initializer& random) { out_proj.initialize(random); }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("out_proj", self.out_proj, visitor);
  }
};

/// Initial parameters are those of nn.Linear. Weight: the matrix type of the projections' weights, as linear.hpp says.
template <typename Scalar, typename Weight = Matrix<Scalar>>
class MultiheadAttention : public AttentionLayer<StandardVariant<Scalar, Weight>> {
 public:
  using AttentionLayer<StandardVariant<Scalar, Weight>>::AttentionLayer;
};

}  // namespace diffattn::inline v0_1
