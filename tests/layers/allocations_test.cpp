// After a warm-up, forward_into and decoding take nothing from the heap, whatever the thread.

#include <cstdlib>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <new>

#include "support/allocations.hpp"
#include "support/catch.hpp"

namespace {

using diffattn::CausalMask;
using diffattn::Index;
using diffattn::KvCache;
using diffattn::KvCacheOptions;
using diffattn::Matrix;
using diffattn::RotaryConfig;
using diffattn::Workspace;

template <typename F>
std::size_t allocated_by(F&& f) {
  const std::size_t before = support::allocations();
  f();
  return support::allocations() - before;
}

template <typename Layer, typename E>
void check(const Layer& layer, E& executor) {
  const Index width = layer.config().embed_dim;
  const Matrix<float> x = Matrix<float>::Random(100, width), token = x.topRows(1);
  Matrix<float> y(100, width), next(1, width);
  Workspace workspace;
  const auto forward = [&] { layer.forward_into(y, x, CausalMask{}, workspace, executor); };
  forward();
  forward();
  CHECK(allocated_by(forward) == 0);

  // Within the reserve, and sliding along a window, which hands its pages on.
  for (const Index window : {0, 40}) {
    KvCache<float> cache(KvCacheOptions{.reserve = window == 0 ? 900 : 0, .window = window});
    const auto decode = [&] {
      for (Index i = 0; i < 300; ++i) layer.forward_into(next, token, cache, workspace, executor);
    };
    // A workspace has seen the longest call there will be, and a window has gone round once.
    const auto warm_up = [&] {
      for (Index i = 0; i < 3; ++i) decode();
    };
    warm_up();
    if (window == 0) cache.truncate(500);
    CHECK(allocated_by(decode) == 0);
  }
}

}  // namespace

TEST_CASE("The counter counts malloc, operator new and Eigen", "[layers][allocations]") {
  if (!support::counts_allocations()) return;
  // Through a volatile pointer, since a compiler may leave out an allocation that it sees the end of.
  static void* volatile kept = nullptr;
  CHECK(allocated_by([] { kept = ::operator new(1); }) >= 1);
  ::operator delete(kept);
  CHECK(allocated_by([] { kept = std::malloc(1); }) >= 1);
  std::free(kept);
  CHECK(allocated_by([] { Matrix<float>::Zero(30, 30).eval(); }) >= 1);
  CHECK(allocated_by([] { static_cast<void>(Workspace().take<float>(1000)); }) >= 1);
}

TEST_CASE("After a warm-up, neither forward_into nor decoding allocates", "[layers][allocations]") {
  if (!support::counts_allocations()) return;
  diffattn::Serial serial;
  diffattn::ThreadPool pool(2);
  const auto check_layer = [&](const auto& layer) {
    check(layer, serial);
    check(layer, pool);
  };
  check_layer(diffattn::MultiheadDiffAttention<float>(
      {.embed_dim = 32, .num_heads = 2, .num_kv_heads = 1, .rotary = RotaryConfig{}}));
  check_layer(diffattn::MultiheadDiffAttentionV2<float>({.embed_dim = 32, .num_heads = 2, .rotary = RotaryConfig{}}));
  check_layer(diffattn::MultiheadAttention<float>({.embed_dim = 32, .num_heads = 4, .rotary = RotaryConfig{}}));
}
