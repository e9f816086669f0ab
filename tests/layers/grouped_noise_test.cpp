// MultiheadDiffAttention with num_noise_heads: against recorded values, differences, the same layer with repeated
// noise queries, and itself by way of a cache.

#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>

#include "layers/layer_checks.hpp"
#include "support/numerical_gradient.hpp"

namespace {

using diffattn::AlibiBias;
using diffattn::CausalMask;
using diffattn::FullMask;
using diffattn::Index;
using diffattn::KvCache;
using diffattn::Matrix;
using diffattn::RotaryConfig;
using diffattn::SlidingWindowMask;
using diffattn::with_bias;
using GroupedLayer = diffattn::MultiheadDiffAttention<double>;
using GroupedConfig = GroupedLayer::Config;

diffattn::Safetensors grouped_file(const std::string& name) {
  return diffattn::Safetensors(std::string(DIFFATTN_TEST_DATA "/golden/") + name + ".safetensors");
}

GroupedConfig grouped_config(const diffattn::Safetensors& file) {
  const auto number = [&](const char* key) { return std::stol(file.metadata().at(key)); };
  GroupedConfig config{.embed_dim = number("embed_dim"),
                       .num_heads = number("num_heads"),
                       .num_kv_heads = number("num_kv_heads"),
                       .head_dim = number("head_dim"),
                       .num_noise_heads = number("num_noise_heads"),
                       .depth = number("depth")};
  if (number("rotary") != 0) config.rotary = RotaryConfig{};
  return config;
}

double grouped_error(const Matrix<double>& got, const Matrix<double>& expected) {
  REQUIRE(got.rows() == expected.rows());
  REQUIRE(got.cols() == expected.cols());
  return (got - expected).cwiseAbs().maxCoeff() / expected.cwiseAbs().maxCoeff();
}

/// The same layer with a noise head for every signal head: its queries are repeated.
GroupedLayer with_repeated_noise(const GroupedLayer& layer) {
  GroupedConfig config = layer.config();
  const Index r = config.num_heads / config.num_noise_heads, d = config.head_dim;
  config.num_noise_heads = config.num_heads;
  GroupedLayer pairs(config);
  pairs.k_proj = layer.k_proj;
  pairs.v_proj = layer.v_proj;
  pairs.out_proj = layer.out_proj;
  pairs.lambda = layer.lambda;
  pairs.subln = layer.subln;
  for (Index h = 0; h < config.num_heads; ++h) {
    const Index first = h / r * (r + 1);
    const auto copy = [&](Index to, Index from) {
      pairs.q_proj.weight.middleRows(to * d, d) = layer.q_proj.weight.middleRows(from * d, d);
      if (config.bias) pairs.q_proj.bias.segment(to * d, d) = layer.q_proj.bias.segment(from * d, d);
    };
    copy(2 * h, first + h % r);
    copy(2 * h + 1, first + r);
  }
  return pairs;
}

/// Different for every head.
struct BiasOfHead {
  double operator()(Index head, Index query, Index key, Index n_q, Index n_k) const {
    return 0.1 * static_cast<double>((3 * head + query + n_k - n_q + 2 * key) % 5);
  }
};

/// Calls f(mask) with masks that let heads share their noise and one that does not.
template <typename F>
void for_masks_of_layer(const F& f) {
  f(CausalMask{});
  f(SlidingWindowMask{40});
  f(with_bias(CausalMask{}, AlibiBias{0.25}));
  f(with_bias(CausalMask{}, BiasOfHead{}));
}

/// dx and every parameter's gradient by differences.
template <typename Mask>
void check_grouped_differences(const GroupedConfig& config, const Mask& mask) {
  auto rng = make_rng();
  GroupedLayer layer(config), grad = zeros_like(layer);
  layer_checks::randomize(layer, rng);
  const std::vector<Index> lengths = {5, 1, 3};
  Matrix<double> x = random_matrix<double>(9, config.embed_dim, rng);
  const Matrix<double> dy = random_matrix<double>(9, config.embed_dim, rng);
  const auto loss = [&] { return layer.forward(x, mask, lengths).cwiseProduct(dy).sum(); };
  GroupedLayer::Tape tape;
  layer.forward(x, mask, lengths, tape);
  CHECK(support::excess(layer.backward(dy, tape, grad), support::numerical_gradient(x, loss)) <= 0);
  std::vector<Matrix<double>> numeric;
  visit_parameters(layer, [&](std::string_view, auto& parameter) {
    numeric.push_back(support::numerical_gradient(parameter, loss));
  });
  std::size_t i = 0;
  visit_parameters(grad, [&](std::string_view name, const auto& parameter) {
    INFO(name);
    CHECK(support::excess(parameter, numeric[i++]) <= 0);
  });
}

}  // namespace

