#include <diffattn/hugging_face/diffllama_layout.hpp>
#include <diffattn/io/safetensors.hpp>

#include "hugging_face/checkpoints.hpp"
#include "support/catch.hpp"
#include "support/tolerances.hpp"

using diffattn::DiffLlamaAttention;
using diffattn::Index;
using diffattn::Matrix;
using diffattn::MultiheadDiffAttention;
using diffattn::RotaryConfig;
using diffattn::RotaryPairing;

TEST_CASE("A layer of the official layout is the same layer in Hugging Face's", "[models][diffllama_layout]") {
  auto rng = support::make_rng();
  const bool bias = GENERATE(false, true);
  const RotaryPairing pairing = GENERATE(RotaryPairing::interleaved, RotaryPairing::half);
  MultiheadDiffAttention<double> layer({.embed_dim = 32,
                                        .num_heads = 4,
                                        .num_kv_heads = 2,
                                        .head_dim = 6,
                                        .depth = 1,
                                        .rotary = RotaryConfig{.pairing = pairing},
                                        .norm_eps = 1e-3,
                                        .bias = bias});
  visit_parameters(layer, [&](std::string_view, auto& parameter) {
    parameter = support::random_matrix<double>(parameter.rows(), parameter.cols(), rng) / 4;
  });
  const DiffLlamaAttention<double> theirs(layer);

  diffattn::DiffLlamaConfig config;
  config.hidden_size = 32;
  config.num_attention_heads = 8;
  config.num_key_value_heads = 4;
  config.head_dim = 6;
  config.rms_norm_eps = 1e-3;
  hugging_face::Weights weights;
  visit_parameters(theirs, [&](std::string_view name, const auto& parameter) {
    Matrix<double>& weight = weights["model.layers.1.self_attn." + std::string(name)];
    weight = parameter;
    if (parameter.cols() == 1) weight.transposeInPlace();
  });
  const Matrix<double> x = support::random_matrix<double>(11, 32, rng), y = layer.forward(x);
  const Matrix<double> z = hugging_face::attention(config, weights, 1, x);
  CHECK((y - z).cwiseAbs().maxCoeff() < 1e-12 * y.cwiseAbs().maxCoeff());

  // Back: the same numbers, the norm weight being in the output projection now.
  const MultiheadDiffAttention<double> back = theirs.official();
  CHECK(support::identical(back.q_proj.weight, layer.q_proj.weight));
  CHECK(support::identical(back.k_proj.weight, layer.k_proj.weight));
  CHECK(support::identical(back.v_proj.weight, layer.v_proj.weight));
  CHECK(support::identical(back.k_proj.bias, layer.k_proj.bias));
  CHECK((back.subln.weight.array() == 1).all());
  CHECK((back.forward(x) - y).cwiseAbs().maxCoeff() < 1e-12 * y.cwiseAbs().maxCoeff());
  CHECK(support::identical(DiffLlamaAttention<double>(back).q_proj.weight, theirs.q_proj.weight));
}

TEST_CASE("Hugging Face's weights are loaded into their layout and become an official layer",
          "[models][diffllama_layout]") {
  const diffattn::Safetensors file(DIFFATTN_TEST_DATA "/models/diffllama_0/model.safetensors");
  DiffLlamaAttention<float> theirs(
      {.embed_dim = 32, .num_heads = 2, .num_kv_heads = 1, .rotary = RotaryConfig{}, .norm_weight = false});
  load_parameters(theirs, file, "model.layers.0.self_attn.");
  const MultiheadDiffAttention<float> layer = theirs.official();
  const Matrix<float> q = file.matrix<float>("model.layers.0.self_attn.q_proj.weight");
  // Packed head 1 is Q2 of head 0, their head 2; its second row is the half pairing's fifth.
  CHECK(support::identical(layer.q_proj.weight.row(8), q.row(16)));
  CHECK(support::identical(layer.q_proj.weight.row(9), q.row(20)));
  CHECK(support::identical(layer.out_proj.weight, file.matrix<float>("model.layers.0.self_attn.o_proj.weight")));
}

TEST_CASE("A rotary embedding of a part of a head has no DiffLlama, nor have shared noise heads",
          "[models][diffllama_layout]") {
  CHECK_THROWS_AS(DiffLlamaAttention<float>({.embed_dim = 32, .num_heads = 2, .num_kv_heads = 1, .num_noise_heads = 1}),
                  std::invalid_argument);
  CHECK_THROWS_AS(DiffLlamaAttention<float>({.embed_dim = 32, .num_heads = 2, .rotary = RotaryConfig{.dim = 4}}),
                  std::invalid_argument);
}
