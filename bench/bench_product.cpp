// The product of a linear layer, x Wᵀ, against Eigen's, in the shapes of a model of width 2,048 (tokens x in x out).
// There are as many weights of a shape as it takes to come from memory, as a model's do. The products of few rows, a
// batch that is decoded, stand beside the lesser of FMA peak and read bandwidth: peak/fma and peak/read_product.

#include <benchmark/benchmark.h>

#include <array>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "diffattn/core/random.hpp"
#include "diffattn/layers/linear.hpp"
#include "support/peak.hpp"

namespace {

using namespace diffattn;

struct Shape {
  Index tokens, in, out;

  std::string name() const { return std::to_string(tokens) + "x" + std::to_string(in) + "x" + std::to_string(out); }
};

constexpr std::array kShapes = {Shape{512, 2048, 2048}, Shape{512, 2048, 8192}, Shape{512, 8192, 2048},
                                Shape{2048, 1024, 1024}, Shape{8, 2048, 2048}};
constexpr std::array<Index, 7> kFewRows = {1, 2, 4, 8, 16, 32, 64};
constexpr Index kBytes = 128 << 20;  // of weights

Matrix<float> random_matrix(Index rows, Index cols, SplitMix64& random) {
  Matrix<float> matrix(rows, cols);
  for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = static_cast<float>(2 * random.unit() - 1);
  return matrix;
}

/// kPacked: weights that keep a packed copy, as those of a DiffLlama in bfloat16 do.
template <typename Stored, bool kPacked = false, typename Multiply>
void run(benchmark::State& state, const Shape& shape, Multiply multiply) {
  SplitMix64 random(1);
  std::vector<std::conditional_t<kPacked, FrozenMatrix, Matrix<Stored>>> weights;
  for (Index bytes = 0; bytes < kBytes; bytes += static_cast<Index>(sizeof(Stored)) * shape.in * shape.out) {
    weights.emplace_back(Matrix<Stored>(random_matrix(shape.out, shape.in, random).template cast<Stored>()));
    if constexpr (kPacked) weights.back().pack();
  }
  const Matrix<float> x = random_matrix(shape.tokens, shape.in, random);
  Matrix<float> y(shape.tokens, shape.out);
  std::size_t next = 0;
  for (auto _ : state) {
    multiply(y, x, weights[next++ % weights.size()]);
    benchmark::DoNotOptimize(y.data());
  }
  const double flop = 2.0 * static_cast<double>(shape.tokens) * static_cast<double>(shape.in * shape.out);
  state.counters["FLOP/s"] = benchmark::Counter(flop, benchmark::Counter::kIsIterationInvariantRate);
  const double bytes = static_cast<double>(sizeof(Stored)) * static_cast<double>(shape.in * shape.out);
  state.counters["bytes/s"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate);
}

template <typename Stored, Arithmetic kArithmetic = Arithmetic::scalar, bool kPacked = false>
void run_ours(benchmark::State& state, const Shape& shape) {
  Workspace workspace;
  Serial serial;
  run<Stored, kPacked>(state, shape, [&](auto& y, const auto& x, const auto& w) {
    linear_into<float>(y, x, w, workspace, serial, nullptr, kArithmetic);
  });
}

void read_bandwidth(benchmark::State& state) {
  const std::vector<float> values(static_cast<std::size_t>(kBytes) / sizeof(float), 1.0f);
  for (auto _ : state) {
    float total = 0;
    for (std::size_t i = 0; i < values.size(); i += bench::kReadPiece) total += bench::sum_of_piece(values.data() + i);
    benchmark::DoNotOptimize(total);
  }
  state.counters["bytes/s"] =
      benchmark::Counter(static_cast<double>(kBytes), benchmark::Counter::kIsIterationInvariantRate);
}

const bool registered = [] {
  for (const Shape& shape : kShapes) {
    benchmark::RegisterBenchmark(("product/" + shape.name() + "/diffattn").c_str(),
                                 [=](benchmark::State& state) { run_ours<float>(state, shape); });
    benchmark::RegisterBenchmark(("product/" + shape.name() + "/diffattn_bfloat16").c_str(),
                                 [=](auto& state) { run_ours<Eigen::bfloat16, Arithmetic::bfloat16>(state, shape); });
    benchmark::RegisterBenchmark(("product/" + shape.name() + "/diffattn_bfloat16_packed").c_str(), [=](auto& state) {
      run_ours<Eigen::bfloat16, Arithmetic::bfloat16, true>(state, shape);
    });
    benchmark::RegisterBenchmark(("product/" + shape.name() + "/eigen").c_str(), [=](benchmark::State& state) {
      run<float>(state, shape, [](auto& y, const auto& x, const auto& w) { y.noalias() = x * w.transpose(); });
    });
  }
  benchmark::RegisterBenchmark("peak/read_product", read_bandwidth);
  for (const Index out : {2048, 8192}) {
    for (const Index rows : kFewRows) {
      const Shape shape{rows, 2048, out};
      const auto add = [&](const char* stored, void (*ours)(benchmark::State&, const Shape&)) {
        benchmark::RegisterBenchmark(("thin/" + std::string(stored) + "/" + shape.name()).c_str(),
                                     [=](benchmark::State& state) { ours(state, shape); });
      };
      add("float", run_ours<float>);
      add("bfloat16", run_ours<Eigen::bfloat16>);
      add("bfloat16_arithmetic", run_ours<Eigen::bfloat16, Arithmetic::bfloat16>);
      add("bfloat16_packed", run_ours<Eigen::bfloat16, Arithmetic::bfloat16, true>);
    }
  }
  return true;
}();

}  // namespace
