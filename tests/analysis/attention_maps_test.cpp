// Maps of layers, against plain loops and against what the layers attend to.

#include <cmath>
#include <cstddef>
#include <diffattn/analysis/attention_maps.hpp>
#include <diffattn/kernels/bias.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>

#include "layers/layer_oracle.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

using namespace diffattn;

/// The maps of all heads from q_proj and k_proj in plain loops; `keys_shared`: both maps of a head have the same keys.
template <typename Layer, typename Mask>
void check_maps(const Layer& layer, const Matrix<double>& x, const Mask& mask, Index query_maps, bool keys_shared) {
  const auto weights = oracle::weights_of<double>(layer);
  const auto& config = layer.config();
  const Index d = config.head_dim, n = x.rows(), key_maps = keys_shared ? 1 : query_maps;
  Matrix<double> q = oracle::linear(weights, "q_proj", x), k = oracle::linear(weights, "k_proj", x);
  const Matrix<double> v = oracle::linear(weights, "v_proj", x);
  if (config.rotary) {
    oracle::rotate(q, d, *config.rotary);
    oracle::rotate(k, d, *config.rotary);
  }
  typename Layer::Tape tape;
  layer.forward(x, mask, tape);
  const auto maps = attention_maps(layer, x, mask);
  REQUIRE(maps.size() == static_cast<std::size_t>(config.num_heads));
  for (Index h = 0; h < config.num_heads; ++h) {
    INFO("head " << h);
    const auto& [p1, p2, combined, lambda] = maps[static_cast<std::size_t>(h)];
    const Index g = h / (config.num_heads / config.num_kv_heads), dv = tape.attended.cols() / config.num_heads;
    const auto expected = [&](Index s) -> Matrix<double> {
      Matrix<double> p = Matrix<double>::Zero(n, n);
      for (Index i = 0; i < n; ++i) {
        const auto [begin, end] = mask.visible_keys(i, n, n);
        for (Index j = begin; j < end; ++j) {
          const double score = q.row(i)
                                   .segment((h * query_maps + s) * d, d)
                                   .dot(k.row(j).segment((g * key_maps + (keys_shared ? 0 : s)) * d, d));
          double bias = 0;
          if constexpr (requires { mask.bias(h, i, j, n, n); }) bias = static_cast<double>(mask.bias(h, i, j, n, n));
          p(i, j) = std::exp(score / std::sqrt(static_cast<double>(d)) + bias);
        }
        if (end > begin) p.row(i) /= p.row(i).sum();
      }
      return p;
    };
    CHECK((p1 - expected(0)).cwiseAbs().maxCoeff() <= 1e-13);
    if (query_maps == 2) {
      CHECK((p2 - expected(1)).cwiseAbs().maxCoeff() <= 1e-13);
      REQUIRE(lambda.size() == n);
      CHECK((combined - (p1 - lambda.asDiagonal() * p2)).cwiseAbs().maxCoeff() <= 1e-15);
    } else {
      CHECK(p2.size() == 0);
      CHECK(lambda.size() == 0);
      CHECK(support::identical(combined, p1));
    }
    // And it is what the head attends with.
    CHECK((combined * v.middleCols(g * dv, dv) - tape.attended.middleCols(h * dv, dv)).cwiseAbs().maxCoeff() <= 1e-12);
  }
}

/// Under masks and biases that tell heads apart.
template <typename Layer>
void check_layer_maps(const Layer& layer, Index query_maps, bool keys_shared) {
  auto rng = support::make_rng();
  const Matrix<double> x = support::random_matrix<double>(13, layer.config().embed_dim, rng);
  check_maps(layer, x, CausalMask{}, query_maps, keys_shared);
  check_maps(layer, x, FullMask{}, query_maps, keys_shared);
  check_maps(layer, x, SlidingWindowMask{3}, query_maps, keys_shared);
  const AlibiBias alibi{alibi_slopes(layer.config().num_heads)};
  check_maps(layer, x, with_bias(CausalMask{}, alibi), query_maps, keys_shared);
  check_maps(layer, Matrix<double>(x.topRows(1)), CausalMask{}, query_maps, keys_shared);
}

}  // namespace

TEST_CASE("maps of a differential layer", "[analysis]") {
  MultiheadDiffAttention<double> layer({.embed_dim = 24, .num_heads = 4, .num_kv_heads = 2, .depth = 3, .seed = 5});
  check_layer_maps(layer, 2, false);
  auto rng = support::make_rng();
  for (const auto& head : attention_maps(layer, support::random_matrix<double>(6, 24, rng))) {
    CHECK((head.lambda.array() == layer.lambda_value()).all());
    CHECK((head.combined.rowwise().sum().array() - (1 - layer.lambda_value())).abs().maxCoeff() <= 1e-14);
  }
  const MultiheadDiffAttention<double> narrow({.embed_dim = 24,
                                               .num_heads = 2,
                                               .num_kv_heads = 1,
                                               .head_dim = 4,
                                               .rotary = RotaryConfig{},
                                               .bias = true,
                                               .seed = 6});
  check_layer_maps(narrow, 2, false);
}

TEST_CASE("maps of a DIFF V2 layer have a lambda for every query", "[analysis]") {
  MultiheadDiffAttentionV2<double> layer(
      {.embed_dim = 32, .num_heads = 4, .num_kv_heads = 2, .rotary = RotaryConfig{}, .seed = 7});
  check_layer_maps(layer, 2, true);
  auto rng = support::make_rng();
  const Matrix<double> x = support::random_matrix<double>(6, 32, rng);
  const auto maps = attention_maps(layer, x);
  const Matrix<double> logits = oracle::linear(oracle::weights_of<double>(layer), "lambda_proj", x);
  for (Index h = 0; h < 4; ++h) {
    const Vector<double> expected = (1 + (-logits.col(h).array()).exp()).inverse();
    CHECK((maps[static_cast<std::size_t>(h)].lambda - expected).cwiseAbs().maxCoeff() <= 1e-14);
  }
}

TEST_CASE("maps of a standard layer are single", "[analysis]") {
  check_layer_maps(MultiheadAttention<double>(
                       {.embed_dim = 24, .num_heads = 4, .num_kv_heads = 2, .rotary = RotaryConfig{}, .seed = 8}),
                   1, false);
}

TEST_CASE("maps of nothing, and of what does not fit", "[analysis]") {
  const MultiheadDiffAttention<float> layer({.embed_dim = 8, .num_heads = 2});
  const auto maps = attention_maps(layer, Matrix<float>(0, 8));
  REQUIRE(maps.size() == 2);
  CHECK(maps[1].p1.size() == 0);
  CHECK(support::thrown_by<ShapeError>([&] { (void)attention_maps(layer, Matrix<float>(3, 7)); }) ==
        "MultiheadDiffAttention: x must be 3 x 8, got 3 x 7");
  const Matrix<float> bias = Matrix<float>::Zero(3, 2);
  CHECK_THROWS_AS(
      attention_maps(layer, Matrix<float>(Matrix<float>::Zero(3, 8)), with_bias(CausalMask{}, MatrixBias(bias))),
      ShapeError);
}
