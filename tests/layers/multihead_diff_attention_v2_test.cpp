#include <diffattn/layers/multihead_diff_attention_v2.hpp>

#include "layers/layer_checks.hpp"

namespace {

using diffattn::Index;
using diffattn::Matrix;
using diffattn::MultiheadDiffAttentionV2;
using diffattn::RotaryConfig;
using diffattn::RotaryPairing;
using layer_checks::config_error;
using V2Config = MultiheadDiffAttentionV2<float>::Config;

const auto plain_diff_attention_v2 = [](const auto& weights, const auto& config, const auto& x, const auto& mask) {
  return oracle::multihead_diff_attention_v2(weights, config, x, mask);
};

}  // namespace

TEST_CASE("MultiheadDiffAttentionV2 reproduces the official implementation",
          "[layers][multihead_diff_attention_v2][golden]") {
  const std::string name = GENERATE("layer_v2_0", "layer_v2_1");
  INFO(name);
  const diffattn::Safetensors file(std::string(DIFFATTN_TEST_DATA "/golden/") + name + ".safetensors");
  const auto number = [&](const char* key) { return std::stol(file.metadata().at(key)); };
  const V2Config config{.embed_dim = number("d_model"),
                        .num_heads = number("num_heads"),
                        .num_kv_heads = number("num_kv_heads"),
                        .head_dim = number("head_dim"),
                        .rotary = RotaryConfig{.base = std::stod(file.metadata().at("rope_base"))}};
  layer_checks::golden<MultiheadDiffAttentionV2>(config, file, plain_diff_attention_v2);
}

TEST_CASE("MultiheadDiffAttentionV2 agrees with plain loops", "[layers][multihead_diff_attention_v2]") {
  auto rng = make_rng();
  const V2Config config = GENERATE(
      V2Config{.embed_dim = 64, .num_heads = 4, .num_kv_heads = 2, .head_dim = 16, .rotary = RotaryConfig{}},
      V2Config{.embed_dim = 48, .num_heads = 3, .head_dim = 8, .rotary = RotaryConfig{.pairing = RotaryPairing::half}},
      V2Config{.embed_dim = 30, .num_heads = 4, .num_kv_heads = 1, .head_dim = 5, .bias = true},
      V2Config{.embed_dim = 32, .num_heads = 2}, V2Config{.embed_dim = 3, .num_heads = 1, .head_dim = 1});
  layer_checks::accuracy_at_all_lengths<MultiheadDiffAttentionV2>(config, plain_diff_attention_v2, rng);
}

TEST_CASE("MultiheadDiffAttentionV2: sequences, prefixes, threads, strides, refusals",
          "[layers][multihead_diff_attention_v2]") {
  const V2Config config =
      GENERATE(V2Config{.embed_dim = 48, .num_heads = 4, .num_kv_heads = 2, .head_dim = 8, .rotary = RotaryConfig{}},
               V2Config{.embed_dim = 35, .num_heads = 3, .head_dim = 7, .bias = true});
  layer_checks::laws<MultiheadDiffAttentionV2>(config, "MultiheadDiffAttentionV2");
}

TEST_CASE("λ of the second version saturates at 0 and 1", "[layers][multihead_diff_attention_v2]") {
  auto rng = make_rng();
  MultiheadDiffAttentionV2<float> layer({.embed_dim = 16, .num_heads = 1, .head_dim = 4, .bias = true});
  layer_checks::randomize(layer, rng);
  layer.lambda_proj.weight.setZero();
  const Matrix<float> x = random_matrix<float>(9, 16, rng);
  // λ = 1 and two equal maps leave nothing but the bias; λ = 0 leaves the first map.
  layer.q_proj.weight.bottomRows(4) = layer.q_proj.weight.topRows(4);
  layer.q_proj.bias.tail(4) = layer.q_proj.bias.head(4);
  layer.lambda_proj.bias(0) = 1000;
  CHECK((layer.forward(x).rowwise() - layer.o_proj.bias.transpose()).cwiseAbs().maxCoeff() < 1e-6f);
  layer.lambda_proj.bias(0) = -1000;
  const Matrix<float> first = layer.forward(x);
  layer.q_proj.weight.bottomRows(4).setRandom();
  CHECK(identical(layer.forward(x), first));
}

TEST_CASE("The second version's parameters carry the official names", "[layers][multihead_diff_attention_v2]") {
  using Names = std::vector<std::string>;
  const MultiheadDiffAttentionV2<float> layer({.embed_dim = 24, .num_heads = 6, .num_kv_heads = 2, .head_dim = 5});
  CHECK(layer_checks::parameter_list(layer) == Names{"q_proj.weight 60x24", "k_proj.weight 10x24",
                                                     "v_proj.weight 10x24", "lambda_proj.weight 6x24",
                                                     "o_proj.weight 24x30"});
}

TEST_CASE("The second version starts as nn.Linear does, fixed by the seed", "[layers][multihead_diff_attention_v2]") {
  const V2Config config{.embed_dim = 128, .num_heads = 16, .head_dim = 8, .seed = 1};
  const MultiheadDiffAttentionV2<float> layer(config);
  for (const auto* projection : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.lambda_proj, &layer.o_proj}) {
    layer_checks::check_uniform(projection->weight, 1 / std::sqrt(128.0));
  }
  CHECK(layer_checks::same_parameters(layer, MultiheadDiffAttentionV2<float>(config)));
}

TEST_CASE("A configuration of the second version that cannot be is refused by name",
          "[layers][multihead_diff_attention_v2]") {
  CHECK(config_error<MultiheadDiffAttentionV2>({}) == "MultiheadDiffAttentionV2: num_heads must be at least 1, got 0");
  CHECK(config_error<MultiheadDiffAttentionV2>({.embed_dim = 8}) ==
        "MultiheadDiffAttentionV2: num_heads must be at least 1, got 0");
  CHECK(config_error<MultiheadDiffAttentionV2>({.embed_dim = 50, .num_heads = 4}) ==
        "MultiheadDiffAttentionV2: 2·num_heads = 8 must divide embed_dim = 50");
  CHECK(config_error<MultiheadDiffAttentionV2>({.embed_dim = 50, .num_heads = 4, .head_dim = -1}) ==
        "MultiheadDiffAttentionV2: head_dim must be at least 1, got -1");
  CHECK(config_error<MultiheadDiffAttentionV2>({.embed_dim = 48, .num_heads = 6, .num_kv_heads = 4, .head_dim = 8}) ==
        "MultiheadDiffAttentionV2: num_kv_heads must divide num_heads, got 4 and 6");
  CHECK(config_error<MultiheadDiffAttentionV2>(
            {.embed_dim = 48, .num_heads = 6, .head_dim = 7, .rotary = RotaryConfig{}}) ==
        "Rotary: dim must be even and between 2 and the head_dim 7, got 7");
}
