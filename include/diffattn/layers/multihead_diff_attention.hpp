#pragma once

// Multi-head differential attention, the layer of the paper and of the official multihead_flashdiff_1.py:
//
//   λ      = exp(λq1·λk1) − exp(λq2·λk2) + λ_init                                             eq. (2)
//   head_h = (1 − λ_init) · RMSNorm((P1_h − λ·P2_h) V_g)                                      eq. (1), (3)
//   y      = Concat(head_1 … head_H) W_Oᵀ                                                     eq. (3)
//
// num_heads (H) counts differential heads, half a Transformer's. d = embed_dim / (2H), or as head_dim says. Packed
// query head 2h is Q1_h and 2h + 1 is Q2_h, each d wide; keys likewise for num_kv_heads (G); V_g is one slab of 2d
// columns. Head h reads key and value head g = h / (H/G): the pairing of the flash variants, to which every other
// implementation keeps (the official naive file differs when G < H). Rotary turns each packed head. The norm weight and
// λ are shared by all heads.
//
// Grouped noise heads (arXiv 2510.06949): with num_noise_heads = N < H, r = H / N heads that follow each other share
// their second map, that of the noise, which is computed once for them; λ, norm and all else stay the same. The queries
// of a group are r signal heads Q1 and then its noise head Q2, (H + N)·d columns in all: layer.query_head(head, map)
// says where. Keys stay pairs K1, K2 for each key head, of which group g reads g / (N/G). r = 1 is the paper's layer.
//
// Parameters (visit_parameters): q_proj, k_proj, v_proj, out_proj, lambda_q1, lambda_k1, lambda_q2, lambda_k2, subln.
// How it is called, shapes, errors, threads: attention_layer.hpp.

#include <cstdint>
#include <optional>

#include "diffattn/layers/attention_layer.hpp"
#include "diffattn/layers/lambda.hpp"
#include "diffattn/layers/rms_norm.hpp"

namespace diffattn::inline v0_1 {

struct MultiheadDiffAttentionConfig {
  Index embed_dim = 0;
  Index num_heads = 0;                                ///< differential heads
  Index num_kv_heads = 0;                             ///< divides num_heads; 0 = num_heads
  Index head_dim = 0;                                 ///< d; 0 = embed_dim / (2·num_heads)
  Index num_noise_heads = 0;                          ///< divides num_heads, a multiple of num_kv_heads; 0 = num_heads
  Index depth = 0;                                    ///< 0-based index of the layer, which sets λ_init
  std::optional<double> lambda_init = std::nullopt;   ///< overrides what depth gives
  std::optional<RotaryConfig> rotary = std::nullopt;  ///< no position embedding if left out
  double norm_eps = 1e-5;
  bool norm_weight = true;                     ///< whether the head norm has a learned weight
  bool bias = false;                           ///< biases on the four projections
  std::uint64_t seed = 0;                      ///< of the initial parameters
  Arithmetic arithmetic = Arithmetic::scalar;  ///< of the projections
};

/// One λ for the layer, and a norm of every head.
template <typename ScalarType, typename Weight>
class DiffVariant {
 public:
  using Scalar = ScalarType;
  using Config = MultiheadDiffAttentionConfig;
  using WeightMatrix = Weight;

  /// λ as the forward pass uses it.
  Scalar lambda_value() const { return lambda.value(); }

  Linear<Scalar, Weight> out_proj;  ///< embed_dim x num_heads·2d
  DiffLambda<Scalar> lambda;        ///< vectors of width d
  RmsNorm<Scalar> subln;            ///< width 2d

 protected:
  static constexpr const char* kName = "MultiheadDiffAttention";
  static constexpr Index kQueryMaps = 2, kKeyMaps = 2;
  static constexpr auto kOutput = &DiffVariant::out_proj;
  static constexpr LambdaSource kLambda = LambdaSource::layer;
  static constexpr bool kFinishesHeads = true;

  explicit DiffVariant(const Config& config)
      : out_proj(config.num_heads * value_dim(config), config.embed_dim, config.bias),
        lambda(config.head_dim, config.lambda_init.value_or(lambda_init(static_cast<double>(config.depth)))),
        subln(value_dim(config), config.norm_eps, config.norm_weight) {}

  static Index value_dim(const Config& config) { return 2 * config.head_dim; }
  void initialize(Initializer& random) {
    out_proj.initialize(random);
    lambda.initialize(random);
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("out_proj", self.out_proj, visitor);
    visit_parameters(self.lambda, visitor);
    visit_part("subln", self.subln, visitor);
  }

  void backward_lambda(Scalar dlambda, DiffVariant& grad) const { lambda.backward(dlambda, grad.lambda); }

  template <typename Y, typename X, Executor E>
  void finish_heads(Y& y, const X& x, Workspace& workspace, E& executor) const {
    subln.forward_into(y, x, workspace, executor, head_scale());
  }
  template <typename DX, typename DY, typename X, Executor E>
  void backward_heads(DX& dx, const DY& dy, const X& x, DiffVariant& grad, Workspace& workspace, E& executor) const {
    subln.backward_into(dx, dy, x, grad.subln, workspace, executor, head_scale());
  }

 private:
  Scalar head_scale() const { return static_cast<Scalar>(1 - lambda.init); }
};

/// Initial parameters are those of the official code: projections as nn.Linear, λ vectors N(0, 0.1²), norm weight 1.
/// Weight: the matrix type of the projections' weights, as linear.hpp says.
template <typename Scalar, typename Weight = Matrix<Scalar>>
class MultiheadDiffAttention : public AttentionLayer<DiffVariant<Scalar, Weight>> {
 public:
  using AttentionLayer<DiffVariant<Scalar, Weight>>::AttentionLayer;
};

}  // namespace diffattn::inline v0_1
