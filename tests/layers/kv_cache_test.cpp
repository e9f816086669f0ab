#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <limits>
#include <utility>
#include <vector>

#include "layers/layer_checks.hpp"

namespace {

using diffattn::CausalMask;
using diffattn::Index;
using diffattn::KvCache;
using diffattn::KvCacheOptions;
using diffattn::Matrix;
using diffattn::MultiheadAttention;
using diffattn::MultiheadDiffAttention;
using diffattn::MultiheadDiffAttentionV2;
using diffattn::RotaryConfig;
using diffattn::RotaryPairing;
using diffattn::SlidingWindowMask;
using diffattn::Workspace;

/// Feeds the rows of x in chunks whose lengths repeat, and returns what comes out.
template <typename Layer, typename Cache, typename S>
Matrix<S> fed(const Layer& layer, Cache& cache, const Matrix<S>& x, const std::vector<Index>& chunks) {
  Matrix<S> y(x.rows(), x.cols());
  const Index start = cache.position();
  for (Index row = 0, i = 0; row < x.rows(); ++i) {
    const Index count = std::min(chunks[static_cast<std::size_t>(i) % chunks.size()], x.rows() - row);
    y.middleRows(row, count) = layer.forward(Matrix<S>(x.middleRows(row, count)), cache);
    row += count;
    REQUIRE(cache.position() == start + row);
  }
  return y;
}

/// 700 tokens, several pages, fed in every kind of chunk.
template <typename S, typename Layer>
void same_as_uncached(const Layer& layer, std::mt19937_64& rng) {
  const Index n = 700;
  const Matrix<S> x = random_matrix<S>(n, layer.config().embed_dim, rng);
  for (const Index window : {0, 1, 40, 300}) {
    const Matrix<S> expected = window == 0 ? layer.forward(x) : layer.forward(x, SlidingWindowMask{window});
    for (const auto& chunks : std::vector<std::vector<Index>>{{n}, {1}, {300}, {5, 1, 2, 257}, {3, 64}}) {
      INFO("window " << window << ", chunks of " << chunks[0]);
      KvCache<S> cache(KvCacheOptions{.window = window == 0 ? std::nullopt : std::optional(window)});
      const Matrix<S> y = fed(layer, cache, x, chunks);
      CHECK(y.isApprox(expected, 100 * std::numeric_limits<S>::epsilon()));
      // A call of more than a few tokens does the same arithmetic as without a cache.
      if (chunks[0] == n || chunks[0] == 300) CHECK(identical(y.topRows(chunks[0]), expected.topRows(chunks[0])));
    }
  }
}

template <template <typename...> class Layer, typename Config>
void same_as_uncached(const Config& config, bool in_double = false) {
  INFO("embed_dim " << config.embed_dim << ", heads " << config.num_heads << "/" << config.num_kv_heads);
  auto rng = make_rng();
  Layer<float> layer(config);
  layer_checks::randomize(layer, rng);
  same_as_uncached<float>(layer, rng);
  if (in_double) {
    Layer<double> other(config);
    layer_checks::randomize(other, rng);
    same_as_uncached<double>(other, rng);
  }
}

using DiffConfig = MultiheadDiffAttention<float>::Config;
using V2Config = MultiheadDiffAttentionV2<float>::Config;
using StandardConfig = MultiheadAttention<float>::Config;

/// The recorded sequences of the official implementation, each fed to a cache of its own.
template <typename Layer, typename Config>
void golden_from_cache(const Config& config, const diffattn::Safetensors& file, const std::vector<Index>& chunks) {
  const Index tokens = std::stol(file.metadata().at("tokens"));
  const Matrix<double> x = file.matrix<double>("x"), expected = file.matrix<double>("y");
  Layer layer(config);
  load_parameters(layer, file, "weight.");
  for (Index first = 0; first < x.rows(); first += tokens) {
    KvCache<double> cache;
    const Matrix<double> y = fed(layer, cache, Matrix<double>(x.middleRows(first, tokens)), chunks);
    CHECK((y - expected.middleRows(first, tokens)).cwiseAbs().maxCoeff() <= 1e-12 * expected.cwiseAbs().maxCoeff());
  }
}

}  // namespace

