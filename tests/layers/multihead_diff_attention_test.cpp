#include <diffattn/layers/multihead_diff_attention.hpp>

#include "layers/layer_checks.hpp"

namespace {

using diffattn::CausalMask;
using diffattn::Index;
using diffattn::Matrix;
using diffattn::MultiheadDiffAttention;
using diffattn::RotaryConfig;
using diffattn::RotaryPairing;
using layer_checks::config_error;
using DiffConfig = MultiheadDiffAttention<float>::Config;

const auto plain_diff_attention = [](const auto& weights, const auto& config, const auto& x, const auto& mask) {
  return oracle::multihead_diff_attention(weights, config, x, mask);
};

}  // namespace

TEST_CASE("MultiheadDiffAttention reproduces the official implementation",
          "[layers][multihead_diff_attention][golden]") {
  const std::string name = GENERATE("layer_v1_0", "layer_v1_1", "layer_v1_2");
  INFO(name);
  const diffattn::Safetensors file(std::string(DIFFATTN_TEST_DATA "/golden/") + name + ".safetensors");
  const auto number = [&](const char* key) { return std::stol(file.metadata().at(key)); };
  const DiffConfig config{.embed_dim = number("embed_dim"),
                          .num_heads = number("num_heads"),
                          .num_kv_heads = number("num_kv_heads"),
                          .depth = number("depth"),
                          .rotary = RotaryConfig{.base = std::stod(file.metadata().at("rope_base"))}};
  layer_checks::golden<MultiheadDiffAttention>(config, file, plain_diff_attention);
}

TEST_CASE("MultiheadDiffAttention agrees with plain loops", "[layers][multihead_diff_attention]") {
  auto rng = make_rng();
  const DiffConfig config = GENERATE(
      DiffConfig{.embed_dim = 64, .num_heads = 4, .rotary = RotaryConfig{}},
      DiffConfig{.embed_dim = 96, .num_heads = 6, .num_kv_heads = 2, .depth = 5, .rotary = RotaryConfig{}},
      DiffConfig{
          .embed_dim = 48, .num_heads = 4, .num_kv_heads = 1, .rotary = RotaryConfig{.pairing = RotaryPairing::half}},
      DiffConfig{.embed_dim = 36, .num_heads = 3, .depth = 2, .bias = true},
      DiffConfig{.embed_dim = 10, .num_heads = 5, .lambda_init = 0.5},
      DiffConfig{.embed_dim = 2, .num_heads = 1, .norm_weight = false},
      DiffConfig{.embed_dim = 32,
                 .num_heads = 2,
                 .lambda_init = -0.25,
                 .rotary = RotaryConfig{.base = 50, .dim = 4},
                 .norm_eps = 0.1,
                 .norm_weight = false},
      DiffConfig{.embed_dim = 10, .num_heads = 3, .num_kv_heads = 1, .head_dim = 4, .rotary = RotaryConfig{}});
  layer_checks::accuracy_at_all_lengths<MultiheadDiffAttention>(config, plain_diff_attention, rng);
}

TEST_CASE("MultiheadDiffAttention: sequences, prefixes, threads, strides, refusals",
          "[layers][multihead_diff_attention]") {
  const DiffConfig config =
      GENERATE(DiffConfig{.embed_dim = 48, .num_heads = 4, .num_kv_heads = 2, .depth = 3, .rotary = RotaryConfig{}},
               DiffConfig{.embed_dim = 36, .num_heads = 3, .bias = true}, DiffConfig{.embed_dim = 10, .num_heads = 1});
  layer_checks::laws<MultiheadDiffAttention>(config, "MultiheadDiffAttention");
}

