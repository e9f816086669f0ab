// The product of a linear layer, x Wᵀ, against Eigen's, in the shapes of a model of width 2,048 (tokens x in x out).
// There are as many weights of a shape as it takes to come from memory, as a model's do.

#include <benchmark/benchmark.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "diffattn/core/random.hpp"
#include "diffattn/layers/linear.hpp"

namespace {

using namespace diffattn;

struct Shape {
  Index tokens, in, out;

  std::string name() const { return std::to_string(tokens) + "x" + std::to_string(in) + "x" + std::to_string(out); }
};

constexpr std::array kShapes = {Shape{512, 2048, 2048}, Shape{512, 2048, 8192}, Shape{512, 8192, 2048},
                                Shape{2048, 1024, 1024}, Shape{8, 2048, 2048}};

Matrix<float> random_matrix(Index rows, Index cols, SplitMix64& random) {
  Matrix<float> matrix(rows, cols);
  for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = static_cast<float>(2 * random.unit() - 1);
  return matrix;
}

template <typename Multiply>
void run(benchmark::State& state, const Shape& shape, Multiply multiply) {
  constexpr Index kBytes = 128 << 20;
  SplitMix64 random(1);
  std::vector<Matrix<float>> weights;
  for (Index bytes = 0; bytes < kBytes; bytes += 4 * shape.in * shape.out) {
    weights.push_back(random_matrix(shape.out, shape.in, random));
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
}

const bool registered = [] {
  for (const Shape& shape : kShapes) {
    benchmark::RegisterBenchmark(("product/" + shape.name() + "/diffattn").c_str(), [=](benchmark::State& state) {
      Workspace workspace;
      Serial serial;
      run(state, shape, [&](auto& y, const auto& x, const auto& w) { linear_into<float>(y, x, w, workspace, serial); });
    });
    benchmark::RegisterBenchmark(("product/" + shape.name() + "/eigen").c_str(), [=](benchmark::State& state) {
      run(state, shape, [](auto& y, const auto& x, const auto& w) { y.noalias() = x * w.transpose(); });
    });
  }
  return true;
}();

}  // namespace