TEST_CASE("The results of the official implementation come from a cache, too", "[layers][kv_cache][golden]") {
  const auto chunks = GENERATE(std::vector<Index>{1}, std::vector<Index>{6, 1, 3});
  const std::string folder = DIFFATTN_TEST_DATA "/golden/";
  const diffattn::Safetensors v1(folder + "layer_v1_1.safetensors"), v2(folder + "layer_v2_1.safetensors");
  const auto number = [](const diffattn::Safetensors& file, const char* key) {
    return std::stol(file.metadata().at(key));
  };
  golden_from_cache<MultiheadDiffAttention<double>>(
      DiffConfig{.embed_dim = number(v1, "embed_dim"),
                 .num_heads = number(v1, "num_heads"),
                 .num_kv_heads = number(v1, "num_kv_heads"),
                 .depth = number(v1, "depth"),
                 .rotary = RotaryConfig{.base = std::stod(v1.metadata().at("rope_base"))}},
      v1, chunks);
  golden_from_cache<MultiheadDiffAttentionV2<double>>(
      V2Config{.embed_dim = number(v2, "d_model"),
               .num_heads = number(v2, "num_heads"),
               .num_kv_heads = number(v2, "num_kv_heads"),
               .head_dim = number(v2, "head_dim"),
               .rotary = RotaryConfig{.base = std::stod(v2.metadata().at("rope_base"))}},
      v2, chunks);
}

TEST_CASE("MultiheadDiffAttention gives the same whole, in chunks and token by token", "[layers][kv_cache]") {
  same_as_uncached<MultiheadDiffAttention>(
      DiffConfig{.embed_dim = 48, .num_heads = 4, .num_kv_heads = 2, .rotary = RotaryConfig{}}, true);
  same_as_uncached<MultiheadDiffAttention>(DiffConfig{
      .embed_dim = 40, .num_heads = 2, .rotary = RotaryConfig{.pairing = RotaryPairing::half}, .bias = true});
}

TEST_CASE("MultiheadDiffAttentionV2 gives the same whole, in chunks and token by token", "[layers][kv_cache]") {
  same_as_uncached<MultiheadDiffAttentionV2>(
      V2Config{.embed_dim = 30, .num_heads = 6, .num_kv_heads = 2, .head_dim = 10, .rotary = RotaryConfig{}}, true);
  same_as_uncached<MultiheadDiffAttentionV2>(
      V2Config{.embed_dim = 16, .num_heads = 7, .num_kv_heads = 1, .head_dim = 3, .bias = true});
}

TEST_CASE("MultiheadAttention gives the same whole, in chunks and token by token", "[layers][kv_cache]") {
  same_as_uncached<MultiheadAttention>(
      StandardConfig{.embed_dim = 48, .num_heads = 6, .num_kv_heads = 3, .rotary = RotaryConfig{}}, true);
  same_as_uncached<MultiheadAttention>(StandardConfig{.embed_dim = 35, .num_heads = 5, .num_kv_heads = 1});
}

TEST_CASE("A cache continues from a prefix, and from a fork", "[layers][kv_cache]") {
  auto rng = make_rng();
  MultiheadDiffAttention<float> layer({.embed_dim = 32, .num_heads = 2, .rotary = RotaryConfig{}});
  layer_checks::randomize(layer, rng);
  const Matrix<float> x = random_matrix<float>(600, 32, rng), other = random_matrix<float>(600, 32, rng);
  const Index kept = GENERATE(9, 255, 256, 300, 512, 600);
  INFO("prefix of " << kept);
  // What the prefix and then `tail` must give.
  const auto expected = [&](const Matrix<float>& tail) {
    KvCache<float> fresh;
    layer.forward(Matrix<float>(x.topRows(kept)), fresh);
    return layer.forward(tail, fresh);
  };

  KvCache<float> cache;
  layer.forward(x, cache);
  KvCache<float> fork = cache.fork();
  cache.truncate(kept);
  CHECK(cache.position() == kept);
  CHECK(cache.size() == kept);
  CHECK(identical(layer.forward(other, cache), expected(other)));

  // The fork knows nothing of it, and can be cut back as well.
  CHECK(fork.position() == 600);
  KvCache<float> second = fork.fork();
  fork.truncate(kept);
  CHECK(identical(layer.forward(Matrix<float>(x.topRows(40)), fork), expected(x.topRows(40))));
  second.truncate(kept);
  CHECK(identical(layer.forward(Matrix<float>(x.topRows(70)), second), expected(x.topRows(70))));
  fork.truncate(kept);
  CHECK(identical(layer.forward(other, fork), expected(other)));

  cache.clear();
  CHECK(cache.empty());
  CHECK(identical(layer.forward(x, cache), layer.forward(x)));
}

