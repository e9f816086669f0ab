// A whole training step of a decoder (embed_dim 512, 8 layers, 512 tokens): forward with a tape, cross-entropy,
// backward, clipping, AdamW; the Differential Transformer (4 heads of 64, values 128) against the Transformer of equal
// parameters (8 heads of 64).
//
// Counted work: 6 FLOP for every weight of a matrix and token (forward, and two products backward), and for every
// visible pair of query and key and layer 4·embed_dim forward and 10·embed_dim backward, of which 2·embed_dim compute
// scores again. Norms, softmax, SwiGLU, loss, clipping and AdamW are not counted.

#include <benchmark/benchmark.h>

#include <optional>
#include <vector>

#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/training/adamw.hpp"
#include "diffattn/training/cross_entropy.hpp"
#include "diffattn/training/gradient_norm.hpp"

namespace {

using namespace diffattn;

constexpr Index kEmbedDim = 512, kLayers = 8, kTokens = 512, kVocab = 256, kHidden = 1376, kHeads = 4;

template <typename Attention>
class Step {
 public:
  explicit Step(Index num_heads)
      : model_({.vocab_size = kVocab,
                .num_layers = kLayers,
                .hidden_dim = kHidden,
                .attention = {.embed_dim = kEmbedDim, .num_heads = num_heads, .rotary = RotaryConfig{}},
                .tied_head = true}),
        gradient_(zeros_like(model_)),
        optimizer_(model_),
        logits_(kTokens, kVocab) {
    for (Index i = 0; i < kTokens; ++i) {
      tokens_.push_back(i * 37 % kVocab);
      targets_.push_back((i + 1) * 37 % kVocab);
    }
  }

  void run() {
    const Index whole[] = {kTokens};
    model_.logits_into(logits_, tokens_, whole, tape_, workspace_);
    cross_entropy_into(logits_, logits_, targets_, kIgnoreTarget, workspace_);
    set_zero(gradient_);
    model_.backward(logits_, tape_, gradient_, workspace_);
    clip_gradient_norm(gradient_, 1.0);
    optimizer_.step(model_, gradient_, 1e-4);
  }

  static double flop() {
    const auto embed = static_cast<double>(kEmbedDim), tokens = static_cast<double>(kTokens);
    const double weights =
        static_cast<double>(kLayers) * (4 * embed * embed + 3 * embed * static_cast<double>(kHidden)) +
        static_cast<double>(kVocab) * embed;
    const double pairs = tokens * (tokens + 1) / 2;
    return 6 * weights * tokens + static_cast<double>(kLayers) * 14 * embed * pairs;
  }

 private:
  Decoder<float, Attention> model_, gradient_;
  AdamW<float> optimizer_;
  Matrix<float> logits_;
  std::vector<Index> tokens_, targets_;
  typename Decoder<float, Attention>::Tape tape_;
  Workspace workspace_;
};

/// Made when first asked for, and kept from one repetition to the next: it takes as long as several steps.
template <typename Attention>
void training_step(benchmark::State& state, Index num_heads) {
  static std::optional<Step<Attention>> step;
  if (!step) {
    step.emplace(num_heads);
    step->run();
  }
  for (auto _ : state) step->run();
  state.counters["FLOP/s"] = benchmark::Counter(Step<Attention>::flop(), benchmark::Counter::kIsIterationInvariantRate);
}

const bool registered = [] {
  benchmark::RegisterBenchmark("training/differential/float", training_step<MultiheadDiffAttention<float>>, kHeads)
      ->Unit(benchmark::kMillisecond);
  benchmark::RegisterBenchmark("training/standard/float", training_step<MultiheadAttention<float>>, 2 * kHeads)
      ->Unit(benchmark::kMillisecond);
  return true;
}();

}  // namespace