TEST_CASE("Query pair h reads key pair h / (num_heads / num_kv_heads), as the flash variants do",
          "[layers][multihead_diff_attention]") {
  // Repeating every key and value head of a grouped layer gives the ungrouped layer that must agree with it.
  auto rng = make_rng();
  MultiheadDiffAttention<double> grouped(
      {.embed_dim = 48, .num_heads = 4, .num_kv_heads = 2, .rotary = RotaryConfig{}});
  layer_checks::randomize(grouped, rng);
  MultiheadDiffAttention<double> repeated({.embed_dim = 48, .num_heads = 4, .rotary = RotaryConfig{}});
  repeated.q_proj.weight = grouped.q_proj.weight;
  repeated.out_proj.weight = grouped.out_proj.weight;
  repeated.lambda = grouped.lambda;
  repeated.subln = grouped.subln;
  for (const Index h : {0, 1, 2, 3}) {
    repeated.k_proj.weight.middleRows(12 * h, 12) = grouped.k_proj.weight.middleRows(12 * (h / 2), 12);
    repeated.v_proj.weight.middleRows(12 * h, 12) = grouped.v_proj.weight.middleRows(12 * (h / 2), 12);
  }
  const Matrix<double> x = random_matrix<double>(30, 48, rng);
  CHECK(grouped.forward(x).isApprox(repeated.forward(x), 1e-13));
}

TEST_CASE("The parameters carry the names of the official state dict", "[layers][multihead_diff_attention]") {
  using Names = std::vector<std::string>;
  MultiheadDiffAttention<float> layer({.embed_dim = 24, .num_heads = 6, .num_kv_heads = 2});
  const MultiheadDiffAttention<float>& constant = layer;
  const Names expected = {"q_proj.weight 24x24",   "k_proj.weight 8x24", "v_proj.weight 8x24",
                          "out_proj.weight 24x24", "lambda_q1 2x1",      "lambda_k1 2x1",
                          "lambda_q2 2x1",         "lambda_k2 2x1",      "subln.weight 4x1"};
  CHECK(layer_checks::parameter_list(layer) == expected);
  CHECK(layer_checks::parameter_list(constant) == expected);

  const MultiheadDiffAttention<float> other({.embed_dim = 24, .num_heads = 6, .norm_weight = false, .bias = true});
  CHECK(layer_checks::parameter_list(other) == Names{"q_proj.weight 24x24", "q_proj.bias 24x1", "k_proj.weight 24x24",
                                                     "k_proj.bias 24x1", "v_proj.weight 24x24", "v_proj.bias 24x1",
                                                     "out_proj.weight 24x24", "out_proj.bias 24x1", "lambda_q1 2x1",
                                                     "lambda_k1 2x1", "lambda_q2 2x1", "lambda_k2 2x1"});
}

TEST_CASE("The layer of the official example has the official number of parameters",
          "[layers][multihead_diff_attention]") {
  CHECK(parameter_count(MultiheadDiffAttention<float>({.embed_dim = 1024, .num_heads = 8})) == 4'194'688);
  CHECK(parameter_count(MultiheadDiffAttention<float>({.embed_dim = 1024, .num_heads = 8, .num_kv_heads = 4})) ==
        3'146'112);
}

TEST_CASE("Depth sets λ_init, and λ_init overrides depth", "[layers][multihead_diff_attention]") {
  CHECK(MultiheadDiffAttention<double>({.embed_dim = 8, .num_heads = 2}).lambda.init == diffattn::lambda_init(0));
  CHECK(MultiheadDiffAttention<double>({.embed_dim = 8, .num_heads = 2, .depth = 7}).lambda.init ==
        diffattn::lambda_init(7));
  CHECK(MultiheadDiffAttention<double>({.embed_dim = 8, .num_heads = 2, .depth = 7, .lambda_init = 0.8}).lambda.init ==
        0.8);
}