TEST_CASE("A window gives back what no later query sees", "[layers][kv_cache]") {
  auto rng = make_rng();
  MultiheadAttention<float> layer({.embed_dim = 16, .num_heads = 2});
  layer_checks::randomize(layer, rng);
  KvCache<float> cache(KvCacheOptions{.window = 100}), all;
  const Matrix<float> x = random_matrix<float>(3000, 16, rng);
  layer.forward(x, cache);
  layer.forward(x, all);
  CHECK(cache.position() == 3000);
  CHECK(cache.size() == 100);
  CHECK(KvCache<float>().memory_bytes() == 0);
  CHECK(cache.memory_bytes() * 4 <= all.memory_bytes());
  const std::size_t held = cache.memory_bytes();
  for (Index i = 0; i < 600; ++i) layer.forward(Matrix<float>(x.row(i)), cache);
  CHECK(cache.memory_bytes() == held);
  CHECK(cache.position() == 3600);

  // As far back as the window has kept everything, and not further.
  cache.truncate(3599);
  CHECK(thrown_by<std::invalid_argument>([&] { cache.truncate(150); })
            .find("KvCache: cannot truncate to 150 tokens, "
                  "the window of 100 has dropped") == 0);
  CHECK(cache.position() == 3599);
  cache.truncate(0);
  CHECK(identical(layer.forward(x, cache), layer.forward(x, SlidingWindowMask{100})));
}

TEST_CASE("A cache with 16-bit storage errs by the rounding of its keys and values", "[layers][kv_cache]") {
  auto rng = make_rng();
  MultiheadDiffAttention<float> layer({.embed_dim = 64, .num_heads = 2, .rotary = RotaryConfig{}});
  layer_checks::randomize(layer, rng, 0.15);
  const Matrix<float> x = random_matrix<float>(400, 64, rng), expected = layer.forward(x);
  const auto error = [&](auto cache, const std::vector<Index>& chunks) {
    return (fed(layer, cache, x, chunks) - expected).norm() / expected.norm();
  };
  for (const auto& chunks : std::vector<std::vector<Index>>{{400}, {1}, {30, 3}}) {
    INFO("chunks of " << chunks[0]);
    // Half an ulp of a value is 2^-9 and 2^-12 of it; scores magnify that of keys, the subtraction that of the output.
    CHECK(error(KvCache<Eigen::bfloat16>(), chunks) < 4 * 0x1p-9f);
    CHECK(error(KvCache<Eigen::half>(), chunks) < 4 * 0x1p-12f);
    CHECK(error(KvCache<Eigen::bfloat16>(), chunks) > 0x1p-12f);
  }
}

TEST_CASE("A layer in double may keep its cache in float", "[layers][kv_cache]") {
  auto rng = make_rng();
  MultiheadAttention<double> layer({.embed_dim = 24, .num_heads = 3, .rotary = RotaryConfig{}});
  layer_checks::randomize(layer, rng);
  const Matrix<double> x = random_matrix<double>(60, 24, rng), expected = layer.forward(x);
  KvCache cache;
  const double error = (fed(layer, cache, x, {30, 1, 2}) - expected).norm() / expected.norm();
  CHECK(error < 1e-6);
  CHECK(error > 1e-12);
}

