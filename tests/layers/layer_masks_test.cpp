// Masks and biases through the attention layers: without a cache against with one, whole, in chunks and token by token.

#include <diffattn/kernels/bias.hpp>
#include <diffattn/kernels/mask.hpp>
#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>

#include "layers/layer_checks.hpp"

namespace {

using diffattn::AlibiBias;
using diffattn::CausalMask;
using diffattn::Index;
using diffattn::KvCache;
using diffattn::Matrix;
using diffattn::PaddingMask;
using diffattn::PrefixMask;
using diffattn::SlidingWindowMask;

constexpr Index kMaskedTokens = 600;  // three pages

/// Of the position of a query, its head and the key; every seventh key is hidden from every second head.
struct PositionBias {
  double operator()(Index head, Index query, Index key, Index n_q, Index n_k) const {
    const Index position = query + n_k - n_q;
    if (head % 2 == 1 && key % 7 == 3) return -std::numeric_limits<double>::infinity();
    return 0.1 * static_cast<double>((3 * head + position + 2 * key) % 5) - 0.2;
  }
};

template <typename Layer>
Layer random_layer() {
  auto rng = make_rng();
  Layer layer({.embed_dim = 24, .num_heads = 4, .num_kv_heads = 2, .head_dim = 6, .rotary = diffattn::RotaryConfig{}});
  layer_checks::randomize(layer, rng);
  return layer;
}

/// Fed to a cache in chunks of these sizes, over and over.
template <typename Layer, typename Mask>
Matrix<double> through_cache(const Layer& layer, const Matrix<double>& x, const Mask& mask, KvCache<double>& cache,
                             const std::vector<Index>& chunks) {
  Matrix<double> y(x.rows(), x.cols());
  for (Index row = 0, i = 0; row < x.rows(); ++i) {
    const Index count = std::min(chunks[static_cast<std::size_t>(i) % chunks.size()], x.rows() - row);
    y.middleRows(row, count) = layer.forward(x.middleRows(row, count), cache, mask);
    row += count;
  }
  return y;
}

/// `windowed` is what `mask` and a cache's window of 40 let a query see.
template <typename Layer, typename Mask, typename Windowed>
void check_mask_through_cache(const Layer& layer, const Matrix<double>& x, const Mask& mask, const Windowed& windowed) {
  const Matrix<double> all = layer.forward(x, mask), last = layer.forward(x, windowed);
  CHECK_FALSE(all.isApprox(layer.forward(x), 1e-6));
  CHECK_FALSE(all.isApprox(last, 1e-6));
  for (const auto& chunks : std::vector<std::vector<Index>>{{kMaskedTokens}, {1}, {3, 300, 1}}) {
    INFO("chunks of " << chunks[0]);
    KvCache<double> cache, window({.window = 40});
    CHECK(through_cache(layer, x, mask, cache, chunks).isApprox(all, 1e-12));
    CHECK(through_cache(layer, x, mask, window, chunks).isApprox(last, 1e-12));
    CHECK(window.memory_bytes() < 2 * cache.memory_bytes());
  }
}

}  // namespace

TEMPLATE_TEST_CASE("Every mask and bias gives the same from a cache, windows that drop included",
                   "[layers][kv_cache][mask]", diffattn::MultiheadAttention<double>,
                   diffattn::MultiheadDiffAttention<double>, diffattn::MultiheadDiffAttentionV2<double>) {
  const auto layer = random_layer<TestType>();
  auto rng = make_rng(3);
  const Matrix<double> x = random_matrix<double>(kMaskedTokens, 24, rng);
  const AlibiBias slopes(diffattn::alibi_slopes(4));
  const SlidingWindowMask window{40};
  SECTION("a slope for every head") {
    check_mask_through_cache(layer, x, with_bias(CausalMask{}, slopes), with_bias(window, slopes));
  }
  SECTION("a bias of position and head that hides keys") {
    check_mask_through_cache(layer, x, with_bias(CausalMask{}, PositionBias{}), with_bias(window, PositionBias{}));
  }
  SECTION("two masks and a bias") {
    const auto padded = both(CausalMask{}, PaddingMask{580});
    check_mask_through_cache(layer, x, with_bias(padded, slopes), with_bias(both(padded, window), slopes));
  }
  SECTION("a narrower window than the cache's") {
    const SlidingWindowMask narrow{7};
    KvCache<double> cache({.window = 40});
    CHECK(through_cache(layer, x, narrow, cache, {1}).isApprox(layer.forward(x, narrow), 1e-12));
  }
}

