// Gradients of one differential head (d, V 2d) against those of two standard heads (d, d), and against plain Eigen; the
// pair of DIFF V2 against two standard query heads on one KV head. Work is counted as 20d FLOP per visible pair (five
// products of 2d in each of two maps, scores included), 16d for the V2 pair.

#include <benchmark/benchmark.h>

#include <string>

#include "diffattn/kernels/backward.hpp"
#include "support/plain_eigen.hpp"
#include "support/whole_matrices.hpp"

namespace {

using namespace diffattn;

struct Problem {
  Problem(Index n, Index d) {
    std::srand(1);
    for (Matrix<float>* m : {&q1, &q2, &k1, &k2}) *m = Matrix<float>::Random(n, d) * 3.0f;
    v = Matrix<float>::Random(n, 2 * d);
    dout = Matrix<float>::Random(n, 2 * d);
    v1 = v.leftCols(d);
    v2 = v.rightCols(d);
    dout1 = dout.leftCols(d);
    dout2 = dout.rightCols(d);
    q.resize(n, 2 * d);
    q << q1, q2;
  }
  Matrix<float> q1, q2, k1, k2, v, v1, v2, dout, dout1, dout2, q;
};

/// The first call, which fetches the scratch memory, is not timed.
template <typename Call>
void measure(benchmark::State& state, const Call& call) {
  call();
  for (auto _ : state) call();
}

void count(benchmark::State& state, Index n, bool causal, double flop_per_pair) {
  const auto keys = static_cast<double>(n);
  const double pairs = causal ? keys * (keys + 1) / 2 : keys * keys;
  state.counters["FLOP/s"] = benchmark::Counter(flop_per_pair * pairs, benchmark::Counter::kIsIterationInvariantRate);
}

template <typename Mask>
void differential(benchmark::State& state, Index d, Index n) {
  const Problem p(n, d);
  DiffAttentionGradients<float, float> gradients;
  Workspace workspace;
  measure(state, [&] {
    diff_attention_backward_into(gradients, p.q1, p.k1, p.q2, p.k2, p.v, 0.7f, p.dout, Mask{}, {}, workspace);
  });
  count(state, n, std::is_same_v<Mask, CausalMask>, 20.0 * static_cast<double>(d));
}

template <typename Mask>
void standard(benchmark::State& state, Index d, Index n) {
  const Problem p(n, d);
  AttentionGradients<float> first, second;
  Workspace workspace;
  measure(state, [&] {
    attention_backward_into(first, p.q1, p.k1, p.v1, p.dout1, Mask{}, {}, workspace);
    attention_backward_into(second, p.q2, p.k2, p.v2, p.dout2, Mask{}, {}, workspace);
  });
  count(state, n, std::is_same_v<Mask, CausalMask>, 20.0 * static_cast<double>(d));
}

template <typename Mask>
void plain_eigen(benchmark::State& state, Index d, Index n) {
  const Problem p(n, d);
  measure(state, [&] {
    benchmark::DoNotOptimize(bench::plain_diff_attention_backward(p.q1, p.k1, p.q2, p.k2, p.v, 0.7f, p.dout,
                                                                  std::is_same_v<Mask, CausalMask>));
  });
  count(state, n, std::is_same_v<Mask, CausalMask>, 20.0 * static_cast<double>(d));
}

void whole_matrices(benchmark::State& state, Index d, Index n) {
  const Problem p(n, d);
  measure(state, [&] {
    benchmark::DoNotOptimize(bench::whole_diff_attention_backward(p.q1, p.k1, p.q2, p.k2, p.v, 0.7f, p.dout));
  });
  count(state, n, false, 20.0 * static_cast<double>(d));
}

template <typename Mask>
void v2_pair(benchmark::State& state, Index d, Index n) {
  const Problem p(n, d);
  Matrix<float> dq(n, 2 * d), dk(n, d), dv(n, d);
  float dlambda = 0;
  Workspace workspace;
  measure(state, [&] {
    multihead_diff_attention_backward_into({dq, dk, dv, dlambda}, p.q, p.k1, p.v1, 0.7f, p.dout1, Heads{1}, Mask{}, {},
                                           workspace);
  });
  count(state, n, std::is_same_v<Mask, CausalMask>, 16.0 * static_cast<double>(d));
}

template <typename Mask>
void v2_baseline(benchmark::State& state, Index d, Index n) {
  const Problem p(n, d);
  Matrix<float> dq(n, 2 * d), dk(n, d), dv(n, d);
  Workspace workspace;
  measure(state, [&] {
    multihead_attention_backward_into({dq, dk, dv}, p.q, p.k1, p.v1, p.dout, Heads{2, 1}, Mask{}, {}, workspace);
  });
  count(state, n, std::is_same_v<Mask, CausalMask>, 20.0 * static_cast<double>(d));
}

template <typename Mask>
void add_shape(const std::string& mask, Index d, Index n) {
  const std::string shape = "/float/" + mask + "/d" + std::to_string(d) + "/n" + std::to_string(n);
  const auto add = [&](const std::string& name, void (*run)(benchmark::State&, Index, Index)) {
    benchmark::RegisterBenchmark(("backward/" + name + shape).c_str(), run, d, n)->Unit(benchmark::kMillisecond);
  };
  add("differential", differential<Mask>);
  add("standard", standard<Mask>);
  if (n <= 1920) add("plain_eigen", plain_eigen<Mask>);
  if (n <= 1920 && std::is_same_v<Mask, FullMask>) add("whole_matrices", whole_matrices);
  add("v2_pair", v2_pair<Mask>);
  add("v2_baseline", v2_baseline<Mask>);
}

const bool registered = [] {
  for (const Index n : {384, 1920, 3840}) add_shape<FullMask>("full", 64, n);
  add_shape<CausalMask>("causal", 64, 1920);
  add_shape<FullMask>("full", 128, 1920);
  add_shape<CausalMask>("causal", 128, 1920);
  return true;
}();

}  // namespace
