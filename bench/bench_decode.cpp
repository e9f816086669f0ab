// Decoding: one query against a long cache, 16 differential heads (64, 128) or 32 standard heads (64, 64): the same
// bytes, from a KvCache (packed; float, or bfloat16 for half the bytes) and from matrices read in place. What bounds it
// is reading them, so the ceiling is a sum over as many, with as many threads.

#include <benchmark/benchmark.h>

#include <map>
#include <memory>
#include <string>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "diffattn/layers/kv_cache.hpp"
#include "support/peak.hpp"

namespace {

using namespace diffattn;

constexpr Index kHeads = 16, kWidth = 2 * 64;  // K1|K2, or V, of one differential head
constexpr Index kColumns = kHeads * kWidth;

/// Made once, as it takes longer to fill a cache than to read it.
template <typename T>
T& kept(Index n) {
  static std::map<Index, std::unique_ptr<T>> all;
  auto& one = all[n];
  if (!one) one = std::make_unique<T>(n);
  return *one;
}

/// Keys, or values: a block of random rows, over and over.
Matrix<float> repeated_rows(Index n) {
  std::srand(1);
  const Matrix<float> block = Matrix<float>::Random(256, kColumns);
  return block.replicate(n / block.rows(), 1);
}

struct Matrices {
  explicit Matrices(Index n) : k(repeated_rows(n)), v(k) {}
  Matrix<float> k, v;
};

template <typename Storage, Index kMaps>
struct Filled {
  explicit Filled(Index n) {
    Serial serial;
    const Index heads = kHeads * (3 - kMaps), d = kWidth / 2;
    const Matrix<float> block = repeated_rows(256);
    for (Index row = 0; row < n; row += block.rows()) {
      cache.template prepare<float>("bench", heads, kMaps, d, kColumns / heads, block.rows());
      cache.write(detail::view_of(block), detail::view_of(block), serial);
      cache.commit(block.rows());
    }
  }
  KvCache<Storage> cache;
};

struct Step {
  Matrix<float> q = Matrix<float>::Random(1, kColumns);
  Matrix<float> out = Matrix<float>::Zero(1, kColumns);
  Workspace workspace;
};

void count(benchmark::State& state, Index n, Index value_bytes) {
  const double bytes = static_cast<double>(2 * n * kColumns * value_bytes);
  state.counters["bytes/s"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate);
}

void read_bandwidth(benchmark::State& state) {
  const Index n = state.range(0);
  const Matrices& in = kept<Matrices>(n);
  ThreadPool pool(state.range(1));
  const Index pieces = in.k.size() / bench::kReadPiece;
  for (auto _ : state) {
    pool.run(2 * pieces, [&](Index task, Index /*worker*/) {
      const Matrix<float>& m = task < pieces ? in.k : in.v;
      benchmark::DoNotOptimize(bench::sum_of_piece(m.data() + task % pieces * bench::kReadPiece));
    });
  }
  count(state, n, sizeof(float));
}

template <typename Storage>
void differential(benchmark::State& state) {
  const Index n = state.range(0);
  const auto& in = kept<Filled<Storage, 2>>(n);
  Step step;
  ThreadPool pool(state.range(1));
  for (auto _ : state) {
    decode_diff_attention_into(step.out, step.q, in.cache.packed(), 0.7f, Heads{kHeads, kHeads}, CausalMask{}, {},
                               step.workspace, pool);
  }
  count(state, n, sizeof(Storage));
}

template <typename Storage>
void standard(benchmark::State& state) {
  const Index n = state.range(0);
  const auto& in = kept<Filled<Storage, 1>>(n);
  Step step;
  ThreadPool pool(state.range(1));
  for (auto _ : state) {
    decode_attention_into(step.out, step.q, in.cache.packed(), Heads{2 * kHeads, 2 * kHeads}, CausalMask{}, {},
                          step.workspace, pool);
  }
  count(state, n, sizeof(Storage));
}

void differential_in_place(benchmark::State& state) {
  const Index n = state.range(0);
  const Matrices& in = kept<Matrices>(n);
  Step step;
  ThreadPool pool(state.range(1));
  for (auto _ : state) {
    multihead_diff_attention_into(step.out, step.q, in.k, in.v, 0.7f, Heads{kHeads, kHeads}, FullMask{}, {},
                                  step.workspace, pool);
  }
  count(state, n, sizeof(float));
}

void standard_in_place(benchmark::State& state) {
  const Index n = state.range(0);
  const Matrices& in = kept<Matrices>(n);
  Step step;
  ThreadPool pool(state.range(1));
  for (auto _ : state) {
    multihead_attention_into(step.out, step.q, in.k, in.v, Heads{2 * kHeads, 2 * kHeads}, FullMask{}, {},
                             step.workspace, pool);
  }
  count(state, n, sizeof(float));
}

const bool registered = [] {
  for (const Index n : {8192, 32768}) {
    for (const Index threads : {1, 2}) {
      const auto add = [&](const char* name, void (*run)(benchmark::State&)) {
        benchmark::RegisterBenchmark(name, run)
            ->ArgNames({"n", "threads"})
            ->Args({n, threads})
            ->UseRealTime()
            ->Unit(benchmark::kMillisecond);
      };
      add("peak/read", read_bandwidth);
      add("decode/float/differential", differential<float>);
      add("decode/float/standard", standard<float>);
      add("decode/bfloat16/differential", differential<Eigen::bfloat16>);
      add("decode/bfloat16/standard", standard<Eigen::bfloat16>);
      add("decode/in_place/differential", differential_in_place);
      add("decode/in_place/standard", standard_in_place);
    }
  }
  return true;
}();

}  // namespace
