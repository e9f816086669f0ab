#include <cmath>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <diffattn/training/gradient_norm.hpp>
#include <vector>

#include "support/catch.hpp"

namespace {

using diffattn::Index;
using Attention = diffattn::MultiheadDiffAttention<float>;
using Model = diffattn::Decoder<float, Attention>;

/// Does everything itself, as so many workers in turn, and counts how often threads would have been woken.
struct CountingExecutor {
  Index workers;
  Index runs = 0;

  Index concurrency() const { return workers; }
  template <typename Task>
  void run(Index count, Task&& task) {
    if (count > 1) ++runs;
    for (Index index = count; index-- > 0;) task(index, index % workers);  // in an order of its own
  }
};

struct Step {
  std::vector<float> parameters;
  double norm = 0;
  Index runs = 0;
};

/// One step on four sequences of `length` tokens, by `workers` workers.
Step train_once(Index workers, Index length) {
  Model model({.vocab_size = 48,
               .num_layers = 2,
               .hidden_dim = 80,
               .attention = {.embed_dim = 64, .num_heads = 2, .rotary = diffattn::RotaryConfig{}},
               .tied_head = true,
               .seed = 3});
  Model gradient = model;  // not zero before
  diffattn::AdamW<float> optimizer(model);
  const std::vector<Index> lengths(4, length);
  std::vector<Index> tokens, targets;
  for (Index i = 0; i < 4 * length; ++i) {
    tokens.push_back(i * i % 48);
    targets.push_back((i + 1) * (i + 1) % 48);
  }
  CountingExecutor executor{workers};
  diffattn::Workspace workspace;
  Model::Tape tape;
  diffattn::Matrix<float> logits(4 * length, 48);
  model.logits_into(logits, tokens, lengths, tape, workspace, executor);
  cross_entropy_into(logits, logits, targets, diffattn::kIgnoreTarget, workspace, executor);
  set_zero(gradient, executor);
  model.backward(logits, tape, gradient, workspace, executor);
  Step step;
  step.norm = clip_gradient_norm(gradient, 0.01, executor);
  optimizer.step(model, gradient, 1e-2, executor);
  step.runs = executor.runs;
  visit_parameters(model, [&](std::string_view, const auto& p) {
    step.parameters.insert(step.parameters.end(), p.data(), p.data() + p.size());
  });
  return step;
}

}  // namespace

TEST_CASE("A training step is bitwise the same for any number of workers", "[training][training_step]") {
  const Index length = GENERATE(7, 50);
  const Step alone = train_once(1, length);
  CHECK(std::isfinite(alone.norm));
  CHECK(alone.norm > 0.01);  // clipped
  for (const Index workers : {2, 3, 4, 8}) {
    INFO(workers << " workers, sequences of " << length);
    const Step step = train_once(workers, length);
    CHECK(step.norm == alone.norm);
    CHECK(step.parameters == alone.parameters);
  }
}

// Waking threads costs 5 to 20 microseconds, so often a millisecond was lost that two runs for every product took a
// third of what a second core gives.
TEST_CASE("A training step wakes its threads a few times a layer", "[training][training_step]") {
  CHECK(train_once(2, 50).runs <= 2 * 21 + 10);
  CHECK(train_once(4, 50).runs <= 2 * 21 + 10);
}