TEST_CASE("A call on a cache that cannot be is refused by name, and the cache stays as it was", "[layers][kv_cache]") {
  auto rng = make_rng();
  const MultiheadDiffAttention<float> layer({.embed_dim = 32, .num_heads = 2, .rotary = RotaryConfig{}});
  const MultiheadDiffAttention<float> grouped({.embed_dim = 32, .num_heads = 2, .num_kv_heads = 1});
  const Matrix<float> x = random_matrix<float>(10, 32, rng), more = random_matrix<float>(3, 32, rng);
  KvCache<float> cache(KvCacheOptions{.max_tokens = 13});
  layer.forward(x, cache);
  const auto expected = [&] {
    KvCache<float> copy = cache;
    return layer.forward(more, copy);
  }();
  const auto unchanged = [&] {
    KvCache<float> copy = cache;
    return cache.position() == 10 && identical(layer.forward(more, copy), expected);
  };

  CHECK(thrown_by<std::invalid_argument>([&] { layer.forward(Matrix<float>(x.topRows(4)), cache); }) ==
        "MultiheadDiffAttention: the cache holds at most 13 tokens and has 10, cannot append 4");
  CHECK(unchanged());
  CHECK(thrown_by<diffattn::ShapeError>([&] { layer.forward(Matrix<float>::Ones(2, 31), cache); }) ==
        "MultiheadDiffAttention: x must be 2 x 32, got 2 x 31");
  CHECK(unchanged());
  Matrix<float> y(2, 32);
  Workspace workspace;
  CHECK_THROWS_AS(layer.forward_into(y, more, cache, workspace), diffattn::ShapeError);
  CHECK(unchanged());
  CHECK(thrown_by<diffattn::ShapeError>([&] {
          grouped.forward(more, cache);
        }).find("MultiheadDiffAttention: the cache must hold 1 heads of 2 x 8 key and 16 value columns") == 0);
  CHECK(unchanged());
  CHECK_THROWS_AS(cache.truncate(11), std::invalid_argument);
  CHECK_THROWS_AS(cache.truncate(-1), std::invalid_argument);
  CHECK(unchanged());
  CHECK(layer.forward(Matrix<float>(0, 32), cache).rows() == 0);
  CHECK(unchanged());
  CHECK_NOTHROW(layer.forward(more, cache));
  CHECK_THROWS_AS(layer.forward(Matrix<float>(more.topRows(1)), cache), std::invalid_argument);

  // Empty again, it takes another layer.
  cache.clear();
  CHECK_NOTHROW(grouped.forward(more, cache));
  for (const Index window : {0, -1}) {
    CHECK(thrown_by<std::invalid_argument>([&] { KvCache<float> bad(KvCacheOptions{.window = window}); }) ==
          "KvCache: window must be at least 1, got " + std::to_string(window));
  }
}

TEST_CASE("Decoding gives the same bits from any number of threads", "[layers][kv_cache]") {
  auto rng = make_rng();
  MultiheadDiffAttention<float> layer({.embed_dim = 48, .num_heads = 3, .num_kv_heads = 1, .rotary = RotaryConfig{}});
  layer_checks::randomize(layer, rng);
  const Matrix<float> x = random_matrix<float>(1200, 48, rng);
  const auto decode = [&](Index threads) {
    diffattn::ThreadPool pool(threads);
    Workspace workspace;
    KvCache<float> cache;
    Matrix<float> y(1200, 48);
    const std::vector<Index> chunks = {700, 1, 4, 1, 493, 1};
    for (Index row = 0, i = 0; row < 1200; ++i) {
      const Index count = chunks[static_cast<std::size_t>(i)];
      layer.forward_into(y.middleRows(row, count), x.middleRows(row, count), cache, workspace, pool);
      row += count;
    }
    return y;
  };
  const Matrix<float> expected = decode(1);
  CHECK(identical(decode(2), expected));
  CHECK(identical(decode(3), expected));
}

TEST_CASE("NaN and infinity in a later token of a chunk do not reach an earlier one", "[layers][kv_cache]") {
  auto rng = make_rng();
  MultiheadAttention<float> layer({.embed_dim = 16, .num_heads = 2});
  layer_checks::randomize(layer, rng);
  const Index chunk = GENERATE(3, 40);
  Matrix<float> x = random_matrix<float>(30 + chunk, 16, rng);
  const Matrix<float> clean = layer.forward(x);
  x.bottomRows(1).setConstant(std::numeric_limits<float>::quiet_NaN());
  KvCache<float> cache;
  layer.forward(Matrix<float>(x.topRows(30)), cache);
  const Matrix<float> y = layer.forward(Matrix<float>(x.bottomRows(chunk)), cache);
  CHECK(y.topRows(chunk - 1).isApprox(clean.middleRows(30, chunk - 1), 1e-5f));
  CHECK(y.bottomRows(1).array().isNaN().all());

  // Cut back before it, the cache is as good as new.
  cache.truncate(30 + chunk - 1);
  x.bottomRows(1) = random_matrix<float>(1, 16, rng);
  CHECK(layer.forward(Matrix<float>(x.bottomRows(1)), cache).isApprox(layer.forward(x).bottomRows(1), 1e-5f));
}
