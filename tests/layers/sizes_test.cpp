// Configurations whose sizes multiply to more than there is: an error that names them, from every layer.

#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <limits>

#include "layers/layer_checks.hpp"

namespace {

using namespace diffattn;

constexpr Index kMax = std::numeric_limits<Index>::max();

template <typename Layer>
std::string refusal(const typename Layer::Config& config) {
  return thrown_by<std::invalid_argument>([&] { Layer layer(config); });
}

template <typename Layer>
void check_with_head_dim() {
  for (const Index heads : {Index{1} << 32, Index{1} << 61, Index{1} << 62, kMax}) {
    for (const Index d : {Index{1} << 31, Index{1} << 62, kMax}) {
      CHECK(refusal<Layer>({.embed_dim = 4, .num_heads = heads, .num_kv_heads = 1, .head_dim = d}).find("num_heads") !=
            std::string::npos);
    }
    CHECK(refusal<Layer>({.embed_dim = heads, .num_heads = heads}).find("num_heads") != std::string::npos);
  }
  CHECK(refusal<Layer>({.embed_dim = 4, .num_heads = 1, .head_dim = -2}).find("head_dim must be at least 1, got -2") !=
        std::string::npos);
}

template <typename Layer>
void check_sizes() {
  for (const Index size : {Index{1} << 40, Index{1} << 62, kMax}) {
    CHECK_FALSE(refusal<Layer>({.embed_dim = size, .num_heads = 1}).empty());
    CHECK_FALSE(refusal<Layer>({.embed_dim = size, .num_heads = size}).empty());
    CHECK_FALSE(refusal<Layer>({.embed_dim = 8, .num_heads = size}).empty());
    CHECK_FALSE(refusal<Layer>({.embed_dim = 8, .num_heads = 2, .num_kv_heads = size}).empty());
    CHECK_FALSE(refusal<Layer>({.embed_dim = -size, .num_heads = 2}).empty());
    CHECK_FALSE(refusal<Layer>({.embed_dim = 8, .num_heads = -size}).empty());
    CHECK_FALSE(refusal<Layer>({.embed_dim = 8, .num_heads = 2, .num_kv_heads = -size}).empty());
  }
}

}  // namespace

TEST_CASE("A layer of sizes that overflow is refused", "[layers]") {
  check_sizes<MultiheadAttention<float>>();
  check_sizes<MultiheadDiffAttention<float>>();
  check_sizes<MultiheadDiffAttentionV2<float>>();
  check_with_head_dim<MultiheadAttention<double>>();
  check_with_head_dim<MultiheadDiffAttention<double>>();
  check_with_head_dim<MultiheadDiffAttentionV2<double>>();
}

TEST_CASE("Parts of layers refuse sizes that are negative or that no memory holds", "[layers]") {
  for (const Index size : {Index{-1}, Index{1} << 47, kMax}) {
    CHECK_THROWS_AS(Linear<float>(size, 2), std::invalid_argument);
    CHECK_THROWS_AS(Linear<float>(2, size, true), std::invalid_argument);
    CHECK_THROWS_AS((Linear<float, FrozenMatrix>(size, 2)), std::invalid_argument);
    CHECK_THROWS_AS(RmsNorm<float>(size), std::invalid_argument);
    CHECK_THROWS_AS(RmsNorm<float>(size, 1e-5, false), std::invalid_argument);
    CHECK_THROWS_AS(DiffLambda<float>(size, 0.8), std::invalid_argument);
    CHECK_THROWS_AS(FrozenMatrix(size, 2), std::invalid_argument);
    CHECK_THROWS_AS(FrozenMatrix(std::shared_ptr<const float>(), 2, size), std::invalid_argument);
  }
  CHECK_THROWS_AS(FrozenMatrix(Index{1} << 32, Index{1} << 32), std::invalid_argument);
}

TEST_CASE("Lengths of sequences do not wrap around to the rows of x", "[layers]") {
  const MultiheadAttention<float> layer({.embed_dim = 4, .num_heads = 1});
  const Matrix<float> x = Matrix<float>::Ones(3, 4);
  const std::vector<Index> lengths = {kMax, kMax, 5};  // adds up to 3 modulo 2^64
  CHECK(thrown_by<ShapeError>([&] {
          layer.forward(x, CausalMask{}, lengths);
        }).find("must add up to the 3 rows of x, got 9223372036854775807") != std::string::npos);
}

TEST_CASE("A cache of any window works, and one of more tokens than there is memory for does not",
          "[layers][kv_cache]") {
  auto rng = make_rng();
  MultiheadDiffAttention<float> layer({.embed_dim = 16, .num_heads = 1, .rotary = RotaryConfig{}});
  layer_checks::randomize(layer, rng);
  const Matrix<float> x = random_matrix<float>(5, 16, rng), expected = layer.forward(x);
  for (const Index window : {Index{5}, Index{1} << 62, kMax - 1, kMax}) {
    KvCache<float> cache(KvCacheOptions{.max_tokens = kMax, .window = window});
    CHECK(layer.forward(Matrix<float>(x.topRows(3)), cache).isApprox(expected.topRows(3), 1e-5f));
    CHECK(layer.forward(Matrix<float>(x.bottomRows(2)), cache).isApprox(expected.bottomRows(2), 1e-5f));
    CHECK(cache.size() == 5);
  }
  for (const Index reserve : {Index{1} << 40, Index{1} << 62, kMax}) {
    KvCache<float> cache(KvCacheOptions{.reserve = reserve});
    CHECK(thrown_by<std::invalid_argument>([&] { layer.forward(x, cache); }) ==
          "MultiheadDiffAttention: a cache for " + std::to_string(reserve) +
              " tokens would take more than 1099511627776 bytes");
    CHECK(cache.empty());
  }
}
