// All of training together: a decoder that learns, stops, and goes on.

#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/io/checkpoint.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/batch_sampler.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <diffattn/training/gradient_norm.hpp>
#include <diffattn/training/learning_rate.hpp>
#include <vector>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "training/parameters.hpp"

namespace {

using diffattn::Index;
using Model = diffattn::Decoder<float, diffattn::MultiheadDiffAttention<float>>;

/// A decoder of 8 tokens that learns a sequence with a rule: the next token is three times the last, plus 1.
struct Training {
  explicit Training(Index threads)
      : model({.vocab_size = 8,
               .num_layers = 2,
               .hidden_dim = 24,
               .attention = {.embed_dim = 16, .num_heads = 1, .rotary = diffattn::RotaryConfig{}},
               .tied_head = true,
               .seed = 3}),
        optimizer(model, {.weight_decay = 0.1}),
        pool(threads) {
    for (int i = 1; i < 400; ++i) {
      tokens.push_back(static_cast<std::uint8_t>(i % 50 == 0 ? i / 50 % 8 : (3 * tokens.back() + 1) % 8));
    }
  }

  double steps(int count) {
    diffattn::BatchSampler<std::uint8_t> sampler(tokens, {.length = 20, .batch_size = 3, .seed = 7});
    sampler.drawn = drawn;
    diffattn::Batch batch;
    double loss = 0;
    for (int i = 0; i < count; ++i) {
      sampler.next(batch);
      diffattn::Matrix<float> logits(60, 8);
      model.logits_into(logits, batch.inputs, batch.lengths, tape, workspace, pool);
      loss = cross_entropy_into(logits, logits, batch.targets, diffattn::kIgnoreTarget, workspace, pool).mean;
      Model gradient = diffattn::zeros_like(model);
      model.backward(logits, tape, gradient, workspace, pool);
      diffattn::clip_gradient_norm(gradient, 1.0);
      optimizer.step(model, gradient, rate.at(optimizer.steps), pool);
    }
    drawn = sampler.drawn;
    return loss;
  }

  std::vector<std::uint8_t> tokens = {0};
  Model model;
  diffattn::AdamW<float> optimizer;
  diffattn::LearningRate rate{{.peak = 1e-2, .warmup_steps = 5, .total_steps = 80}};
  Model::Tape tape;
  diffattn::Workspace workspace;
  diffattn::ThreadPool pool;
  Index drawn = 0;
};

}  // namespace

TEST_CASE("A decoder learns, and resumes bit for bit, on any number of threads", "[training][decoder]") {
  const files::Scratch scratch;
  Training whole(1), first(2), resumed(4);
  const double before = whole.steps(1);
  CHECK(whole.steps(59) < 0.2 * before);

  first.steps(25);
  save_checkpoint(first.model, first.optimizer, scratch / "run.safetensors", {.windows_drawn = first.drawn});
  resumed.drawn = load_checkpoint(resumed.model, resumed.optimizer, scratch / "run.safetensors").windows_drawn;
  resumed.tape.recompute = true;
  resumed.steps(35);
  CHECK(same_parameters(resumed.model, whole.model));
  CHECK(same_parameters(resumed.optimizer, whole.optimizer));
  CHECK_FALSE(same_parameters(first.model, whole.model));
}
