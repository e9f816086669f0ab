#include <cmath>
#include <diffattn/training/adamw.hpp>
#include <limits>
#include <string>
#include <vector>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/multihead_diff_attention_v2.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"
#include "training/parameters.hpp"

using diffattn::AdamW;
using diffattn::adamw_group;
using diffattn::AdamWConfig;
using diffattn::Index;
using diffattn::Matrix;

namespace {

/// One number of the algorithm box in torch.optim.AdamW's documentation, in long double.
struct Documented {
  long double theta, m = 0, v = 0, power1 = 1, power2 = 1;

  void step(long double g, const AdamWConfig& c, long double lr, long double decay) {
    theta -= lr * decay * theta;
    m = static_cast<long double>(c.beta1) * m + (1 - static_cast<long double>(c.beta1)) * g;
    v = static_cast<long double>(c.beta2) * v + (1 - static_cast<long double>(c.beta2)) * g * g;
    power1 *= static_cast<long double>(c.beta1);
    power2 *= static_cast<long double>(c.beta2);
    theta -= lr * (m / (1 - power1)) / (std::sqrt(v / (1 - power2)) + static_cast<long double>(c.eps));
  }
};

}  // namespace

TEST_CASE("AdamW's steps by hand", "[training][adamw]") {
  // g = 0.5, then −1; lr 0.1, decay 0.1: θ1 = 1 − 0.01 − 0.1 = 0.89. Then m̂ = (0.045 − 0.1)/0.19, v̂ = (0.00024975 +
  // 0.001)/0.001999, and θ2 = 0.89·0.99 − 0.1·m̂/√v̂ = 0.8811 + 0.1·0.28947368421/0.79066863…
  SmallModel<double> model(1, 1), gradient(1, 1);
  model.weight(0, 0) = 1;
  AdamW<double> adamw(model, {.learning_rate = 0.1, .eps = 0, .weight_decay = 0.1});
  gradient.weight(0, 0) = 0.5;
  adamw.step(model, gradient);
  CHECK(std::abs(model.weight(0, 0) - 0.89) < 1e-15);
  gradient.weight(0, 0) = -1;
  adamw.step(model, gradient);
  const double m = (0.9 * 0.05 - 0.1) / 0.19, v = (0.999 * 0.00025 + 0.001) / 0.001999;
  CHECK(std::abs(model.weight(0, 0) - (0.89 * 0.99 - 0.1 * m / std::sqrt(v))) < 1e-14);
  CHECK(adamw.steps == 2);
}

TEMPLATE_TEST_CASE("AdamW follows the documented algorithm over many steps", "[training][adamw]", float, double) {
  using S = TestType;
  auto rng = support::make_rng();
  const AdamWConfig config{.beta1 = 0.8, .beta2 = 0.95, .eps = 1e-6, .weight_decay = 0.2};
  for (const Index cols : {1, 7, 64, 65, 200}) {
    INFO(cols << " columns");
    auto model = random_model<S>(rng, 3, cols);
    AdamW<S> adamw(model, config);
    Matrix<long double> expected = model.weight.template cast<long double>(), m = expected, v = expected;
    std::vector<Documented> weights, norms;
    for (Index i = 0; i < model.weight.size(); ++i)
      weights.push_back({static_cast<long double>(model.weight.data()[i])});
    for (Index i = 0; i < model.norm.size(); ++i) norms.push_back({static_cast<long double>(model.norm[i])});
    for (int step = 0; step < 20; ++step) {
      const auto gradient = random_model<S>(rng, 3, cols);
      const double lr = 0.01 * (step + 1);
      adamw.step(model, gradient, lr);
      for (std::size_t i = 0; i < weights.size(); ++i) {
        weights[i].step(static_cast<long double>(gradient.weight.data()[i]), config, static_cast<long double>(lr),
                        static_cast<long double>(config.weight_decay));
      }
      for (std::size_t i = 0; i < norms.size(); ++i) {
        norms[i].step(static_cast<long double>(gradient.norm[static_cast<Index>(i)]), config,
                      static_cast<long double>(lr), 0);
      }
    }
    const long double bound = 200 * static_cast<long double>(std::numeric_limits<S>::epsilon());
    for (std::size_t i = 0; i < weights.size(); ++i) {
      CHECK(std::abs(static_cast<long double>(model.weight.data()[i]) - weights[i].theta) < bound);
    }
    for (std::size_t i = 0; i < norms.size(); ++i) {
      CHECK(std::abs(static_cast<long double>(model.norm[static_cast<Index>(i)]) - norms[i].theta) < bound);
    }
  }
}

TEST_CASE("The moments of a first step in float are (1 − β) times the gradient and its square", "[training][adamw]") {
  SmallModel<float> model(1, 1), gradient(1, 1);
  gradient.weight(0, 0) = 3;
  AdamW<float> adamw(model, {.beta1 = 0.9, .beta2 = 0.999});
  adamw.step(model, gradient);
  float first = 0, second = 0;
  diffattn::visit_parameters(adamw, [&](std::string_view name, const auto& moment) {
    if (name == "first_moment.layers.0.q_proj.weight") first = moment(0, 0);
    if (name == "second_moment.layers.0.q_proj.weight") second = moment(0, 0);
  });
  CHECK(std::abs(first - 0.3f) < 0.3f * 2e-7f);
  CHECK(std::abs(second - 0.009f) < 0.009f * 1e-6f);
}