TEST_CASE("Grouped noise heads give what was recorded, forward, cached and backward", "[layers][grouped][golden]") {
  const std::string name = GENERATE("wide_grouped_0", "wide_grouped_1");
  INFO(name);
  const diffattn::Safetensors file = grouped_file(name);
  GroupedLayer layer(grouped_config(file));
  load_parameters(layer, file, "weight.");
  CHECK(std::abs(layer.lambda_value() - std::stod(file.metadata().at("lambda_value"))) <= 1e-12);
  const Matrix<double> x = file.matrix<double>("x"), y = file.matrix<double>("y");
  GroupedLayer::Tape tape;
  CHECK(grouped_error(layer.forward(x), y) <= 1e-12);
  CHECK(grouped_error(layer.forward(x, CausalMask{}, tape), y) <= 1e-12);
  for (const Index chunk : {Index{1}, Index{7}, x.rows()}) {
    KvCache<double> cache;
    Matrix<double> cached(x.rows(), x.cols());
    for (Index row = 0; row < x.rows(); row += chunk) {
      const Index count = std::min(chunk, x.rows() - row);
      cached.middleRows(row, count) = layer.forward(x.middleRows(row, count), cache);
    }
    CHECK(grouped_error(cached, y) <= 1e-12);
  }

  GroupedLayer grad = zeros_like(layer), expected = zeros_like(layer);
  CHECK(grouped_error(layer.backward(file.matrix<double>("dy"), tape, grad), file.matrix<double>("dx")) <= 1e-9);
  load_parameters(expected, file, "grad.");
  std::vector<Matrix<double>> recorded;
  visit_parameters(expected, [&](std::string_view, const auto& parameter) { recorded.push_back(parameter); });
  std::size_t i = 0;
  visit_parameters(grad, [&](std::string_view parameter_name, const auto& parameter) {
    INFO(parameter_name);
    CHECK(grouped_error(parameter, recorded[i++]) <= 1e-9);
  });

  diffattn::MultiheadDiffAttention<float> in_float(grouped_config(file));
  load_parameters(in_float, file, "weight.");
  CHECK(grouped_error(in_float.forward(x.cast<float>()).cast<double>(), y) <= 1e-5);
}

TEST_CASE("Grouped noise heads: gradients are what differences say", "[layers][grouped][gradients]") {
  const GroupedConfig config{
      .embed_dim = 8, .num_heads = 4, .num_kv_heads = 1, .head_dim = 2, .num_noise_heads = 2, .rotary = RotaryConfig{}};
  check_grouped_differences(config, CausalMask{});
  check_grouped_differences(config, with_bias(FullMask{}, AlibiBias{0.5}));
  check_grouped_differences(config, with_bias(CausalMask{}, BiasOfHead{}));
  check_grouped_differences(
      {.embed_dim = 6, .num_heads = 3, .num_kv_heads = 1, .head_dim = 4, .num_noise_heads = 1, .bias = true},
      SlidingWindowMask{2});
}