TEMPLATE_TEST_CASE("A prefix is read both ways when it comes in one piece", "[layers][kv_cache][mask]",
                   diffattn::MultiheadAttention<double>, diffattn::MultiheadDiffAttention<double>,
                   diffattn::MultiheadDiffAttentionV2<double>) {
  const auto layer = random_layer<TestType>();
  auto rng = make_rng(4);
  const Matrix<double> x = random_matrix<double>(50, 24, rng), expected = layer.forward(x, PrefixMask{30});
  CHECK_FALSE(expected.topRows(29).isApprox(layer.forward(x).topRows(29), 1e-6));
  KvCache<double> cache;
  CHECK(through_cache(layer, x, PrefixMask{30}, cache, {30, 1, 1, 5}).isApprox(expected, 1e-12));
  KvCache<double> full;
  CHECK(through_cache(layer, x, diffattn::FullMask{}, full, {50})
            .isApprox(layer.forward(x, diffattn::FullMask{}), 1e-12));
}

TEMPLATE_TEST_CASE("Every head has its own part of a bias matrix, in every sequence", "[layers][mask]",
                   diffattn::MultiheadAttention<double>, diffattn::MultiheadDiffAttention<double>,
                   diffattn::MultiheadDiffAttentionV2<double>) {
  const auto layer = random_layer<TestType>();
  auto rng = make_rng(5);
  const Matrix<double> x = random_matrix<double>(18, 24, rng);
  Matrix<double> matrix(4 * 9, 9);
  for (Index head = 0; head < 4; ++head) {
    for (Index i = 0; i < 9; ++i) {
      for (Index j = 0; j < 9; ++j) matrix(head * 9 + i, j) = PositionBias{}(head, i, j, 9, 9);
    }
  }
  const auto by_matrix = with_bias(CausalMask{}, diffattn::MatrixBias(matrix));
  const auto by_position = with_bias(CausalMask{}, PositionBias{});
  CHECK(identical(layer.forward(x, by_matrix, {9, 9}), layer.forward(x, by_position, {9, 9})));

  typename TestType::Tape tape, other;
  layer.forward(x, by_matrix, {9, 9}, tape);
  layer.forward(x, by_position, {9, 9}, other);
  TestType grad = zeros_like(layer), other_grad = zeros_like(layer);
  CHECK(identical(layer.backward(x, tape, grad), layer.backward(x, other, other_grad)));
  CHECK(layer_checks::same_parameters(grad, other_grad));
}

TEMPLATE_TEST_CASE("A mask that does not fit is refused before any work", "[layers][kv_cache][mask]",
                   diffattn::MultiheadAttention<double>, diffattn::MultiheadDiffAttention<double>,
                   diffattn::MultiheadDiffAttentionV2<double>) {
  const auto layer = random_layer<TestType>();
  auto rng = make_rng(6);
  const Matrix<double> x = random_matrix<double>(9, 24, rng), more = random_matrix<double>(2, 24, rng);
  const auto five = with_bias(CausalMask{}, AlibiBias(diffattn::alibi_slopes(5)));
  const std::string slopes = ": the slopes of AlibiBias must be 4, one for every head, got 5";
  const auto refused = [](const auto& f) { return thrown_by<diffattn::ShapeError>(f); };
  // The layer says so at its door, not a kernel behind it.
  const auto layer_says = [](const std::string& said, const std::string& what) {
    return said.find("Multihead") == 0 && said.find(what) != std::string::npos;
  };
  CHECK(layer_says(refused([&] { layer.forward(x, five); }), slopes));
  KvCache<double> cache;
  layer.forward(x, cache);
  CHECK(layer_says(refused([&] { layer.forward(more, cache, five); }), slopes));
  const Matrix<double> narrow = Matrix<double>::Zero(2, 2), fits = Matrix<double>::Zero(2, 11);
  CHECK(layer_says(refused([&] { layer.forward(more, cache, with_bias(CausalMask{}, diffattn::MatrixBias(narrow))); }),
                   "the bias matrix must be 2 x 11 for all heads, or 8 x 11"));
  CHECK(cache.position() == 9);
  CHECK_NOTHROW(layer.forward(more, cache, with_bias(CausalMask{}, diffattn::MatrixBias(fits))));
  // Only the second sequence does not fit.
  const Matrix<double> square = Matrix<double>::Zero(4, 4);
  CHECK(layer_says(refused([&] {
                     layer.forward(x, with_bias(CausalMask{}, diffattn::MatrixBias(square)), {4, 5});
                   }),
                   "the bias matrix must be 5 x 5 for all heads, or 20 x 5"));
}
