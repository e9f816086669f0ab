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

/// How many values are read at a time by what measures the read bandwidth.
inline constexpr Index kReadPiece = 65536;

/// The sum of kReadPiece values, from four places side by side: one stream does not use all that a core can have.
inline float sum_of_piece(const float* values) {
  constexpr Index kLanes = diffattn::simd::kLanes<float>, kStreams = 4, kLength = kReadPiece / kStreams;
  diffattn::simd::Packet<float> sums[kStreams][2];
  for (auto& stream : sums) stream[0] = stream[1] = diffattn::simd::broadcast(0.0f);
  for (Index i = 0; i < kLength; i += 2 * kLanes) {
#pragma GCC unroll 4
    for (Index s = 0; s < kStreams; ++s) {
      const float* const from = values + s * kLength + i;
      sums[s][0] = diffattn::simd::add(sums[s][0], diffattn::simd::loadu(from));
      sums[s][1] = diffattn::simd::add(sums[s][1], diffattn::simd::loadu(from + kLanes));
    }
  }
  float total = 0;
  for (auto& stream : sums) total += diffattn::simd::reduce_add(diffattn::simd::add(stream[0], stream[1]));
  return total;
}

}  // namespace bench
