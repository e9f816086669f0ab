// Forks that both go on, what they share of a token that is not finite, and where a window ends.

#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <limits>
#include <vector>

#include "layers/layer_checks.hpp"

namespace {

using diffattn::Index;
using diffattn::KvCache;
using diffattn::KvCacheOptions;
using diffattn::Matrix;
using diffattn::MultiheadAttention;
using diffattn::MultiheadDiffAttention;
using diffattn::RotaryConfig;
using diffattn::SlidingWindowMask;

constexpr Index kPage = diffattn::detail::kPageKeys;

/// One query after a few tokens with a NaN among them, from a fork, for as long as the window shows it and afterwards.
template <typename Storage>
void check_not_finite(Index tokens_before, float tolerance) {
  const Index window = 20, bad = tokens_before + 30, shared = bad + 10, n = shared + 40;
  auto rng = make_rng();
  MultiheadAttention<float> layer({.embed_dim = 16, .num_heads = 2});
  layer_checks::randomize(layer, rng);
  Matrix<float> x = random_matrix<float>(n, 16, rng);
  const Matrix<float> clean = layer.forward(x, SlidingWindowMask{window});
  x.row(bad).setConstant(std::numeric_limits<float>::quiet_NaN());

  KvCache<Storage> cache(KvCacheOptions{.window = window});
  layer.forward(Matrix<float>(x.topRows(shared)), cache);
  // A few at a time, and all of them at once: two paths through the kernels.
  for (const Index chunk : {4, 40}) {
    for (KvCache<Storage> other : {cache.fork(), cache.fork()}) {
      INFO("after " << tokens_before << " tokens, chunks of " << chunk);
      for (Index row = shared; row < n; row += chunk) {
        const Matrix<float> y = layer.forward(Matrix<float>(x.middleRows(row, chunk)), other);
        for (Index i = 0; i < chunk; ++i) {
          if (row + i < bad + window) {
            CHECK(y.row(i).array().isNaN().all());
          } else {
            CHECK(y.row(i).isApprox(clean.row(row + i), tolerance));
          }
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("A cache and its forks all go on, and none sees what another adds", "[layers][kv_cache]") {
  auto rng = make_rng();
  MultiheadDiffAttention<float> layer({.embed_dim = 32, .num_heads = 2, .rotary = RotaryConfig{}});
  layer_checks::randomize(layer, rng);
  const Index shared = GENERATE(1, 100, 255, 256, 300);
  INFO(shared << " tokens shared");
  const Matrix<float> prompt = random_matrix<float>(shared, 32, rng);
  std::vector<KvCache<float>> forks(1), alone(3);
  layer.forward(prompt, forks[0]);
  forks.push_back(forks[0].fork());
  forks.push_back(forks[1].fork());
  for (KvCache<float>& cache : alone) layer.forward(prompt, cache);
  // In turns, so that each adds to what it shares before and after the others do.
  for (const Index count : {3, 1, 20, 1}) {
    for (std::size_t i = 0; i < forks.size(); ++i) {
      INFO("fork " << i << ", " << count << " tokens");
      const Matrix<float> next = random_matrix<float>(count, 32, rng);
      CHECK(identical(layer.forward(next, forks[i]), layer.forward(next, alone[i])));
    }
  }
}

TEST_CASE("A fork knows that what it shares is not finite", "[layers][kv_cache]") {
  // NaN in a page that is copied with its fork, and in one that follows it.
  for (const Index before : {Index{0}, kPage}) {
    check_not_finite<float>(before, 1e-5f);
    check_not_finite<Eigen::bfloat16>(before, 0.05f);
  }
}

TEST_CASE("A window keeps all that the next query sees, and lets go of the page before", "[layers][kv_cache]") {
  auto rng = make_rng();
  MultiheadAttention<float> layer({.embed_dim = 16, .num_heads = 2});
  layer_checks::randomize(layer, rng);
  const Index window = GENERATE(1, 2, 100);
  INFO("window " << window);
  const Matrix<float> x = random_matrix<float>(kPage + 300, 16, rng);
  const Matrix<float> expected = layer.forward(x, SlidingWindowMask{window});
  // The query at this position is the first that sees nothing of the first page.
  const Index first_free = kPage + window - 1;
  KvCache<float> cache(KvCacheOptions{.window = window});
  layer.forward(Matrix<float>(x.topRows(first_free - 1)), cache);
  if (window > 1) CHECK_NOTHROW(cache.fork().truncate(first_free - 2));
  layer.forward(Matrix<float>(x.row(first_free - 1)), cache);
  CHECK_THROWS_AS(cache.truncate(first_free - 1), std::invalid_argument);

  // Back to where the first page is no longer seen, from far behind it.
  layer.forward(Matrix<float>(x.middleRows(first_free, 150)), cache);
  CHECK_THROWS_AS(cache.truncate(first_free - 1), std::invalid_argument);
  cache.truncate(first_free);
  const Matrix<float> y = layer.forward(Matrix<float>(x.middleRows(first_free, 40)), cache);
  CHECK(y.isApprox(expected.middleRows(first_free, 40), 1e-5f));
}