TEST_CASE("Grouped noise heads are the layer whose noise queries are repeated", "[layers][grouped]") {
  auto rng = make_rng();
  const GroupedConfig config = GENERATE(
      GroupedConfig{.embed_dim = 32, .num_heads = 8, .num_kv_heads = 1, .num_noise_heads = 2, .rotary = RotaryConfig{}},
      GroupedConfig{
          .embed_dim = 10, .num_heads = 6, .num_kv_heads = 2, .head_dim = 4, .num_noise_heads = 2, .bias = true});
  GroupedLayer layer(config);
  layer_checks::randomize(layer, rng);
  const GroupedLayer pairs = with_repeated_noise(layer);
  CHECK(layer.q_proj.weight.rows() == (config.num_heads + config.num_noise_heads) * layer.config().head_dim);
  const Matrix<double> x = random_matrix<double>(600, config.embed_dim, rng);
  const std::vector<Index> lengths = {300, 0, 7, 1, 292};
  for_masks_of_layer([&](const auto& mask) {
    CHECK(layer.forward(x, mask, lengths).isApprox(pairs.forward(x, mask, lengths), 1e-12));
    for (const std::vector<Index>& chunks : {std::vector<Index>{600}, std::vector<Index>{1, 30, 3}}) {
      KvCache<double> cache, windowed({.window = 100});
      Matrix<double> y(600, config.embed_dim), y_windowed = y;
      for (Index row = 0, i = 0; row < 600; ++i) {
        const Index count = std::min(chunks[static_cast<std::size_t>(i) % chunks.size()], 600 - row);
        y.middleRows(row, count) = layer.forward(x.middleRows(row, count), cache, mask);
        y_windowed.middleRows(row, count) = layer.forward(x.middleRows(row, count), windowed, mask);
        row += count;
      }
      CHECK(y.isApprox(pairs.forward(x, mask), 1e-12));
      CHECK(y_windowed.isApprox(pairs.forward(x, both(mask, SlidingWindowMask{100})), 1e-12));
    }
  });
}

TEST_CASE("Grouped noise heads: as many as heads are the paper's layer, bit for bit", "[layers][grouped]") {
  auto rng = make_rng();
  const GroupedConfig config{.embed_dim = 32, .num_heads = 4, .num_kv_heads = 2, .rotary = RotaryConfig{}, .seed = 3};
  GroupedConfig same = config;
  same.num_noise_heads = 4;
  const GroupedLayer layer(config), all(same);
  CHECK(layer.config().num_noise_heads == 4);
  const Matrix<double> x = random_matrix<double>(70, 32, rng);
  CHECK(identical(layer.forward(x), all.forward(x)));
  CHECK(layer.query_head(3, 0) == 6);
  CHECK(layer.query_head(3, 1) == 7);
  GroupedConfig halves = config;
  halves.num_noise_heads = 2;
  const GroupedLayer grouped(halves);
  CHECK(grouped.query_head(3, 0) == 4);
  CHECK(grouped.query_head(2, 1) == 5);
  CHECK(grouped.heads().num_noise_heads == 2);
  CHECK(diffattn::MultiheadAttention<double>({.embed_dim = 24, .num_heads = 4}).query_head(3, 0) == 3);
}

TEST_CASE("Grouped noise heads: sequences, prefixes, threads, strides, refusals", "[layers][grouped]") {
  layer_checks::laws<diffattn::MultiheadDiffAttention>(
      diffattn::MultiheadDiffAttentionConfig{
          .embed_dim = 30, .num_heads = 6, .num_kv_heads = 1, .head_dim = 5, .num_noise_heads = 2},
      "MultiheadDiffAttention");
}

TEST_CASE("Grouped noise heads that cannot be are refused by name", "[layers][grouped]") {
  using layer_checks::config_error;
  const std::string rule =
      "MultiheadDiffAttention: num_noise_heads must divide num_heads and be a multiple of num_kv_heads, got ";
  CHECK(config_error<diffattn::MultiheadDiffAttention>(
            {.embed_dim = 24, .num_heads = 6, .num_kv_heads = 1, .num_noise_heads = 4}) ==
        rule + "4 for num_heads = 6 and num_kv_heads = 1; num_noise_heads = 1, 2, 3, 6 would fit");
  CHECK(config_error<diffattn::MultiheadDiffAttention>(
            {.embed_dim = 24, .num_heads = 6, .num_kv_heads = 6, .num_noise_heads = 2}) ==
        rule +
            "2 for num_heads = 6 and num_kv_heads = 6; num_noise_heads = 6 would fit; num_kv_heads = 1, 2 would fit");

  // A tape and a gradient of other groups.
  GroupedLayer layer({.embed_dim = 16, .num_heads = 4, .num_kv_heads = 1, .num_noise_heads = 2});
  GroupedLayer other({.embed_dim = 16, .num_heads = 4, .num_kv_heads = 1, .num_noise_heads = 1});
  GroupedLayer::Tape tape;
  const Matrix<double> x = Matrix<double>::Ones(3, 16);
  layer.forward(x, CausalMask{}, tape);
  GroupedLayer grad = zeros_like(layer), other_grad = zeros_like(other);
  CHECK_THROWS_AS(layer.backward(x, tape, other_grad), std::invalid_argument);
  CHECK_THROWS_AS(other.backward(x, tape, other_grad), std::invalid_argument);
}
