// Memory that is short at any moment: a call throws std::bad_alloc, caches are as before it, and the same call again
// gives the same bits as if nothing had happened.

#include "support/failing_allocations.hpp"

#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>

#include "layers/layer_checks.hpp"
#include "support/parameters_of.hpp"

namespace {

using namespace diffattn;
using support::Failures;

template <typename Layer>
Layer small_layer() {
  auto rng = make_rng();
  Layer layer({.embed_dim = 24, .num_heads = 2, .num_kv_heads = 1, .rotary = RotaryConfig{.table_positions = 8}});
  layer_checks::randomize(layer, rng);
  return layer;
}

template <typename Layer>
void check_forward_and_backward(Failures failures) {
  const Layer layer = small_layer<Layer>();
  auto rng = make_rng(1);
  const Matrix<float> x = random_matrix<float>(70, 24, rng), dy = random_matrix<float>(70, 24, rng);
  const Matrix<float> bias = random_matrix<float>(70, 70, rng);
  const auto mask = with_bias(CausalMask{}, MatrixBias(bias));
  typename Layer::Tape tape;
  Layer grad = zeros_like(layer);
  const Matrix<float> y = layer.forward(x, mask), y_tape = layer.forward(x, mask, tape);
  const Matrix<float> dx = layer.backward(dy, tape, grad);

  Matrix<float> again;
  std::size_t failed = support::for_every_failing_allocation([&] { again = layer.forward(x, mask); },
                                                             [&](bool threw) { CHECK(threw); }, failures);
  CHECK(identical(again, y));
  CHECK((failed > 0) == support::fails_allocations());

  typename Layer::Tape other;
  failed =
      support::for_every_failing_allocation([&] { again = layer.forward(x, mask, other); },
                                            [&](bool threw) {
                                              CHECK(threw);
                                              // A tape that is not filled is refused, and no other.
                                              Layer unused = zeros_like(layer);
                                              CHECK_THROWS_AS(layer.backward(dy, other, unused), std::invalid_argument);
                                            },
                                            failures);
  CHECK(identical(again, y_tape));
  CHECK((failed > 0) == support::fails_allocations());

  failed = support::for_every_failing_allocation(
      [&] {
        Layer unused = zeros_like(layer);
        again = layer.backward(dy, other, unused);
      },
      [&](bool threw) { CHECK(threw); }, failures);
  CHECK(identical(again, dx));
  Layer grad_again = zeros_like(layer);
  layer.backward(dy, other, grad_again);
  CHECK(support::parameters_of(grad_again) == support::parameters_of(grad));
  CHECK((failed > 0) == support::fails_allocations());

  failed =
      support::for_every_failing_allocation([&] { small_layer<Layer>(); }, [&](bool threw) { CHECK(threw); }, failures);
  CHECK((failed > 0) == support::fails_allocations());
}

/// `before` tokens, then `tokens` at once while memory fails; with a fork that shares all pages, or without.
template <typename Layer, typename Storage>
void check_cache(const KvCacheOptions& options, Index before, Index tokens, bool forked, Failures failures) {
  INFO("window " << options.window.value_or(0) << ", " << before << " tokens and " << tokens
                 << (forked ? ", forked" : ""));
  const Layer layer = small_layer<Layer>();
  auto rng = make_rng(2);
  const Matrix<float> x = random_matrix<float>(before, 24, rng), next = random_matrix<float>(tokens, 24, rng);
  KvCache<Storage> cache(options), untouched(options);
  if (before != 0) {
    layer.forward(x, cache);
    layer.forward(x, untouched);
  }
  const KvCache<Storage> fork = forked ? cache.fork() : KvCache<Storage>();
  const Matrix<float> expected = layer.forward(next, untouched);
  Matrix<float> y;
  const std::size_t failed =
      support::for_every_failing_allocation([&] { y = layer.forward(next, cache); },
                                            [&](bool threw) {
                                              CHECK(threw);
                                              CHECK(cache.position() == before);
                                              KvCache<Storage> again = cache;
                                              CHECK(identical(layer.forward(next, again), expected));
                                            },
                                            failures);
  CHECK((failed > 0) == support::fails_allocations());
  if (failed == 0) y = layer.forward(next, cache);
  CHECK(identical(y, expected));
  CHECK(cache.position() == before + tokens);
  CHECK(identical(layer.forward(next, cache), layer.forward(next, untouched)));
  if (forked) {
    KvCache<Storage> from_fork = fork;
    CHECK(identical(layer.forward(next, from_fork), expected));
  }
}

template <typename Layer>
void check_caches(Failures failures) {
  for (const bool forked : {false, true}) {
    check_cache<Layer, float>({}, 300, 3, forked, failures);
    check_cache<Layer, float>({}, 250, 600, forked, failures);
    check_cache<Layer, float>({.window = 40}, 700, 300, forked, failures);  // drops pages
    check_cache<Layer, Eigen::bfloat16>({.window = 40}, 510, 5, forked, failures);
    check_cache<Layer, Eigen::half>({}, 300, 20, forked, failures);
  }
  check_cache<Layer, float>({.reserve = 40000}, 0, 9, false, failures);
}

/// A memory of 250 rows is kept, and 90 more come while memory fails.
template <typename Layer>
void check_kept_memory(Failures failures) {
  const Layer layer = small_layer<Layer>();
  auto rng = make_rng(3);
  const Matrix<float> memory = random_matrix<float>(340, 24, rng), x = random_matrix<float>(5, 24, rng);
  KvCache<float> cache, untouched;
  for (KvCache<float>* each : {&cache, &untouched}) layer.write_memory(memory.topRows(250), *each);
  const Matrix<float> before = layer.forward_cross(x, untouched);
  layer.write_memory(memory.bottomRows(90), untouched);
  const Matrix<float> expected = layer.forward_cross(x, untouched);
  const std::size_t failed =
      support::for_every_failing_allocation([&] { layer.write_memory(memory.bottomRows(90), cache); },
                                            [&](bool threw) {
                                              CHECK(threw);
                                              CHECK(identical(layer.forward_cross(x, cache), before));
                                            },
                                            failures);
  CHECK((failed > 0) == support::fails_allocations());
  if (failed == 0) layer.write_memory(memory.bottomRows(90), cache);
  CHECK(identical(layer.forward_cross(x, cache), expected));
}

}  // namespace

TEMPLATE_TEST_CASE("A layer's forward and backward pass without memory", "[layers]", MultiheadAttention<float>,
                   MultiheadDiffAttention<float>, MultiheadDiffAttentionV2<float>) {
  check_forward_and_backward<TestType>(Failures::one);
  check_forward_and_backward<TestType>(Failures::all_later);
}

TEMPLATE_TEST_CASE("A cache is as before when there is no memory", "[layers][kv_cache]", MultiheadAttention<float>,
                   MultiheadDiffAttention<float>, MultiheadDiffAttentionV2<float>) {
  check_caches<TestType>(Failures::one);
  check_caches<TestType>(Failures::all_later);
}

TEMPLATE_TEST_CASE("A memory that is kept is as before when there is no memory for more", "[layers][cross_attention]",
                   MultiheadAttention<float>, MultiheadDiffAttention<float>, MultiheadDiffAttentionV2<float>) {
  check_kept_memory<TestType>(Failures::one);
  check_kept_memory<TestType>(Failures::all_later);
}
