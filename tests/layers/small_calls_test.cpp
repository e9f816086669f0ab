// Small calls of every layer: a few tokens, odd widths, caches of every storage, tapes. See
// kernels/small_calls_test.cpp.

#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>

#include "layers/layer_checks.hpp"
#include "support/scalars.hpp"

namespace {

using diffattn::CausalMask;
using diffattn::FullMask;
using diffattn::Index;
using diffattn::KvCache;
using diffattn::Matrix;
using diffattn::MultiheadAttention;
using diffattn::MultiheadDiffAttention;
using diffattn::MultiheadDiffAttentionV2;
using diffattn::SlidingWindowMask;

/// Token by token and in one call, from a cache of each storage, against no cache; and a tape's output and gradient
/// against the sum of two halves of them.
template <typename S, typename Layer>
void check_small(const Layer& layer, Index n, std::mt19937_64& rng) {
  INFO("embed_dim " << layer.config().embed_dim << ", n " << n);
  const Matrix<S> x = random_matrix<S>(n, layer.config().embed_dim, rng), y = layer.forward(x);
  const S size = y.norm() + std::numeric_limits<S>::min(), tolerance = 2000 * std::numeric_limits<S>::epsilon();
  const auto through_cache = [&](auto cache, Index step) {
    Matrix<S> out(n, y.cols());
    for (Index row = 0; row < n; row += step) {
      const Index count = std::min(step, n - row);
      out.middleRows(row, count) = layer.forward(Matrix<S>(x.middleRows(row, count)), cache);
    }
    return out;
  };
  for (const Index step : {Index{1}, Index{3}, n}) {
    CHECK((through_cache(KvCache<S>(), step) - y).norm() <= tolerance * size);
    CHECK((through_cache(KvCache<Eigen::bfloat16>(), step) - y).norm() <= S(0.2) * size);
    CHECK((through_cache(KvCache<Eigen::half>(), step) - y).norm() <= S(0.02) * size);
  }
  CHECK(layer.forward(x, FullMask{}).allFinite());
  CHECK(layer.forward(x, SlidingWindowMask{2}).allFinite());

  typename Layer::Tape tape;
  CHECK(identical(layer.forward(x, CausalMask{}, tape), y));
  const Matrix<S> dy = random_matrix<S>(n, y.cols(), rng);
  const auto gradient = [&](const Matrix<S>& of) {
    Layer grad = diffattn::zeros_like(layer);
    return Matrix<S>(layer.backward(of, tape, grad));
  };
  const Matrix<S> half = dy * S(0.5), dx = gradient(dy);
  CHECK(dx.allFinite());
  CHECK((gradient(half) * S(2) - dx).norm() <= tolerance * (dx.norm() + 1));
}

template <typename Layer, typename S, typename Config>
void check_layer(const Config& config) {
  auto rng = make_rng();
  Layer layer(config);
  layer_checks::randomize(layer, rng);
  for (const Index n : {1, 2, 5, 6, 9, 17, 31}) check_small<S>(layer, n, rng);
}

}  // namespace

TEMPLATE_TEST_CASE("Small calls of every layer", "[layers][small]", DIFFATTN_TEST_SCALARS) {
  for (const Index head_dim : {2, 6, 10, 18, 34}) {
    for (const Index num_kv_heads : {1, 3}) {
      check_layer<MultiheadAttention<TestType>, TestType>(typename MultiheadAttention<TestType>::Config{
          .embed_dim = 3 * head_dim, .num_heads = 3, .num_kv_heads = num_kv_heads});
      check_layer<MultiheadDiffAttention<TestType>, TestType>(typename MultiheadDiffAttention<TestType>::Config{
          .embed_dim = 6 * head_dim, .num_heads = 3, .num_kv_heads = num_kv_heads, .rotary = diffattn::RotaryConfig{}});
      check_layer<MultiheadDiffAttentionV2<TestType>, TestType>(typename MultiheadDiffAttentionV2<TestType>::Config{
          .embed_dim = 5, .num_heads = 3, .num_kv_heads = num_kv_heads, .head_dim = head_dim});
    }
  }
}
