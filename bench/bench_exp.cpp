// The exponential alone, in cache: ours (the one the kernels use) against Eigen's exp.

#include <benchmark/benchmark.h>

#include <numbers>
#include <string>

#include "diffattn/kernels/detail/exp2.hpp"

namespace {

using namespace diffattn;

constexpr Index kValues = 1024;  // in the nearest cache

template <typename Scalar>
void ours(benchmark::State& state) {
  const Vector<Scalar> x = Vector<Scalar>::Random(kValues).array() * Scalar(20) - Scalar(20);
  Vector<Scalar> y(kValues);
  const detail::ScaledExp2<Scalar> exp(std::numbers::log2e_v<Scalar>);
  for (auto _ : state) {
    for (Index i = 0; i < kValues; i += simd::kLanes<Scalar>) {
      simd::storeu(y.data() + i, exp(simd::loadu(x.data() + i)));
    }
    benchmark::DoNotOptimize(y.data());
    benchmark::ClobberMemory();
  }
  state.counters["values/s"] =
      benchmark::Counter(static_cast<double>(kValues), benchmark::Counter::kIsIterationInvariantRate);
}

template <typename Scalar>
void eigen(benchmark::State& state) {
  const Vector<Scalar> x = Vector<Scalar>::Random(kValues).array() * Scalar(20) - Scalar(20);
  Vector<Scalar> y(kValues);
  for (auto _ : state) {
    y = x.array().exp();
    benchmark::DoNotOptimize(y.data());
    benchmark::ClobberMemory();
  }
  state.counters["values/s"] =
      benchmark::Counter(static_cast<double>(kValues), benchmark::Counter::kIsIterationInvariantRate);
}

const bool registered = [] {
  benchmark::RegisterBenchmark("exp/ours/float", ours<float>);
  benchmark::RegisterBenchmark("exp/eigen/float", eigen<float>);
  benchmark::RegisterBenchmark("exp/ours/double", ours<double>);
  benchmark::RegisterBenchmark("exp/eigen/double", eigen<double>);
  return true;
}();

}  // namespace
