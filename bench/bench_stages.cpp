// What each stage of a differential head takes by itself, its operands in the nearest cache: the ceiling of the kernel,
// which memory can only lower. A stage is run over one group of rows and one chunk of keys, both maps, and its rate is
// given in the FLOP of the whole kernel there (8d a pair): peak rate / rate is its share of the time at peak, and the
// shares of all stages add up to 1 / the ceiling. Packing is what one row block of n queries pays for n keys.
//
// And block by block of rows, what the kernels do once the keys are packed: a block takes 0.1 to 5 ms, short enough to
// fall between the disturbances of a busy machine, which a whole head does not.

#include <benchmark/benchmark.h>

#include <array>
#include <string>

#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/differential_block.hpp"
#include "diffattn/kernels/detail/standard_block.hpp"

namespace {

using namespace diffattn;
using namespace diffattn::detail;

constexpr Index kRows = Tile<float>::kRows, kCols = Tile<float>::kCols, kPackedKeys = 1920;

/// Operands of one group and chunk; of keys and values no more than one strip, so that all stay in L1.
struct Operands {
  float* filled(Index size) {
    float* const to = workspace.take<float>(size);
    for (Index i = 0; i < size; ++i) to[i] = static_cast<float>(i * 37 % 101) / 101.0f;
    return to;
  }

  Index d;
  Workspace workspace = {};
  float* const scores = filled(kRows * kChunk);
  float* const weights = filled(kRows * kChunk);
  float* const other_weights = filled(kRows * kChunk);
  float* const q = filled(kRows * d);
  float* const keys = filled(d * kCols);
  float* const values = filled(kChunk * kCols);
  float* const sums = filled(kRows * kCols);
};

void count(benchmark::State& state, Index d, Index pairs) {
  state.counters["FLOP/s"] =
      benchmark::Counter(8.0 * static_cast<double>(d * pairs), benchmark::Counter::kIsIterationInvariantRate);
}

template <typename Stage>
void measure(benchmark::State& state, Index d, const Stage& stage) {
  Operands x{d};
  for (auto _ : state) {
    stage(x);
    benchmark::ClobberMemory();
  }
  count(state, d, kRows * kChunk);
}

/// s·Q_m K_mᵀ
void scores(Operands& x) {
  const LeftOperand<float> q{x.q, x.d, 1};
  for (Index map = 0; map < 2; ++map) {
    for (Index c = 0; c < kChunk; c += kCols) add_product(x.scores + c, kChunk, false, q, x.keys, x.d, kRows, kCols);
  }
}

/// exp2(scores − base) and its sums
void softmax(Operands& x) {
  RowSoftmax<float> rows;
  float growth[kRows];
  rows.reset();
  for (Index map = 0; map < 2; ++map) rows.add_chunk(x.weights, x.scores, kChunk, kRows, 0, kChunk, growth);
}

/// A = P1/l1 − λ·P2/l2
void combination(Operands& x) {
  std::array<float, kRows> f1, f2;
  f1.fill(0.5f);
  f2.fill(0.25f);
  combine_maps(x.weights, x.other_weights, f1.data(), f2.data(), kRows, {0, kChunk});
}

/// A V, dv = 2d
void values(Operands& x) {
  const LeftOperand<float> a{x.weights, kChunk, 1};
  for (Index c = 0; c < 2 * x.d; c += kCols) add_product(x.sums, kCols, true, a, x.values, kChunk, kRows, kCols);
}

/// Of keys and values that come from memory or a far cache.
void packing(benchmark::State& state, Index d) {
  const Matrix<float> k = Matrix<float>::Random(kPackedKeys, d), v = Matrix<float>::Random(kPackedKeys, 2 * d);
  Workspace workspace;
  float* const keys = workspace.take<float>(packed_strips_size<float>(kPackedKeys, d));
  float* const values = workspace.take<float>(packed_strips_size<float>(2 * d, kPackedKeys));
  for (auto _ : state) {
    for (Index map = 0; map < 2; ++map) pack_transposed(keys, view_of(k), 0, kPackedKeys);
    benchmark::DoNotOptimize(pack_columns(values, kPackedKeys, view_of(v), true));
  }
  count(state, d, kPackedKeys * kPackedKeys);
}

/// The row blocks of one head in the order of the kernel, last first: DifferentialBlock (d, V 2d) or StandardBlock
/// (d, d), whose heads also come one after the other.
template <typename Block>
void row_blocks(benchmark::State& state, Index d, Index n) {
  constexpr Index kMaps = Block::kMaps, kBlockRows = Block::kBlockRows;
  const Index dv = kMaps * d;
  const Matrix<float> v = Matrix<float>::Random(n, dv);
  Matrix<float> q[kMaps], out(n, dv);
  Workspace workspace;
  PackedHead<float> head;
  head.value_stride = head.n_k = n;
  head.d = d;
  head.dv = dv;
  for (Index map = 0; map < kMaps; ++map) {
    q[map] = Matrix<float>::Random(n, d) * 3.0f;
    const Matrix<float> k = Matrix<float>::Random(n, d) * 3.0f;
    float* const keys = workspace.take<float>(packed_strips_size<float>(n, d));
    pack_transposed(keys, view_of(k), 0, n);
    head.keys[map] = keys;
  }
  float* const values = workspace.take<float>(packed_strips_size<float>(dv, n));
  pack_columns(values, n, view_of(v));
  head.values = values;

  const FullMask mask;
  Block block(workspace, head, n);
  Index first = n / kBlockRows * kBlockRows;
  const auto run_next = [&] {
    first = (first == 0 ? n / kBlockRows * kBlockRows : first) - kBlockRows;
    const RowRange<FullMask> rows{mask, first, kBlockRows, n, n};
    StridedView<const float> q_rows[kMaps];
    for (Index map = 0; map < kMaps; ++map) q_rows[map] = view_of(q[map]).middle_rows(first, kBlockRows);
    const StridedView<float> lse[kMaps] = {};
    block.run(writable_view_of(out).middle_rows(first, kBlockRows), q_rows, head, rows, 0.18f, {0.7f}, lse, 0);
  };
  run_next();
  for (auto _ : state) run_next();
  count(state, d, kBlockRows * n * kMaps / 2);
}

const bool registered = [] {
  for (const Index d : {64, 128}) {
    const auto add = [&](const std::string& name, void (*stage)(Operands&)) {
      benchmark::RegisterBenchmark(("stage/" + name + "/d" + std::to_string(d)).c_str(),
                                   [=](benchmark::State& state) { measure(state, d, stage); });
    };
    add("scores", scores);
    add("softmax", softmax);
    add("combination", combination);
    add("values", values);
    benchmark::RegisterBenchmark(("stage/packing/d" + std::to_string(d)).c_str(), packing, d);
    for (const Index n : {384, 1920, 7680, 16384}) {
      const std::string shape = "/d" + std::to_string(d) + "/n" + std::to_string(n);
      benchmark::RegisterBenchmark(("block/differential" + shape).c_str(), row_blocks<DifferentialBlock<float>>, d, n);
      benchmark::RegisterBenchmark(("block/standard" + shape).c_str(), row_blocks<StandardBlock<float>>, d, n);
    }
  }
  return true;
}();

}  // namespace
