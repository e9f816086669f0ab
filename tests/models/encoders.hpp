#pragma once

// Encoders for tests: every attention, one of a user's own among them, and every norm and feed-forward layer.

#include <diffattn/layers/attention_layer.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <diffattn/models/encoder.hpp>
#include <optional>

#include "support/random.hpp"

namespace encoders {

using namespace diffattn;

struct OwnConfig {
  Index embed_dim = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::optional<RotaryConfig> rotary = std::nullopt;
  bool bias = false;
  std::uint64_t seed = 0;
};

/// A user's own attention: one softmax a head, whose result is three times as wide.
template <typename ScalarType>
struct OwnVariant {
  using Scalar = ScalarType;
  using Config = OwnConfig;
  using WeightMatrix = Matrix<Scalar>;

  Linear<Scalar> mix;
  static constexpr const char* kName = "OwnAttention";
  static constexpr Index kQueryMaps = 1, kKeyMaps = 1;
  static constexpr auto kOutput = &OwnVariant::mix;
  static constexpr auto kLambda = LambdaSource::none;
  static constexpr bool kFinishesHeads = false;

  explicit OwnVariant(const Config& config) : mix(config.num_heads * value_dim(config), config.embed_dim, true) {}
  static Index value_dim(const Config& config) { return 3 * config.head_dim; }
  void initialize(Initializer& random) { mix.initialize(random); }
  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("mix", self.mix, visitor);
  }
};
template <typename Scalar>
using OwnAttention = AttentionLayer<OwnVariant<Scalar>>;

/// Parameters of a size at which every part matters.
template <typename Model>
void randomize(Model& model, support::Rng& rng) {
  visit_parameters(model, [&](std::string_view name, auto& p) {
    using S = typename std::remove_reference_t<decltype(p)>::Scalar;
    p = S(0.4) * support::random_matrix<S>(p.rows(), p.cols(), rng);
    if (name.find("norm.weight") != name.npos) p.array() += S(1);
  });
}

}  // namespace encoders
