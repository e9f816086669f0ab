// A whole layer: MultiheadDiffAttention (8 heads) against MultiheadAttention (16 heads) of equal parameters, embed_dim
// 1,024. FLOP count the projections and the visible pairs.

#include <benchmark/benchmark.h>

#include <string>

#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"

namespace {

using namespace diffattn;

constexpr Index kEmbedDim = 1024, kHeads = 8;

template <typename Layer>
void forward(benchmark::State& state, const Layer& layer) {
  const Index n = state.range(0);
  std::srand(1);
  const Matrix<float> x = Matrix<float>::Random(n, kEmbedDim);
  Matrix<float> y(n, kEmbedDim);
  Workspace workspace;
  layer.forward_into(y, x, CausalMask{}, workspace);  // finds the scratch
  for (auto _ : state) layer.forward_into(y, x, CausalMask{}, workspace);
  const auto tokens = static_cast<double>(n), width = static_cast<double>(kEmbedDim);
  const double flop = 8 * tokens * width * width + 4 * width * tokens * (tokens + 1) / 2;
  state.counters["FLOP/s"] = benchmark::Counter(flop, benchmark::Counter::kIsIterationInvariantRate);
}

void differential_layer(benchmark::State& state) {
  forward(state,
          MultiheadDiffAttention<float>({.embed_dim = kEmbedDim, .num_heads = kHeads, .rotary = RotaryConfig{}}));
}

void standard_layer(benchmark::State& state) {
  forward(state,
          MultiheadAttention<float>({.embed_dim = kEmbedDim, .num_heads = 2 * kHeads, .rotary = RotaryConfig{}}));
}

const bool registered = [] {
  for (const Index n : {512, 2048}) {
    const std::string shape = "/float/causal/d64";
    benchmark::RegisterBenchmark(("layer/differential" + shape).c_str(), differential_layer)
        ->ArgName("n")
        ->Arg(n)
        ->Unit(benchmark::kMillisecond);
    benchmark::RegisterBenchmark(("layer/standard" + shape).c_str(), standard_layer)
        ->ArgName("n")
        ->Arg(n)
        ->Unit(benchmark::kMillisecond);
  }
  return true;
}();

}  // namespace
