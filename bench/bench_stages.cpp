// What each stage of a differential head takes by itself, its operands in the nearest cache: the ceiling of the kernel,
// which memory can only lower. A stage is run over one group of rows and one chunk of keys, both maps, and its rate is
// given in the FLOP of the whole kernel there (8d a pair): peak rate / rate is its share of the time at peak, and the
// shares of all stages add up to 1 / the ceiling. Packing is what one row block of n queries pays for n keys.
//
// And block by block of rows, what the kernels do once the keys are packed: a block takes 0.1 to 30 ms, short enough
// to fall between the disturbances of a busy machine, which a whole head does not.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <string>

#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward/backward_block.hpp"
#include "diffattn/kernels/detail/forward/differential_block.hpp"
#include "diffattn/kernels/detail/forward/standard_block.hpp"

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

/// As many FLOP a pair as `flop_per_d` times d.
void count(benchmark::State& state, Index d, Index pairs, Index flop_per_d = 8) {
  state.counters["FLOP/s"] =
      benchmark::Counter(static_cast<double>(flop_per_d * d * pairs), benchmark::Counter::kIsIterationInvariantRate);
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
    for (Index c = 0; c < kChunk; c += kCols) {
      add_product(x.scores + c, kChunk, false, q, x.keys, x.d, kRows, kCols, {}, {}, kScoreChain);
    }
  }
}

/// 2^(c·(scores − base)) and its sums
void softmax(Operands& x) {
  RowSoftmax<float> rows;
  float growth[kRows];
  rows.reset();
  const ScaledExp2<float> exp2(1.25f);
  for (Index map = 0; map < 2; ++map) rows.add_chunk(x.weights, x.scores, kChunk, kRows, 0, kChunk, exp2, growth);
}

/// A = P1/l1 − λ·P2/l2
void combination(Operands& x) {
  for (Index r = 0; r < kRows; ++r) {
    float* const row = x.weights + r * kChunk;
    combine_maps(row, row, 0.5f, x.other_weights + r * kChunk, 0.25f, 0, kChunk);
  }
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

/// One head of n queries and keys: its operands, and keys packed.
template <Index kMaps>
struct Head {
  Head(Index d, Index n) : v(Matrix<float>::Random(n, kMaps * d)) {
    for (Index map = 0; map < kMaps; ++map) {
      q[map] = Matrix<float>::Random(n, d) * 3.0f;
      k[map] = Matrix<float>::Random(n, d) * 3.0f;
      keys[map] = workspace.take<float>(packed_strips_size<float>(n, d));
      pack_transposed(keys[map], view_of(k[map]), 0, n);
    }
  }
  Matrix<float> v, q[kMaps], k[kMaps];
  Workspace workspace;
  float* keys[kMaps];
};

/// Runs the row blocks of a head, last first, one an iteration.
template <typename Run>
void time_blocks(benchmark::State& state, Index n, Index block_rows, const Run& run) {
  Index first = n / block_rows * block_rows;
  const auto run_next = [&] {
    first = (first == 0 ? n / block_rows * block_rows : first) - block_rows;
    run(RowRange<FullMask>{FullMask{}, 0, first, block_rows, n, n});
  };
  run_next();
  for (auto _ : state) run_next();
}

/// DifferentialBlock (d, V 2d) or StandardBlock (d, d), whose heads also come one after the other.
template <typename Block>
void row_blocks(benchmark::State& state, Index d, Index n) {
  constexpr Index kMaps = Block::Operands::kMaps;
  const Index dv = kMaps * d;
  Head<kMaps> in(d, n);
  PackedHead<float> head;
  head.value_stride = head.n_k = n;
  head.d = d;
  head.dv = dv;
  float* const values = in.workspace.template take<float>(packed_strips_size<float>(dv, n));
  pack_columns(values, n, view_of(in.v));
  head.values = values;
  std::copy_n(in.keys, kMaps, head.keys);

  Matrix<float> out(n, dv);
  HeadOperands<float, kMaps> operands;
  for (Index map = 0; map < kMaps; ++map) operands.q[map] = view_of(in.q[map]);
  operands.out = writable_view_of(out);
  operands.lambda = {0.7f};
  operands.d = d;
  operands.dv = dv;
  const ScoreScale<float> scale = split_scale<FullMask>(0.125f);
  Block block(in.workspace, head, n);
  time_blocks(state, n, kBlockRows, [&](const RowRange<FullMask>& rows) { block.run(operands, head, rows, 1, scale); });
  count(state, d, kBlockRows * n * kMaps / 2);
}

/// The gradients of the same, counted as 20d a pair for two maps.
template <Index kMaps>
void gradient_blocks(benchmark::State& state, Index d, Index n) {
  using Block = BackwardBlock<float, kMaps>;
  const Index dv = kMaps * d, columns_size = packed_strips_size<float>(d, n);
  Head<kMaps> in(d, n);
  typename Block::Head head;
  typename Block::Sums sums;
  head.n_k = sums.padded_keys = n;
  head.d = d;
  head.dv = dv;
  const auto zeros = [&](Index width) {
    const Index size = packed_strips_size<float>(width, n);
    float* const to = in.workspace.template take<float>(size);
    std::fill_n(to, size, 0.0f);
    return to;
  };
  for (Index map = 0; map < kMaps; ++map) {
    float* const columns = in.workspace.template take<float>(columns_size);
    pack_columns(columns, n, view_of(in.k[map]));
    head.keys[map] = in.keys[map];
    head.key_columns[map] = columns;
    sums.dk[map] = zeros(d);
  }
  float* const values = in.workspace.template take<float>(packed_strips_size<float>(n, dv));
  pack_transposed(values, view_of(in.v), 0, n);
  head.values = values;
  sums.dv = zeros(dv);

  const Matrix<float> dout = Matrix<float>::Random(n, dv) * 1e-3f;
  Matrix<float> dq[kMaps];
  for (auto& m : dq) m.resize(n, d);
  Vector<float> d2(n);
  HeadOperands<float, kMaps> operands;
  for (Index map = 0; map < kMaps; ++map) operands.q[map] = view_of(in.q[map]);
  operands.lambda = {0.7f};
  operands.d = d;
  operands.dv = dv;
  operands.scale = 0.125f;
  HeadGradients<float, kMaps> grad(operands, view_of(dout));
  for (Index map = 0; map < kMaps; ++map) grad.of_q[map] = writable_view_of(dq[map]);
  grad.d2 = d2.data();
  Block block(in.workspace, head, n, n, false, 1);
  time_blocks(state, n, Block::kBlockRows,
              [&](const RowRange<FullMask>& rows) { block.run(operands, grad, head, sums, {}, rows); });
  count(state, d, Block::kBlockRows * n * kMaps / 2, 20);
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
    for (const Index n : {384, 1920, 3840, 7680}) {
      const std::string shape = "/d" + std::to_string(d) + "/n" + std::to_string(n);
      benchmark::RegisterBenchmark(("gradient_block/differential" + shape).c_str(), gradient_blocks<2>, d, n);
      benchmark::RegisterBenchmark(("gradient_block/standard" + shape).c_str(), gradient_blocks<1>, d, n);
    }
  }
  return true;
}();

}  // namespace
