// Prefill on one thread and on two, by wall clock: four differential heads (64, V 128), 1,920 tokens.

#include <benchmark/benchmark.h>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/kernels/diff_attention.hpp"

namespace {

using namespace diffattn;

template <typename Mask>
void prefill(benchmark::State& state) {
  constexpr Index kTokens = 1920, kHeads = 4, kHeadDim = 64;
  std::srand(1);
  const Matrix<float> q = Matrix<float>::Random(kTokens, 2 * kHeads * kHeadDim) * 3.0f;
  const Matrix<float> k = Matrix<float>::Random(kTokens, 2 * kHeads * kHeadDim) * 3.0f;
  const Matrix<float> v = Matrix<float>::Random(kTokens, 2 * kHeads * kHeadDim);
  Matrix<float> out(kTokens, 2 * kHeads * kHeadDim);
  ThreadPool pool(state.range(0));
  Workspace workspace;
  for (auto _ : state) {
    multihead_diff_attention_into(out, q, k, v, 0.7f, Heads{kHeads}, Mask{}, {}, workspace, pool);
  }
}

const bool registered = [] {
  for (const int threads : {1, 2}) {
    benchmark::RegisterBenchmark("threads/full", prefill<FullMask>)
        ->ArgName("threads")
        ->Arg(threads)
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
    benchmark::RegisterBenchmark("threads/causal", prefill<CausalMask>)
        ->ArgName("threads")
        ->Arg(threads)
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
  return true;
}();

}  // namespace
