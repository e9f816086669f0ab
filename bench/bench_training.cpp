// A whole training step of a decoder (embed_dim 512, 8 layers, 512 tokens): forward with a tape, cross-entropy,
// backward, clipping, AdamW; the Differential Transformer (4 heads of 64, values 128) against the Transformer of equal
// parameters (8 heads of 64), and against itself in plain Eigen, whose gradient is compared with ours before.
//
// Counted work: 6 FLOP for every weight of a matrix and token (forward, and two products backward), and for every
// visible pair of query and key and layer 4·embed_dim forward and 10·embed_dim backward, of which 2·embed_dim compute
// scores again. Norms, softmax, SwiGLU, loss, clipping and AdamW are not counted.

#include <benchmark/benchmark.h>

#include <cmath>
#include <optional>
#include <vector>

#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/training/adamw.hpp"
#include "diffattn/training/cross_entropy.hpp"
#include "diffattn/training/gradient_norm.hpp"
#include "support/plain_eigen_decoder.hpp"

namespace {

using namespace diffattn;

constexpr Index kEmbedDim = 512, kLayers = 8, kTokens = 512, kVocab = 256, kHidden = 1376, kHeads = 4;
constexpr double kMaxNorm = 1, kLearningRate = 1e-4;

std::vector<Index> token_ids(Index first) {
  std::vector<Index> ids;
  for (Index i = 0; i < kTokens; ++i) ids.push_back((first + i) * 37 % kVocab);
  return ids;
}

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
        logits_(kTokens, kVocab) {}

  const Decoder<float, Attention>& model() const { return model_; }
  const Decoder<float, Attention>& gradient() const { return gradient_; }

  void run() {
    differentiate();
    clip_gradient_norm(gradient_, kMaxNorm);
    optimizer_.step(model_, gradient_, kLearningRate);
  }

  /// Computes the gradient and returns the loss.
  double differentiate() {
    const Index whole[] = {kTokens};
    model_.logits_into(logits_, tokens_, whole, tape_, workspace_);
    const CrossEntropyLoss loss = cross_entropy_into(logits_, logits_, targets_, kIgnoreTarget, workspace_);
    set_zero(gradient_);
    model_.backward(logits_, tape_, gradient_, workspace_);
    return loss.mean;
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
  std::vector<Index> tokens_ = token_ids(0), targets_ = token_ids(1);
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

using Differential = Step<MultiheadDiffAttention<float>>;

/// Plain Eigen in the state in which ours begins; nothing unless both have the same loss and gradient there.
std::optional<bench::PlainTraining> checked_plain_training() {
  Differential ours(kHeads);
  bench::PlainTraining plain(ours.model(), token_ids(0), token_ids(1));
  const double difference = plain.differentiate() - ours.differentiate();
  if (!(std::abs(difference) < 1e-4) || !(bench::relative_difference(plain.gradient(), ours.gradient()) < 1e-4)) {
    return std::nullopt;
  }
  return plain;
}

void plain_eigen_step(benchmark::State& state) {
  static std::optional<bench::PlainTraining> training = checked_plain_training();
  if (!training) return state.SkipWithError("plain Eigen's loss or gradient is not ours");
  for (auto _ : state) training->step(kMaxNorm, kLearningRate);
  state.counters["FLOP/s"] = benchmark::Counter(Differential::flop(), benchmark::Counter::kIsIterationInvariantRate);
}

const bool registered = [] {
  benchmark::RegisterBenchmark("training/differential/float", training_step<MultiheadDiffAttention<float>>, kHeads)
      ->Unit(benchmark::kMillisecond);
  benchmark::RegisterBenchmark("training/standard/float", training_step<MultiheadAttention<float>>, 2 * kHeads)
      ->Unit(benchmark::kMillisecond);
  benchmark::RegisterBenchmark("training/plain_eigen/float", plain_eigen_step)->Unit(benchmark::kMillisecond);
  return true;
}();

}  // namespace