TEST_CASE("Decay is decoupled: without a gradient only what decays shrinks", "[training][adamw]") {
  auto rng = support::make_rng();
  auto model = random_model<double>(rng);
  const auto before = model;
  AdamW<double> adamw(model, {.learning_rate = 0.5, .weight_decay = 0.5});
  adamw.step(model, SmallModel<double>());
  CHECK(support::identical(model.weight, 0.75 * before.weight));
  CHECK(support::identical(model.bias, before.bias));
  CHECK(support::identical(model.norm, before.norm));
  CHECK(support::identical(model.lambda, before.lambda));
}

TEST_CASE("Groups go by name: no decay for norms, biases and λ", "[training][adamw]") {
  for (const char* name : {"subln.weight", "layers.3.norm.weight", "input_layernorm.weight", "model.norm.weight",
                           "q_proj.bias", "bias", "lambda_q1", "layers.0.lambda_k2", "self_attn.lambda_proj.weight"}) {
    INFO(name);
    CHECK(adamw_group(name).weight_decay_factor == 0);
    CHECK(adamw_group(name).learning_rate_factor == 1);
  }
  for (const char* name :
       {"q_proj.weight", "weight", "embed_tokens.weight", "layers.11.mlp.up_proj.weight", "bias_free.weight"}) {
    INFO(name);
    CHECK(adamw_group(name).weight_decay_factor == 1);
  }

  // In the layers, that leaves the projections.
  const auto decaying = [](const auto& layer) {
    std::string names;
    diffattn::visit_parameters(layer, [&](std::string_view name, const auto&) {
      if (adamw_group(name).weight_decay_factor != 0) names += std::string(name) + " ";
    });
    return names;
  };
  CHECK(decaying(diffattn::MultiheadDiffAttention<float>({.embed_dim = 8, .num_heads = 2, .bias = true})) ==
        "q_proj.weight k_proj.weight v_proj.weight out_proj.weight ");
  CHECK(decaying(diffattn::MultiheadDiffAttentionV2<float>({.embed_dim = 8, .num_heads = 2})) ==
        "q_proj.weight k_proj.weight v_proj.weight o_proj.weight ");

  // Groups of one's own: a frozen parameter.
  auto rng = support::make_rng();
  auto model = random_model<double>(rng);
  const auto before = model;
  AdamW<double> adamw(model, {}, [](std::string_view name) {
    return diffattn::AdamWGroup{.learning_rate_factor = name == "final_norm.weight" ? 0.0 : 2.0};
  });
  adamw.step(model, before, 0.25);
  CHECK(support::identical(model.norm, before.norm));
  CHECK((model.bias - before.bias + 0.005 * before.bias + 0.5 * before.bias.cwiseSign()).cwiseAbs().maxCoeff() < 1e-6);
}

TEST_CASE("AdamW's bits depend on neither threads nor memory", "[training][adamw]") {
  auto rng = support::make_rng();
  const auto initial = random_model<float>(rng, 170, 301), gradient = random_model<float>(rng, 170, 301);
  const auto stepped = [&](Index threads) {
    auto model = initial;
    AdamW<float> adamw(model);
    diffattn::ThreadPool pool(threads);
    for (int i = 0; i < 3; ++i) adamw.step(model, gradient, 0.1, pool);
    return model;
  };
  const auto expected = stepped(1);
  CHECK(same_parameters(stepped(2), expected));
  CHECK(same_parameters(stepped(4), expected));

  // Equal numbers stay equal wherever they lie: in a whole chunk or in the rest.
  SmallModel<float> model(1, 101), same(1, 101);
  model.norm.setConstant(0.3F);
  same.norm.setConstant(1.7F);
  AdamW<float> adamw(model);
  for (int i = 0; i < 5; ++i) adamw.step(model, same);
  CHECK((model.norm.array() == model.norm[0]).all());
}

TEST_CASE("AdamW refuses other parameters, before any work", "[training][adamw]") {
  auto rng = support::make_rng();
  auto model = random_model<double>(rng);
  const auto before = model;
  AdamW<double> adamw(model);
  const auto wide = random_model<double>(rng, 3, 6);
  CHECK(support::thrown_by<diffattn::ShapeError>([&] { adamw.step(model, wide); }) ==
        "AdamW: the gradient's layers.0.q_proj.weight must be 3 x 5, got 3 x 6");
  auto other = wide;
  CHECK(support::thrown_by<diffattn::ShapeError>([&] { adamw.step(other, wide); }) ==
        "AdamW: the model's layers.0.q_proj.weight must be 3 x 5, got 3 x 6");
  CHECK(same_parameters(model, before));
  CHECK(adamw.steps == 0);

  using Layer = diffattn::MultiheadDiffAttention<double>;
  Layer with_bias({.embed_dim = 8, .num_heads = 2, .bias = true}), without({.embed_dim = 8, .num_heads = 2});
  AdamW<double> of_layer(without);
  CHECK(support::thrown_by<diffattn::ShapeError>([&] { of_layer.step(without, with_bias); }) ==
        "AdamW: it was made for a model without the gradient's q_proj.bias");

  const auto message = [&](const AdamWConfig& config) {
    return support::thrown_by<std::invalid_argument>([&] { AdamW<double>(model, config); });
  };
  CHECK(message({.beta1 = 1}) == "AdamW: beta1 and beta2 must be in [0, 1)");
  CHECK(message({.eps = -1}) == "AdamW: learning_rate, eps and weight_decay must not be negative");
  CHECK(message({.weight_decay = std::nan("")}) == "AdamW: learning_rate, eps and weight_decay must not be negative");
}
