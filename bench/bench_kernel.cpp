// One differential head (d, V 2d) against two standard heads (d, d), which hold the same parameters, and against plain
// Eigen; the pair of DIFF V2 (shared K and V) against two standard query heads on one KV head. Work is counted as 8d
// FLOP per visible pair for all of them, 6d for the V2 pair. And four heads that share their map of noise against the
// same heads as pairs, with the noise's queries repeated: 26d FLOP a pair against 32d. Operands of float, double and
// bfloat16: run with --benchmark_filter=kernel/.*/(float|bfloat16)/full to have both arithmetics in turns.

#include <benchmark/benchmark.h>

#include <string>

#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "support/peak.hpp"
#include "support/plain_eigen.hpp"
#include "support/whole_matrices.hpp"

namespace {

using namespace diffattn;

template <typename Scalar>
struct Head {
  Head(Index n, Index d) {
    std::srand(1);
    for (Matrix<Scalar>* m : {&q1, &q2, &k1, &k2}) *m = (Matrix<float>::Random(n, d) * 3.0f).template cast<Scalar>();
    v = Matrix<float>::Random(n, 2 * d).template cast<Scalar>();
    v1 = v.leftCols(d);
    v2 = v.rightCols(d);
    out.resize(n, 2 * d);
    out1.resize(n, d);
    out2.resize(n, d);
  }
  Matrix<Scalar> q1, q2, k1, k2, v, v1, v2, out, out1, out2;
};

void count(benchmark::State& state, Index n, bool causal, double flop_per_pair, const Workspace& workspace) {
  const auto keys = static_cast<double>(n);
  const double pairs = causal ? keys * (keys + 1) / 2 : keys * keys;
  state.counters["FLOP/s"] = benchmark::Counter(flop_per_pair * pairs, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["scratch_MB"] = static_cast<double>(workspace.capacity()) / 1e6;
}

template <typename Scalar, typename Mask>
void differential(benchmark::State& state, Index d, Index n) {
  Head<Scalar> h(n, d);
  Workspace workspace;
  const auto run = [&] { diff_attention_into(h.out, h.q1, h.k1, h.q2, h.k2, h.v, Scalar(0.7), Mask{}, {}, workspace); };
  if (n <= 16384) run();  // finds the scratch
  for (auto _ : state) run();
  count(state, n, std::is_same_v<Mask, CausalMask>, 8.0 * static_cast<double>(d), workspace);
}

template <typename Scalar, typename Mask>
void standard(benchmark::State& state, Index d, Index n) {
  Head<Scalar> h(n, d);
  Workspace workspace;
  const auto run = [&] {
    attention_into(h.out1, h.q1, h.k1, h.v1, Mask{}, {}, workspace);
    attention_into(h.out2, h.q2, h.k2, h.v2, Mask{}, {}, workspace);
  };
  run();
  for (auto _ : state) run();
  count(state, n, std::is_same_v<Mask, CausalMask>, 8.0 * static_cast<double>(d), workspace);
}

/// What a bias adds to a head: `run` as above, with every kind, against the same without.
template <typename Bias>
void biased(benchmark::State& state, bool two_maps, Index d, Index n, const Bias& bias) {
  Head<float> h(n, d);
  Workspace workspace;
  const auto mask = with_bias(FullMask{}, bias);
  const auto run = [&] {
    if (two_maps) diff_attention_into(h.out, h.q1, h.k1, h.q2, h.k2, h.v, 0.7f, mask, {}, workspace);
    if (!two_maps) attention_into(h.out1, h.q1, h.k1, h.v1, mask, {}, workspace);
  };
  run();
  for (auto _ : state) run();
  count(state, n, false, (two_maps ? 8.0 : 4.0) * static_cast<double>(d), workspace);
}

void add_biases(Index d, Index n) {
  static const Matrix<float> matrix = Matrix<float>::Random(n, n), table = Matrix<float>::Random(1, 257);
  const auto add = [&](const std::string& name, const auto& bias) {
    for (const bool two_maps : {false, true}) {
      const std::string kernel = two_maps ? "differential" : "standard";
      benchmark::RegisterBenchmark(
          ("bias/" + name + "/" + kernel + "/d" + std::to_string(d) + "/n" + std::to_string(n)).c_str(),
          [=](benchmark::State& state) { biased(state, two_maps, d, n, bias); })
          ->Unit(benchmark::kMillisecond);
    }
  };
  add("alibi", AlibiBias{0.1});
  add("matrix", MatrixBias(matrix));
  add("padding", PaddingBias{n});
  add("relative", RelativeBias(table));
  add("indexed", IndexedBias(table, [](Index query, Index key, Index, Index) { return (query + key) % 257; }));
  add("lambda", [](Index, Index query, Index key, Index, Index) { return -0.1 * static_cast<double>(query - key); });
}

template <typename Scalar, typename Mask>
void plain_eigen(benchmark::State& state, Index d, Index n) {
  Head<Scalar> h(n, d);
  constexpr bool kCausal = std::is_same_v<Mask, CausalMask>;
  for (auto _ : state) h.out = bench::plain_diff_attention(h.q1, h.k1, h.q2, h.k2, h.v, Scalar(0.7), kCausal);
  count(state, n, kCausal, 8.0 * static_cast<double>(d), Workspace{});
}

template <typename Scalar>
void whole_matrices(benchmark::State& state, Index d, Index n) {
  Head<Scalar> h(n, d);
  for (auto _ : state) h.out = bench::whole_diff_attention(h.q1, h.k1, h.q2, h.k2, h.v, Scalar(0.7));
  count(state, n, false, 8.0 * static_cast<double>(d), Workspace{});
}

template <typename Scalar, typename Mask>
void v2_pair(benchmark::State& state, Index d, Index n) {
  Head<Scalar> h(n, d);
  Workspace workspace;
  const auto run = [&] {
    diff_attention_into(h.out1, h.q1, h.k1, h.q2, h.k1, h.v1, Scalar(0.7), Mask{}, {}, workspace);
  };
  run();
  for (auto _ : state) run();
  count(state, n, std::is_same_v<Mask, CausalMask>, 6.0 * static_cast<double>(d), workspace);
}

template <typename Scalar, typename Mask>
void v2_baseline(benchmark::State& state, Index d, Index n) {
  Head<Scalar> h(n, d);
  Matrix<Scalar> q(n, 2 * d);
  q << h.q1, h.q2;
  Workspace workspace;
  const auto run = [&] { multihead_attention_into(h.out, q, h.k1, h.v1, Heads{2, 1}, Mask{}, {}, workspace); };
  run();
  for (auto _ : state) run();
  count(state, n, std::is_same_v<Mask, CausalMask>, 8.0 * static_cast<double>(d), workspace);
}

/// Four signal heads on one key head, and a noise head: one for all, or repeated for each; kBackward: the gradients.
template <bool kRepeated, bool kBackward>
void four_heads(benchmark::State& state, Index d, Index n) {
  std::srand(1);
  const Heads heads{4, 1, kRepeated ? 4 : 1};
  const Matrix<float> q = Matrix<float>::Random(n, heads.query_heads() * d) * 3.0f;
  const Matrix<float> k = Matrix<float>::Random(n, 2 * d) * 3.0f, v = Matrix<float>::Random(n, 2 * d);
  Matrix<float> out = Matrix<float>::Random(n, 8 * d);
  MultiheadDiffAttentionGradients<float, float> gradients;
  Workspace workspace;
  const auto run = [&] {
    if constexpr (kBackward) {
      multihead_diff_attention_backward_into(gradients, q, k, v, 0.7f, out, heads, CausalMask{}, {}, workspace);
    } else {
      multihead_diff_attention_into(out, q, k, v, 0.7f, heads, CausalMask{}, {}, workspace);
    }
  };
  run();
  for (auto _ : state) run();
  const double flop = (kBackward ? (kRepeated ? 80.0 : 62.0) : kRepeated ? 32.0 : 26.0) * static_cast<double>(d);
  count(state, n, true, flop, workspace);
}

template <typename Scalar, typename Mask>
void add_shape(const std::string& type, const std::string& mask, Index d, Index n) {
  const std::string shape = "/" + type + "/" + mask + "/d" + std::to_string(d) + "/n" + std::to_string(n);
  const auto add = [&](const std::string& name, void (*run)(benchmark::State&, Index, Index)) {
    benchmark::RegisterBenchmark(("kernel/" + name + shape).c_str(), run, d, n)->Unit(benchmark::kMillisecond);
  };
  add("differential", differential<Scalar, Mask>);
  add("standard", standard<Scalar, Mask>);
  if constexpr (!std::is_same_v<Scalar, Eigen::bfloat16>) {
    if (n <= 1920) add("plain_eigen", plain_eigen<Scalar, Mask>);
    if (n <= 1920 && std::is_same_v<Mask, FullMask>) add("whole_matrices", whole_matrices<Scalar>);
  }
  add("v2_pair", v2_pair<Scalar, Mask>);
  add("v2_baseline", v2_baseline<Scalar, Mask>);
}

const bool registered = [] {
  benchmark::RegisterBenchmark("peak/fma/float", bench::fma_peak<float>);
  benchmark::RegisterBenchmark("peak/fma/double", bench::fma_peak<double>);
  for (const Index d : {64, 128}) {
    for (const Index n : {384, 1920, 7680, 16384}) add_shape<float, FullMask>("float", "full", d, n);
    for (const Index n : {1920, 7680}) add_shape<float, CausalMask>("float", "causal", d, n);
    for (const Index n : {384, 1920, 7680}) add_shape<Eigen::bfloat16, FullMask>("bfloat16", "full", d, n);
    add_shape<Eigen::bfloat16, CausalMask>("bfloat16", "causal", d, 1920);
  }
  for (const Index n : {384, 1920}) add_shape<double, FullMask>("double", "full", 64, n);
  add_shape<double, CausalMask>("double", "causal", 64, 1920);
  for (const Index n : {384, 1920}) {
    const auto add = [&](const char* name, void (*run)(benchmark::State&, Index, Index)) {
      const std::string shape = "/float/causal/d64/n" + std::to_string(n);
      benchmark::RegisterBenchmark((name + shape).c_str(), run, 64, n)->Unit(benchmark::kMillisecond);
    };
    add("noise/shared", four_heads<false, false>);
    add("noise/repeated", four_heads<true, false>);
    add("noise_backward/shared", four_heads<false, true>);
    add("noise_backward/repeated", four_heads<true, true>);
  }
  add_biases(64, 1920);
  // What one call at 131,072 keys takes beside its operands; once is enough.
  benchmark::RegisterBenchmark("memory/differential/float/causal/d64/n131072", differential<float, CausalMask>, 64,
                               131072)
      ->Iterations(1)
      ->Repetitions(1)
      ->Unit(benchmark::kMillisecond);
  return true;
}();

}  // namespace
