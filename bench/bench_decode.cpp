// Decoding: one query against a long cache, 16 differential heads (64, 128) or 32 standard heads (64, 64): the same
// bytes. What bounds it is reading them, so the ceiling is a plain sum over as many.

#include <benchmark/benchmark.h>

#include <string>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/core/simd.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/diff_attention.hpp"

namespace {

using namespace diffattn;

constexpr Index kHeads = 16, kWidth = 2 * 64;  // K1|K2, or V, of one differential head

struct Cache {
  explicit Cache(Index n) {
    std::srand(1);
    q = Matrix<float>::Random(1, kHeads * kWidth);
    k = Matrix<float>::Random(n, kHeads * kWidth);
    v = Matrix<float>::Random(n, kHeads * kWidth);
    out.resize(1, kHeads * kWidth);
  }
  Matrix<float> q, k, v, out;
};

void count(benchmark::State& state, Index n) {
  const double bytes = 2.0 * static_cast<double>(n * kHeads * kWidth) * sizeof(float);
  state.counters["bytes/s"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate);
}

void read_bandwidth(benchmark::State& state) {
  const Index n = state.range(0);
  const Cache cache(n);
  for (auto _ : state) {
    constexpr Index kLanes = simd::kLanes<float>, kChains = 8;
    simd::Packet<float> sums[kChains];
    for (auto& sum : sums) sum = simd::broadcast(0.0f);
    for (const Matrix<float>* m : {&cache.k, &cache.v}) {
      for (Index i = 0; i + kChains * kLanes <= m->size(); i += kChains * kLanes) {
#pragma GCC unroll 8
        for (Index c = 0; c < kChains; ++c) sums[c] = simd::add(sums[c], simd::loadu(m->data() + i + c * kLanes));
      }
    }
    for (auto& sum : sums) benchmark::DoNotOptimize(simd::reduce_add(sum));
  }
  count(state, n);
}

void differential(benchmark::State& state) {
  const Index n = state.range(0);
  Cache cache(n);
  Workspace workspace;
  ThreadPool pool(state.range(1));
  for (auto _ : state) {
    multihead_diff_attention_into(cache.out, cache.q, cache.k, cache.v, 0.7f, Heads{kHeads, kHeads}, FullMask{}, {},
                                  workspace, pool);
  }
  count(state, n);
}

void standard(benchmark::State& state) {
  const Index n = state.range(0);
  Cache cache(n);
  Workspace workspace;
  ThreadPool pool(state.range(1));
  for (auto _ : state) {
    multihead_attention_into(cache.out, cache.q, cache.k, cache.v, Heads{2 * kHeads, 2 * kHeads}, FullMask{}, {},
                             workspace, pool);
  }
  count(state, n);
}

const bool registered = [] {
  for (const Index n : {8192, 32768}) {
    const auto add = [&](const char* name, void (*run)(benchmark::State&), Index threads) {
      benchmark::RegisterBenchmark(name, run)
          ->ArgNames({"n", "threads"})
          ->Args({n, threads})
          ->UseRealTime()
          ->Unit(benchmark::kMillisecond);
    };
    add("peak/read", read_bandwidth, 1);
    for (const Index threads : {1, 2}) {
      add("decode/differential", differential, threads);
      add("decode/standard", standard, threads);
    }
  }
  return true;
}();

}  // namespace
