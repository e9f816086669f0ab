// A whole layer: MultiheadDiffAttention (8 heads) against MultiheadAttention (16 heads) of equal parameters, embed_dim
// 1,024, and against itself in plain Eigen, whose result is compared with ours before. FLOP count the projections and
// the visible pairs.

#include <benchmark/benchmark.h>

#include <string>
#include <vector>

#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "support/plain_eigen_layer.hpp"

namespace {

using namespace diffattn;

constexpr Index kEmbedDim = 1024, kHeads = 8;

void count(benchmark::State& state, Index n) {
  const auto tokens = static_cast<double>(n), width = static_cast<double>(kEmbedDim);
  const double flop = 8 * tokens * width * width + 4 * width * tokens * (tokens + 1) / 2;
  state.counters["FLOP/s"] = benchmark::Counter(flop, benchmark::Counter::kIsIterationInvariantRate);
}

Matrix<float> input(Index n) {
  std::srand(1);
  return Matrix<float>::Random(n, kEmbedDim);
}

template <typename Layer>
void forward(benchmark::State& state, const Layer& layer) {
  const Index n = state.range(0);
  const Matrix<float> x = input(n);
  Matrix<float> y(n, kEmbedDim);
  Workspace workspace;
  layer.forward_into(y, x, CausalMask{}, workspace);  // finds the scratch
  for (auto _ : state) layer.forward_into(y, x, CausalMask{}, workspace);
  count(state, n);
}

const MultiheadDiffAttentionConfig kDifferential{.embed_dim = kEmbedDim, .num_heads = kHeads, .rotary = RotaryConfig{}};

void differential_layer(benchmark::State& state) { forward(state, MultiheadDiffAttention<float>(kDifferential)); }

void standard_layer(benchmark::State& state) {
  forward(state,
          MultiheadAttention<float>({.embed_dim = kEmbedDim, .num_heads = 2 * kHeads, .rotary = RotaryConfig{}}));
}

void plain_eigen_layer(benchmark::State& state) {
  const Index n = state.range(0);
  const MultiheadDiffAttention<float> layer(kDifferential);
  const Matrix<float> x = input(n);
  const bench::Turns turns = bench::rotary_turns(n, kEmbedDim / (2 * kHeads), kDifferential.rotary->base);
  bench::AttentionActivations activations;
  Matrix<float> y(n, kEmbedDim);
  bench::attention_forward(y, x, layer, turns, activations, bench::Maps::drop);
  if (!y.isApprox(layer.forward(x), 1e-4f)) return state.SkipWithError("plain Eigen's result is not ours");
  for (auto _ : state) bench::attention_forward(y, x, layer, turns, activations, bench::Maps::drop);
  count(state, n);
}

// A batch of short sequences: 32 images of 197 tokens, embed_dim 384, each token of which sees its image.

constexpr Index kImages = 32, kImageTokens = 197, kImageDim = 384;

template <typename Layer>
void images(benchmark::State& state, const Layer& layer) {
  std::srand(1);
  const Matrix<float> x = Matrix<float>::Random(kImages * kImageTokens, kImageDim);
  Matrix<float> y(x.rows(), kImageDim);
  const std::vector<Index> lengths(kImages, kImageTokens);
  Workspace workspace;
  layer.forward_into(y, x, FullMask{}, lengths, workspace);
  for (auto _ : state) layer.forward_into(y, x, FullMask{}, lengths, workspace);
  const auto tokens = static_cast<double>(x.rows()), width = static_cast<double>(kImageDim);
  const double flop = 8 * tokens * width * width + 4 * width * tokens * static_cast<double>(kImageTokens);
  state.counters["FLOP/s"] = benchmark::Counter(flop, benchmark::Counter::kIsIterationInvariantRate);
}

void differential_images(benchmark::State& state) {
  images(state, MultiheadDiffAttention<float>({.embed_dim = kImageDim, .num_heads = 3}));
}

void standard_images(benchmark::State& state) {
  images(state, MultiheadAttention<float>({.embed_dim = kImageDim, .num_heads = 6}));
}

const bool registered = [] {
  benchmark::RegisterBenchmark("layer/images/differential", differential_images)->Unit(benchmark::kMillisecond);
  benchmark::RegisterBenchmark("layer/images/standard", standard_images)->Unit(benchmark::kMillisecond);
  for (const Index n : {512, 2048}) {
    const auto add = [n](const char* name, void (*run)(benchmark::State&)) {
      benchmark::RegisterBenchmark((std::string("layer/") + name + "/float/causal/d64").c_str(), run)
          ->ArgName("n")
          ->Arg(n)
          ->Unit(benchmark::kMillisecond);
    };
    add("differential", differential_layer);
    add("standard", standard_layer);
    add("plain_eigen", plain_eigen_layer);
  }
  return true;
}();

}  // namespace
