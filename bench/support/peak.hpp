#pragma once

// The two ceilings that every figure is held against, measured in the same run: multiply-adds per second of one core,
// and bytes per second that one core reads from memory.

#include <benchmark/benchmark.h>

#include "diffattn/core/simd.hpp"

namespace bench {

using diffattn::Index;

/// 12 independent chains of fused multiply-adds, more than latency times throughput of any core this runs on.
template <typename Scalar>
void fma_peak(benchmark::State& state) {
  constexpr int kChains = 12, kSteps = 1000;
  diffattn::simd::Packet<Scalar> sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = diffattn::simd::broadcast(Scalar(i));
  const auto a = diffattn::simd::broadcast(Scalar(0.999)), b = diffattn::simd::broadcast(Scalar(0.001));
  for (auto _ : state) {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) sums[i] = diffattn::simd::fma(sums[i], a, b);
        // Keeps the compiler from doing two steps' worth in one.
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) asm volatile("" : : "x"(sums[i]));
    }
  }
  for (int i = 0; i < kChains; ++i) benchmark::DoNotOptimize(diffattn::simd::first(sums[i]));
  state.counters["FLOP/s"] = benchmark::Counter(2.0 * kChains * kSteps * diffattn::simd::kLanes<Scalar>,
                                                benchmark::Counter::kIsIterationInvariantRate);
}

}  // namespace bench
