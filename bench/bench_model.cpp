// A whole model in the shape of kajuma/DiffLlama-0.3B-handcut: hidden 2,048, feed-forward 8,192, 16 differential heads
// with 4 key and value heads, vocabulary 128,256, head tied to the embedding; against the Transformer of the same
// template (32 heads, 8 key and value heads), which reads the very same weights. Two of its 16 layers, so that it fits
// any machine, and random weights: of float, of bfloat16 multiplied in float, and of bfloat16 multiplied in it, packed.
// Prefill is 512 tokens and the logits of the last; decode is one token after 512; decode_batch a token of each of 1,
// 4, 16 or 64 sequences, every one behind 512 of its own. `speedup` is against as many tokens one at a time, timed in
// turns with them.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "diffattn/core/random.hpp"
#include "diffattn/layers/arithmetic.hpp"
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

template <typename Attention, typename Stored, Arithmetic kArithmetic>
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
                                       .tied_head = true,
                                       .arithmetic = kArithmetic});
    visit_parameters(decoder, [](std::string_view name, auto& parameter) {
      if constexpr (std::is_same_v<std::remove_reference_t<decltype(parameter)>, FrozenMatrix>) {
        parameter = shared_weight<Stored>(std::string(name), parameter.rows(), parameter.cols());
      }
    });
    if (kArithmetic == Arithmetic::bfloat16) {
      for (auto& block : decoder.blocks) pack_weights(block);
    }
    return decoder;
  }();
  return instance;
}

template <typename Attention>
double weight_bytes(const Decoder<float, Attention>& decoder) {  // packed copies left out, which decoding does not read
  double bytes = 0;
  visit_parameters(decoder, [&](std::string_view /*name*/, const auto& parameter) {
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(parameter)>, FrozenMatrix>) {
      parameter.visit([&]<typename T>(const StridedView<const T>& view) {
        bytes += static_cast<double>(view.rows * view.cols) * sizeof(T);
      });
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

template <typename Attention, typename Stored, Arithmetic kArithmetic = Arithmetic::scalar>
void prefill(benchmark::State& state) {
  const auto& decoder = model<Attention, Stored, kArithmetic>();
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

template <typename Attention, typename Stored, Arithmetic kArithmetic = Arithmetic::scalar>
void decode(benchmark::State& state) {
  const auto& decoder = model<Attention, Stored, kArithmetic>();
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

/// Keys and values of kPrompt tokens, random: what they are makes no difference.
template <typename Attention>
DecoderCache<float> filled_cache(const Decoder<float, Attention>& decoder, SplitMix64& random) {
  DecoderCache<float> cache = decoder.make_cache({.reserve = kPrompt + 1});
  constexpr Index kKeyMaps = std::is_same_v<Attention, Differential> ? 2 : 1;
  const auto& config = decoder.blocks[0].attention.config();
  const Index d = config.head_dim, dv = kKeyMaps * d;
  Matrix<float> k(kPrompt, config.num_kv_heads * kKeyMaps * d), v(kPrompt, config.num_kv_heads * dv);
  Serial serial;
  for (KvCache<float>& layer : cache.layers) {
    for (Matrix<float>* part : {&k, &v}) {
      for (Index i = 0; i < part->size(); ++i) part->data()[i] = static_cast<float>(2 * random.unit() - 1);
    }
    layer.prepare<float>("bench", config.num_kv_heads, kKeyMaps, d, dv, kPrompt);
    layer.write(detail::view_of(k), detail::view_of(v), serial);
    layer.commit(kPrompt);
  }
  return cache;
}

/// A token of each of state.range(0) sequences.
template <typename Attention, typename Stored, Arithmetic kArithmetic = Arithmetic::scalar>
void decode_batch(benchmark::State& state) {
  const auto& decoder = model<Attention, Stored, kArithmetic>();
  const Index n = state.range(0);
  SplitMix64 random(1);
  std::vector<DecoderCache<float>> caches;
  for (Index i = 0; i < n; ++i) caches.push_back(filled_cache(decoder, random));
  std::vector<DecoderCache<float>*> batch;
  for (DecoderCache<float>& cache : caches) batch.push_back(&cache);
  const std::vector<Index> tokens(static_cast<std::size_t>(n), 17);
  Matrix<float> logits(n, 128256), alone(1, 128256);
  Workspace workspace;
  const auto step_back = [&] {
    for (DecoderCache<float>& cache : caches) cache.truncate(kPrompt);
  };
  decoder.logits_into(logits, tokens, batch, workspace);
  using Clock = std::chrono::steady_clock;
  Clock::duration together{}, one_by_one{};
  for (auto _ : state) {
    step_back();
    const auto start = Clock::now();
    decoder.logits_into(logits, tokens, batch, workspace);
    const auto elapsed = Clock::now() - start;
    together += elapsed;
    state.SetIterationTime(std::chrono::duration<double>(elapsed).count());
    step_back();
    const auto start_alone = Clock::now();
    const Index some = std::min<Index>(n, 4);  // the others would take as long
    for (Index i = 0; i < some; ++i) {
      decoder.logits_into(alone, std::span(tokens).first(1), caches[static_cast<std::size_t>(i)], workspace);
    }
    one_by_one += (Clock::now() - start_alone) * n / some;
  }
  using benchmark::Counter;
  state.counters["tokens/s"] = Counter(static_cast<double>(n), Counter::kIsIterationInvariantRate);
  state.counters["speedup"] =
      std::chrono::duration<double>(one_by_one).count() / std::chrono::duration<double>(together).count();
}

/// What one core reads of the same memory: the sum of the embedding.
void read_bandwidth(benchmark::State& state) {
  model<Differential, float, Arithmetic::scalar>().embedding.visit([&]<typename T>(const StridedView<const T>& view) {
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
  add("model/prefill/bfloat16_arithmetic/differential", prefill<Differential, Eigen::bfloat16, Arithmetic::bfloat16>);
  add("model/prefill/bfloat16_arithmetic/standard", prefill<Standard, Eigen::bfloat16, Arithmetic::bfloat16>);
  add("model/decode/float/differential", decode<Differential, float>);
  add("model/decode/float/standard", decode<Standard, float>);
  add("model/decode/bfloat16/differential", decode<Differential, Eigen::bfloat16>);
  add("model/decode/bfloat16/standard", decode<Standard, Eigen::bfloat16>);
  add("model/decode/bfloat16_arithmetic/differential", decode<Differential, Eigen::bfloat16, Arithmetic::bfloat16>);
  add("model/decode/bfloat16_arithmetic/standard", decode<Standard, Eigen::bfloat16, Arithmetic::bfloat16>);
  const auto add_batch = [](const char* name, void (*run)(benchmark::State&)) {
    auto* const bench = benchmark::RegisterBenchmark(name, run)->UseManualTime()->Unit(benchmark::kMillisecond);
    bench->MinTime(0.4)->Arg(1)->Arg(4)->Arg(16)->Arg(64);
  };
  add_batch("model/decode_batch/float/differential", decode_batch<Differential, float>);
  add_batch("model/decode_batch/float/standard", decode_batch<Standard, float>);
  add_batch("model/decode_batch/bfloat16/differential", decode_batch<Differential, Eigen::bfloat16>);
  add_batch("model/decode_batch/bfloat16/standard", decode_batch<Standard, Eigen::bfloat16>);
  add_batch("model/decode_batch/bfloat16_arithmetic/differential",
            decode_batch<Differential, Eigen::bfloat16, Arithmetic::bfloat16>);
  return true;
}();

}  // namespace
