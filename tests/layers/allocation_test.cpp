// No heap after a warm-up: malloc, which operator new, Eigen and OpenMP call in the end, is counted on every thread
// while layers and their kernels run again.

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/layers/kv_cache.hpp"
#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/multihead_diff_attention_v2.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/random.hpp"
#ifdef _OPENMP
#include "diffattn/core/parallel_openmp.hpp"
#endif

namespace {

using namespace diffattn;

/// Heap allocations of all threads during f; 0 where they are not counted.
template <typename F>
std::size_t allocations_of(const F& f) {
  const std::size_t before = support::allocations();
  f();
  return support::allocations() - before;
}

template <typename Layer>
void check_layer(const Layer& layer, support::AnyExecutor executor) {
  support::Rng rng = support::make_rng();
  for (const Index n : {1, 3, 70}) {
    INFO("tokens " << n);
    const Matrix<float> x = support::random_matrix<float>(n, layer.config().embed_dim, rng);
    Matrix<float> y(x.rows(), x.cols());
    Workspace workspace;
    const auto forward = [&] { layer.forward_into(y, x, CausalMask{}, workspace, executor); };
    for (int warm_up = 0; warm_up < 2; ++warm_up) forward();
    const Matrix<float> first = y;
    const std::size_t capacity = workspace.capacity();
    CHECK(allocations_of(forward) == 0);
    CHECK(workspace.capacity() == capacity);
    CHECK(y == first);
  }

  // Decoding: within the reserve of a cache, and sliding along a window, which hands its pages on.
  const Matrix<float> token = support::random_matrix<float>(1, layer.config().embed_dim, rng);
  Matrix<float> next(1, token.cols());
  for (const std::optional<Index> window : {std::optional<Index>(), std::optional<Index>(40)}) {
    INFO("window " << window.value_or(0));
    Workspace workspace;
    KvCache<float> cache(KvCacheOptions{.reserve = window ? 0 : 900, .window = window});
    const auto decode = [&] {
      for (Index i = 0; i < 300; ++i) layer.forward_into(next, token, cache, workspace, executor);
    };
    for (int warm_up = 0; warm_up < 3; ++warm_up) decode();
    if (!window) cache.truncate(500);
    CHECK(allocations_of(decode) == 0);
  }
}

/// Attention to a memory: at once, with a tape and back, and by a cache that has been emptied and filled again.
template <typename Layer>
void check_cross_attention(const Layer& layer, support::AnyExecutor executor) {
  support::Rng rng = support::make_rng();
  const Index width = layer.config().embed_dim;
  const Matrix<float> memory = support::random_matrix<float>(110, width, rng);
  for (const Index n : {1, 3, 70}) {
    INFO("queries " << n);
    const Matrix<float> x = support::random_matrix<float>(n, width, rng);
    Matrix<float> y(n, width), dx(n, width), dmemory(110, width);
    Layer grad = zeros_like(layer);
    typename Layer::Tape tape;
    KvCache<float> cache;
    Workspace workspace;
    const auto all = [&] {
      layer.forward_cross_into(y, x, memory, PaddingMask{90}, workspace, executor);
      layer.forward_cross_into(y, x, memory, PaddingMask{90}, tape, workspace, executor);
      layer.backward_cross_into(dx, dmemory, x, tape, grad, workspace, executor);
      cache.clear();
      layer.write_memory(memory, cache, workspace, executor);
      layer.forward_cross_into(y, x, cache, PaddingMask{90}, workspace, executor);
    };
    for (int warm_up = 0; warm_up < 3; ++warm_up) all();
    CHECK(allocations_of(all) == 0);
  }
}

template <typename Layer>
void check_both(const Layer& layer, support::AnyExecutor executor) {
  check_layer(layer, executor);
  check_cross_attention(layer, executor);
}

void check_layers(support::AnyExecutor executor) {
  const RotaryConfig rotary;
  check_both(MultiheadDiffAttention<float>({.embed_dim = 48, .num_heads = 3, .num_kv_heads = 1, .rotary = rotary}),
             executor);
  check_both(MultiheadDiffAttentionV2<float>({.embed_dim = 48, .num_heads = 2, .num_kv_heads = 1, .rotary = rotary}),
             executor);
  check_both(MultiheadAttention<float>({.embed_dim = 48, .num_heads = 4, .num_kv_heads = 2, .rotary = rotary}),
             executor);
}

}  // namespace

TEST_CASE("the counter sees every way to the heap, from every thread", "[layers]") {
  if (!support::counts_allocations()) return;
  const auto allocate = [] { ::operator delete(::operator new(4)); };
  CHECK(allocations_of(allocate) == 1);
  CHECK(allocations_of([] { Matrix<float>(30, 30).setZero(); }) == 1);
  ThreadPool pool(3);
  CHECK(allocations_of([&] { pool.run(6, [&](Index, Index) { allocate(); }); }) == 6);
}

TEST_CASE("a layer on one thread leaves the heap alone", "[layers]") {
  Serial serial;
  check_layers(support::AnyExecutor(serial));
}

TEST_CASE("a layer on a pool of threads leaves the heap alone", "[layers]") {
  ThreadPool pool(3);
  check_layers(support::AnyExecutor(pool));
}

// LLVM's runtime, which clang links, takes memory of its own for every loop with a dynamic schedule; GCC's does not.
#if defined(_OPENMP) && !defined(__clang__)
TEST_CASE("a layer on OpenMP leaves the heap alone", "[layers]") {
  OpenMP openmp{3};
  check_layers(support::AnyExecutor(openmp));
}
#endif
