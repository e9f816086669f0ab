// No heap after a warm-up: malloc, which operator new, Eigen and OpenMP call in the end, is counted on every thread
// while layers and their kernels run again.

#include <atomic>
#include <cstdlib>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/multihead_diff_attention_v2.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/random.hpp"
#ifdef _OPENMP
#include "diffattn/core/parallel_openmp.hpp"
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SUPPORT_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SUPPORT_SANITIZED
#endif
#endif

namespace {
std::atomic<bool> counting{false};
std::atomic<int> allocations{0};
}  // namespace

// A sanitizer has a malloc of its own, and only glibc keeps its own reachable under another name.
#if defined(__GLIBC__) && !defined(SUPPORT_SANITIZED)
#define SUPPORT_COUNTS_MALLOC

namespace {
void* counted(void* memory) {
  if (counting.load(std::memory_order_relaxed)) ++allocations;
  return memory;
}
}  // namespace

// A definition in the executable wins over the C library's.
extern "C" {
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* memory, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);

void* malloc(std::size_t size) { return counted(__libc_malloc(size)); }
void* calloc(std::size_t count, std::size_t size) { return counted(__libc_calloc(count, size)); }
void* realloc(void* memory, std::size_t size) { return counted(__libc_realloc(memory, size)); }
void* memalign(std::size_t alignment, std::size_t size) { return counted(__libc_memalign(alignment, size)); }
void* aligned_alloc(std::size_t alignment, std::size_t size) { return counted(__libc_memalign(alignment, size)); }
int posix_memalign(void** memory, std::size_t alignment, std::size_t size) {
  *memory = counted(__libc_memalign(alignment, size));
  return *memory == nullptr ? 12 : 0;  // ENOMEM
}
}

#endif

namespace {

using namespace diffattn;

/// Heap allocations of all threads during f; 0 where they are not counted.
template <typename F>
int allocations_of(const F& f) {
  allocations = 0;
  counting = true;
  f();
  counting = false;
  return allocations;
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
}

void check_layers(support::AnyExecutor executor) {
  const RotaryConfig rotary;
  check_layer(MultiheadDiffAttention<float>({.embed_dim = 48, .num_heads = 3, .num_kv_heads = 1, .rotary = rotary}),
              executor);
  check_layer(MultiheadDiffAttentionV2<float>({.embed_dim = 48, .num_heads = 2, .num_kv_heads = 1, .rotary = rotary}),
              executor);
  check_layer(MultiheadAttention<float>({.embed_dim = 48, .num_heads = 4, .num_kv_heads = 2, .rotary = rotary}),
              executor);
}

}  // namespace

#ifdef SUPPORT_COUNTS_MALLOC
TEST_CASE("the counter sees every way to the heap, from every thread", "[layers]") {
  const auto allocate = [] { ::operator delete(::operator new(4)); };
  CHECK(allocations_of(allocate) == 1);
  CHECK(allocations_of([] { Matrix<float>(30, 30).setZero(); }) == 1);
  ThreadPool pool(3);
  CHECK(allocations_of([&] { pool.run(6, [&](Index, Index) { allocate(); }); }) == 6);
}
#endif

TEST_CASE("a layer on one thread leaves the heap alone", "[layers]") {
  Serial serial;
  check_layers(support::AnyExecutor(serial));
}

TEST_CASE("a layer on a pool of threads leaves the heap alone", "[layers]") {
  ThreadPool pool(3);
  check_layers(support::AnyExecutor(pool));
}

#ifdef _OPENMP
TEST_CASE("a layer on OpenMP leaves the heap alone", "[layers]") {
  OpenMP openmp{3};
  check_layers(support::AnyExecutor(openmp));
}
#endif