TEST_CASE("Initial parameters are those of the official code, fixed by the seed",
          "[layers][multihead_diff_attention]") {
  const DiffConfig config{.embed_dim = 128, .num_heads = 2, .bias = true, .seed = 1};
  const MultiheadDiffAttention<float> layer(config);
  for (const auto* projection : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.out_proj}) {
    layer_checks::check_uniform(projection->weight, 1 / std::sqrt(128.0));
    layer_checks::check_uniform(projection->bias, 1 / std::sqrt(128.0));
  }
  CHECK(identical(layer.subln.weight, Eigen::VectorXf::Ones(64)));

  // 4 · 32 numbers from N(0, 0.1²).
  Eigen::VectorXf lambdas(128);
  lambdas << layer.lambda.q1, layer.lambda.k1, layer.lambda.q2, layer.lambda.k2;
  CHECK(std::abs(lambdas.mean()) < 5 * 0.1f / std::sqrt(128.0f));
  CHECK(std::abs(lambdas.squaredNorm() / 1.28f - 1) < 5 * std::sqrt(2.0f / 128));

  CHECK(layer_checks::same_parameters(layer, MultiheadDiffAttention<float>(config)));
  DiffConfig other = config;
  other.seed = 2;
  CHECK_FALSE(layer_checks::same_parameters(layer, MultiheadDiffAttention<float>(other)));
  CHECK_FALSE(identical(layer.q_proj.weight, layer.k_proj.weight));
}

TEST_CASE("A copy of a layer is a layer of its own", "[layers][multihead_diff_attention]") {
  auto rng = make_rng();
  MultiheadDiffAttention<float> layer({.embed_dim = 16, .num_heads = 2, .rotary = RotaryConfig{}});
  const Matrix<float> x = random_matrix<float>(6, 16, rng), y = layer.forward(x);
  const MultiheadDiffAttention<float> copy = layer;
  layer_checks::randomize(layer, rng);
  CHECK(identical(copy.forward(x), y));
  CHECK_FALSE(identical(layer.forward(x), y));
}

TEST_CASE("A configuration that cannot be is refused by name", "[layers][multihead_diff_attention]") {
  CHECK(config_error<MultiheadDiffAttention>({}) == "MultiheadDiffAttention: num_heads must be at least 1, got 0");
  CHECK(config_error<MultiheadDiffAttention>({.embed_dim = 8}) ==
        "MultiheadDiffAttention: num_heads must be at least 1, got 0");
  CHECK(config_error<MultiheadDiffAttention>({.embed_dim = 8, .num_heads = -2}) ==
        "MultiheadDiffAttention: num_heads must be at least 1, got -2");
  CHECK(config_error<MultiheadDiffAttention>({.embed_dim = 0, .num_heads = 2}) ==
        "MultiheadDiffAttention: embed_dim must be at least 1, got 0");
  CHECK(config_error<MultiheadDiffAttention>({.embed_dim = -8, .num_heads = 2}) ==
        "MultiheadDiffAttention: embed_dim must be at least 1, got -8");
  CHECK(config_error<MultiheadDiffAttention>({.embed_dim = 50, .num_heads = 4}) ==
        "MultiheadDiffAttention: 2·num_heads = 8 must divide embed_dim = 50");
  CHECK(config_error<MultiheadDiffAttention>({.embed_dim = 12, .num_heads = 4}) ==
        "MultiheadDiffAttention: 2·num_heads = 8 must divide embed_dim = 12");
  CHECK(config_error<MultiheadDiffAttention>({.embed_dim = 48, .num_heads = 6, .num_kv_heads = 4}) ==
        "MultiheadDiffAttention: num_kv_heads must divide num_heads, got 4 and 6");
  CHECK(config_error<MultiheadDiffAttention>({.embed_dim = 48, .num_heads = 6, .num_kv_heads = -3}) ==
        "MultiheadDiffAttention: num_kv_heads must divide num_heads, got -3 and 6");
  CHECK(config_error<MultiheadDiffAttention>({.embed_dim = 48, .num_heads = 6, .num_kv_heads = 12}) ==
        "MultiheadDiffAttention: num_kv_heads must divide num_heads, got 12 and 6");
  CHECK(config_error<MultiheadDiffAttention>({.embed_dim = 12, .num_heads = 2, .rotary = RotaryConfig{}}) ==
        "Rotary: dim must be even and between 2 and the head_dim 3, got 3");
  CHECK(config_error<MultiheadDiffAttention>({.embed_dim = 16, .num_heads = 2, .rotary = RotaryConfig{.dim = 6}}) ==
        "Rotary: dim must be even and between 2 and the head_dim 4, got 6");
}
