// A whole model in the shape of kajuma/DiffLlama-0.3B-handcut: hidden 2,048, feed-forward 8,192, 16 differential heads
// with 4 key and value heads, vocabulary 128,256, head tied to the embedding; against the Transformer of the same
// template (32 heads, 8 key and value heads), which reads the very same weights. Two of its 16 layers, so that it fits
// any machine, and random weights. Prefill is 512 tokens and the logits of the last; decode is one token after 512.

#include <benchmark/benchmark.h>

#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "diffattn/core/random.hpp"
#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/models/decoder.hpp"
#include "support/peak.hpp"

namespace {

using namespace diffattn;

constexpr Index kLayers = 2, kPrompt = 512;

using Differential = MultiheadDiffAttention<float, FrozenMatrix>;
using Standard = MultiheadAttention<float, FrozenMatrix>;

/// The weight of a name, made once and shared by the models.
template <typename Stored>
const FrozenMatrix& shared_weight(const std::string& name, Index rows, Index cols) {
  static std::map<std::string, FrozenMatrix> weights;
  const auto found = weights.find(name);
  if (found != weights.end()) return found->second;
  SplitMix64 random(weights.size());
  const double bound = 1 / std::sqrt(static_cast<double>(cols));
  Matrix<Stored> values(rows, cols);
  for (Index i = 0; i < values.size(); ++i) {
    values.data()[i] = static_cast<Stored>(static_cast<float>(bound * (2 * random.unit() - 1)));
  }
  return weights.emplace(name, FrozenMatrix(std::move(values))).first->second;
}

template <typename Attention, typename Stored>
const Decoder<float, Attention>& model() {
  static const Decoder<float, Attention> instance = [] {
    constexpr Index kHeads = std::is_same_v<Attention, Differential> ? 16 : 32;
    Decoder<float, Attention> decoder({.vocab_size = 128256,
                                       .num_layers = kLayers,
                                       .hidden_dim = 8192,
                                       .attention = {.embed_dim = 2048,
                                                     .num_heads = kHeads,
                                                     .num_kv_heads = kHeads / 4,
                                                     .rotary = RotaryConfig{.base = 500000}},
                                       .tied_head = true});
    visit_parameters(decoder, [](std::string_view name, auto& parameter) {
      if constexpr (std::is_same_v<std::remove_reference_t<decltype(parameter)>, FrozenMatrix>) {
        parameter = shared_weight<Stored>(std::string(name), parameter.rows(), parameter.cols());
      }
    });
    return decoder;
  }();
  return instance;
}

template <typename Attention>
double weight_bytes(const Decoder<float, Attention>& decoder) {
  double bytes = 0;
  visit_parameters(decoder, [&](std::string_view /*name*/, const auto& parameter) {
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(parameter)>, FrozenMatrix>) {
      bytes += static_cast<double>(parameter.memory_bytes());
    }
  });
  return bytes;
}

/// Feeds tokens and computes the logits of the last.
template <typename Attention>
void feed(const Decoder<float, Attention>& decoder, const std::vector<Index>& tokens, DecoderCache<float>& cache,
          Matrix<float>& logits, Workspace& workspace) {
  const auto frame = workspace.frame();
  const Index n = static_cast<Index>(tokens.size()), width = decoder.embedding.cols();
  MatrixMap<float> x(workspace.take<float>(n * width), n, width);
  decoder.hidden_into(x, tokens, cache, workspace);
  decoder.head_into(logits, detail::rows_of(x, n - 1, 1), workspace);
}

std::vector<Index> prompt() {
  std::vector<Index> tokens;
  for (Index i = 0; i < kPrompt; ++i) tokens.push_back(i * 7919 % 128256);
  return tokens;
}

template <typename Attention, typename Stored>
void prefill(benchmark::State& state) {
  const auto& decoder = model<Attention, Stored>();
  DecoderCache<float> cache(kLayers, {.reserve = kPrompt});
  Matrix<float> logits(1, 128256);
  Workspace workspace;
  const auto tokens = prompt();
  for (auto _ : state) {
    cache.clear();
    feed(decoder, tokens, cache, logits, workspace);
  }
  const double n = kPrompt, width = 2048, head = static_cast<double>(decoder.embedding.size());
  const double products = 2 * n * (static_cast<double>(parameter_count(decoder)) - head) + 2 * head;
  const double attention = kLayers * 4 * width * n * (n + 1) / 2;
  using benchmark::Counter;
  state.counters["FLOP/s"] = Counter(products + attention, Counter::kIsIterationInvariantRate);
  state.counters["tokens/s"] = Counter(n, Counter::kIsIterationInvariantRate);
}

template <typename Attention, typename Stored>
void decode(benchmark::State& state) {
  const auto& decoder = model<Attention, Stored>();
  DecoderCache<float> cache(kLayers, {.reserve = kPrompt + 1});
  Matrix<float> logits(1, 128256);
  Workspace workspace;
  feed(decoder, prompt(), cache, logits, workspace);
  const double bytes = weight_bytes(decoder) + 2.0 * kLayers * 512 * kPrompt * sizeof(float);
  for (auto _ : state) {
    cache.truncate(kPrompt);
    feed(decoder, {17}, cache, logits, workspace);
  }
  using benchmark::Counter;
  state.counters["bytes/s"] = Counter(bytes, Counter::kIsIterationInvariantRate);
  state.counters["tokens/s"] = Counter(1, Counter::kIsIterationInvariantRate);
}

/// What one core reads of the same memory: the sum of the embedding.
void read_bandwidth(benchmark::State& state) {
  model<Differential, float>().embedding.visit([&]<typename T>(const StridedView<const T>& view) {
    if constexpr (std::is_same_v<T, float>) {
      const Index pieces = view.rows * view.cols / bench::kReadPiece;
      for (auto _ : state) {
        for (Index piece = 0; piece < pieces; ++piece) {
          benchmark::DoNotOptimize(bench::sum_of_piece(view.data + piece * bench::kReadPiece));
        }
      }
      state.counters["bytes/s"] = benchmark::Counter(static_cast<double>(pieces * bench::kReadPiece) * sizeof(float),
                                                     benchmark::Counter::kIsIterationInvariantRate);
    }
  });
}

const bool registered = [] {
  const auto add = [](const char* name, void (*run)(benchmark::State&)) {
    benchmark::RegisterBenchmark(name, run)->UseRealTime()->Unit(benchmark::kMillisecond)->MinTime(0.4);
  };
  add("peak/read_model", read_bandwidth);
  add("model/prefill/float/differential", prefill<Differential, float>);
  add("model/prefill/float/standard", prefill<Standard, float>);
  add("model/prefill/bfloat16/differential", prefill<Differential, Eigen::bfloat16>);
  add("model/prefill/bfloat16/standard", prefill<Standard, Eigen::bfloat16>);
  add("model/decode/float/differential", decode<Differential, float>);
  add("model/decode/float/standard", decode<Standard, float>);
  add("model/decode/bfloat16/differential", decode<Differential, Eigen::bfloat16>);
  add("model/decode/bfloat16/standard", decode<Standard, Eigen::bfloat16>);
  return true;
}();

}  // namespace
