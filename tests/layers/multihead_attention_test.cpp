#include <diffattn/layers/multihead_attention.hpp>

#include "layers/layer_checks.hpp"

namespace {

using diffattn::Index;
using diffattn::Matrix;
using diffattn::MultiheadAttention;
using diffattn::RotaryConfig;
using diffattn::RotaryPairing;
using layer_checks::config_error;
using StandardConfig = MultiheadAttention<float>::Config;

const auto plain_attention = [](const auto& weights, const auto& config, const auto& x, const auto& mask) {
  return oracle::multihead_attention(weights, config, x, mask);
};

}  // namespace

TEST_CASE("MultiheadAttention agrees with plain loops", "[layers][multihead_attention]") {
  auto rng = make_rng();
  const StandardConfig config = GENERATE(
      StandardConfig{.embed_dim = 64, .num_heads = 8, .rotary = RotaryConfig{}},
      StandardConfig{.embed_dim = 96, .num_heads = 6, .num_kv_heads = 2, .rotary = RotaryConfig{}},
      StandardConfig{
          .embed_dim = 48, .num_heads = 4, .num_kv_heads = 1, .rotary = RotaryConfig{.pairing = RotaryPairing::half}},
      StandardConfig{.embed_dim = 35, .num_heads = 5, .bias = true}, StandardConfig{.embed_dim = 1, .num_heads = 1},
      StandardConfig{.embed_dim = 32, .num_heads = 2, .rotary = RotaryConfig{.base = 50, .dim = 4}});
  layer_checks::accuracy_at_all_lengths<MultiheadAttention>(config, plain_attention, rng);
}

TEST_CASE("MultiheadAttention: sequences, prefixes, threads, strides, refusals", "[layers][multihead_attention]") {
  const StandardConfig config =
      GENERATE(StandardConfig{.embed_dim = 48, .num_heads = 8, .num_kv_heads = 4, .rotary = RotaryConfig{}},
               StandardConfig{.embed_dim = 35, .num_heads = 5, .bias = true});
  layer_checks::laws<MultiheadAttention>(config, "MultiheadAttention");
}

TEST_CASE("The baseline's parameters carry the official names", "[layers][multihead_attention]") {
  using Names = std::vector<std::string>;
  const MultiheadAttention<float> layer({.embed_dim = 24, .num_heads = 6, .num_kv_heads = 2});
  CHECK(layer_checks::parameter_list(layer) ==
        Names{"q_proj.weight 24x24", "k_proj.weight 8x24", "v_proj.weight 8x24", "out_proj.weight 24x24"});
  const MultiheadAttention<float> biased({.embed_dim = 4, .num_heads = 2, .bias = true});
  CHECK(layer_checks::parameter_list(biased) == Names{"q_proj.weight 4x4", "q_proj.bias 4x1", "k_proj.weight 4x4",
                                                      "k_proj.bias 4x1", "v_proj.weight 4x4", "v_proj.bias 4x1",
                                                      "out_proj.weight 4x4", "out_proj.bias 4x1"});
  CHECK(parameter_count(MultiheadAttention<float>({.embed_dim = 1024, .num_heads = 16})) == 4'194'304);
}

TEST_CASE("The baseline starts as nn.Linear does, fixed by the seed", "[layers][multihead_attention]") {
  const StandardConfig config{.embed_dim = 128, .num_heads = 2, .bias = true, .seed = 1};
  const MultiheadAttention<float> layer(config);
  for (const auto* projection : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.out_proj}) {
    layer_checks::check_uniform(projection->weight, 1 / std::sqrt(128.0));
    layer_checks::check_uniform(projection->bias, 1 / std::sqrt(128.0));
  }
  CHECK(layer_checks::same_parameters(layer, MultiheadAttention<float>(config)));
  StandardConfig other = config;
  other.seed = 2;
  CHECK_FALSE(layer_checks::same_parameters(layer, MultiheadAttention<float>(other)));
}

TEST_CASE("A configuration of the baseline that cannot be is refused by name", "[layers][multihead_attention]") {
  CHECK(config_error<MultiheadAttention>({}) == "MultiheadAttention: num_heads must be at least 1, got 0");
  CHECK(config_error<MultiheadAttention>({.embed_dim = 8, .num_heads = -2}) ==
        "MultiheadAttention: num_heads must be at least 1, got -2");
  CHECK(config_error<MultiheadAttention>({.embed_dim = 0, .num_heads = 2}) ==
        "MultiheadAttention: embed_dim must be at least 1, got 0");
  CHECK(config_error<MultiheadAttention>({.embed_dim = 50, .num_heads = 4}) ==
        "MultiheadAttention: num_heads = 4 must divide embed_dim = 50");
  CHECK(config_error<MultiheadAttention>({.embed_dim = 48, .num_heads = 6, .num_kv_heads = 4}) ==
        "MultiheadAttention: num_kv_heads must divide num_heads, got 4 and 6");
  CHECK(config_error<MultiheadAttention>({.embed_dim = 9, .num_heads = 3, .rotary = RotaryConfig{}}) ==
        "Rotary: dim must be even and between 2 and the head_dim 3, got 3");
}
