// Memory that is short at any moment: whole models, their caches, text and training steps. What is called again gives
// the same bits as if nothing had happened.

#include "support/failing_allocations.hpp"

#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/models/generate.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/batch_sampler.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <diffattn/training/gradient_norm.hpp>

#include "support/catch.hpp"
#include "support/parameters_of.hpp"
#include "support/random.hpp"
#include "support/tolerances.hpp"

namespace {

using namespace diffattn;
using support::Failures;
using support::identical;
using support::parameters_of;
using SmallModel = Decoder<float, MultiheadDiffAttention<float>>;
using Tokens = std::vector<Index>;

// A name like layers.0.post_attention_layernorm.weight is too long for the string object itself: visiting allocates.
SmallModel small_model() {
  return SmallModel({.vocab_size = 11,
                     .num_layers = 2,
                     .hidden_dim = 12,
                     .attention = {.embed_dim = 16, .num_heads = 2, .rotary = RotaryConfig{.table_positions = 4}},
                     .seed = 5});
}

Tokens tokens_of(Index count, Index first = 0) {
  Tokens tokens;
  for (Index i = 0; i < count; ++i) tokens.push_back((first + i) * 7 % 11);
  return tokens;
}

void require_failures(std::size_t failed) { CHECK((failed > 0) == support::fails_allocations()); }

template <typename Storage>
void check_text(const KvCacheOptions& options, Index before, const GenerateOptions& how, Failures failures) {
  INFO("window " << options.window.value_or(0) << ", behind " << before << " tokens");
  const SmallModel model = small_model();
  const Tokens prompt = tokens_of(30, 3), next = {1, 2};
  DecoderCache<Storage> cache(2, options), untouched(2, options);
  if (before != 0) {
    model.logits(tokens_of(before), cache);
    model.logits(tokens_of(before), untouched);
  }
  const auto what_follows = [&](const DecoderCache<Storage>& from) {
    DecoderCache<Storage> fork = from.fork();
    return model.logits(next, fork);
  };
  const Matrix<float> follows = what_follows(untouched);
  const Tokens text = generate(model, prompt, how, untouched);
  Tokens again;
  require_failures(support::for_every_failing_allocation([&] { again = generate(model, prompt, how, cache); },
                                                         [&](bool threw) {
                                                           CHECK(threw);
                                                           CHECK(cache.position() == before);
                                                           CHECK(identical(what_follows(cache), follows));
                                                         },
                                                         failures));
  if (!support::fails_allocations()) again = generate(model, prompt, how, cache);
  CHECK(again == text);
  CHECK(cache.position() == untouched.position());
  CHECK(identical(what_follows(cache), what_follows(untouched)));
}

template <typename Storage>
void check_cached_logits(const KvCacheOptions& options, Index before, Index count, Failures failures) {
  const SmallModel model = small_model();
  const Tokens next = tokens_of(count, 5);
  DecoderCache<Storage> cache(2, options), untouched(2, options);
  model.logits(tokens_of(before), cache);
  model.logits(tokens_of(before), untouched);
  const Matrix<float> expected = model.logits(next, untouched);
  Matrix<float> logits;
  require_failures(support::for_every_failing_allocation([&] { logits = model.logits(next, cache); },
                                                         [&](bool threw) {
                                                           CHECK(threw);
                                                           for (const KvCache<Storage>& layer : cache.layers)
                                                             CHECK(layer.position() == before);
                                                           DecoderCache<Storage> fork = cache.fork();
                                                           CHECK(identical(model.logits(next, fork), expected));
                                                         },
                                                         failures));
  if (!support::fails_allocations()) logits = model.logits(next, cache);
  CHECK(identical(logits, expected));
  CHECK(cache.memory_bytes() <= untouched.memory_bytes() + (std::size_t{1} << 18));
  CHECK(identical(model.logits(next, cache), model.logits(next, untouched)));
}

}  // namespace

TEST_CASE("A model is made, or is not, when memory is short", "[models]") {
  const std::vector<double> expected = parameters_of(small_model());
  for (const Failures failures : {Failures::one, Failures::all_later}) {
    std::optional<SmallModel> model;
    require_failures(support::for_every_failing_allocation([&] { model.emplace(small_model()); },
                                                           [&](bool threw) {
                                                             CHECK(threw);
                                                             CHECK(!model);
                                                           },
                                                           failures));
    if (model) CHECK(parameters_of(*model) == expected);
  }
}

TEST_CASE("Logits behind a cache leave it as it was when there is no memory", "[models][cache]") {
  for (const Failures failures : {Failures::one, Failures::all_later}) {
    check_cached_logits<float>({}, 250, 1, failures);
    check_cached_logits<float>({}, 255, 300, failures);
    check_cached_logits<float>({.window = 30}, 500, 290, failures);  // each layer drops pages
    check_cached_logits<Eigen::bfloat16>({.window = 30}, 255, 300, failures);
    check_cached_logits<Eigen::half>({}, 300, 3, failures);
  }
}

TEST_CASE("Text leaves a cache as it was when there is no memory", "[models][generate]") {
  GenerateOptions greedy{.max_new_tokens = 20, .prefill_chunk = 13};
  GenerateOptions drawn{.max_new_tokens = 20,
                        .temperature = 1,
                        .top_k = 8,
                        .top_p = 0.9,
                        .repetition_penalty = 1.2,
                        .stop_tokens = {99},
                        .seed = 3};
  drawn.on_token = [](Index token) { return std::vector<Index>(3, token).size() == 3; };
  for (const Failures failures : {Failures::one, Failures::all_later}) {
    check_text<float>({}, 0, greedy, failures);
    check_text<float>({}, 240, drawn, failures);  // into the next page
    check_text<float>({.window = 20}, 500, drawn, failures);
    check_text<Eigen::bfloat16>({.window = 20}, 250, greedy, failures);
    check_text<Eigen::half>({}, 250, greedy, failures);
  }
}

TEST_CASE("A training step leaves model and optimizer as they were when there is no memory", "[models][training]") {
  const SmallModel start = small_model();
  const Tokens corpus = tokens_of(300);
  const BatchSamplerConfig batches{.length = 12, .batch_size = 3, .seed = 2};

  // What a step gives when nothing fails.
  SmallModel expected = start, gradient = zeros_like(start);
  AdamW<float> optimizer(expected);
  BatchSampler<Index> sampler(corpus, batches);
  Batch batch;
  sampler.next(batch);
  SmallModel::Tape tape;
  Matrix<float> logits = expected.logits(batch.inputs, batch.lengths, tape), dlogits = logits;
  Workspace workspace;
  cross_entropy_into(dlogits, logits, batch.targets, kIgnoreTarget, workspace);
  expected.backward(dlogits, tape, gradient);
  const SmallModel unclipped = gradient;
  const double norm = clip_gradient_norm(gradient, 0.1);
  REQUIRE(norm > 0.1);
  optimizer.step(expected, gradient);

  for (const Failures failures : {Failures::one, Failures::all_later}) {
    BatchSampler<Index> other_sampler(corpus, batches);
    Batch other_batch;
    require_failures(support::for_every_failing_allocation([&] { other_sampler.next(other_batch); },
                                                           [&](bool threw) {
                                                             CHECK(threw);
                                                             CHECK(other_sampler.drawn == 0);
                                                           },
                                                           failures));
    if (!support::fails_allocations()) other_sampler.next(other_batch);
    CHECK(other_batch.inputs == batch.inputs);

    for (const bool recompute : {false, true}) {
      SmallModel::Tape other;
      other.recompute = recompute;
      Matrix<float> again;
      require_failures(
          support::for_every_failing_allocation([&] { again = start.logits(batch.inputs, batch.lengths, other); },
                                                [&](bool threw) {
                                                  CHECK(threw);
                                                  CHECK(!other.filled);
                                                },
                                                failures));
      if (!support::fails_allocations()) again = start.logits(batch.inputs, batch.lengths, other);
      CHECK(identical(again, logits));
      require_failures(support::for_every_failing_allocation(
          [&] {
            SmallModel unused = zeros_like(start);
            start.backward(dlogits, other, unused);
          },
          [&](bool threw) { CHECK(threw); }, failures));
      SmallModel from_same_tape = zeros_like(start);
      start.backward(dlogits, other, from_same_tape);
      CHECK(parameters_of(from_same_tape) == parameters_of(unclipped));
    }

    SmallModel clipped = unclipped;
    const std::vector<double> before_clip = parameters_of(unclipped);
    require_failures(support::for_every_failing_allocation([&] { clip_gradient_norm(clipped, 0.1); },
                                                           [&](bool threw) {
                                                             CHECK(threw);
                                                             CHECK(parameters_of(clipped) == before_clip);
                                                           },
                                                           failures));
    if (!support::fails_allocations()) clip_gradient_norm(clipped, 0.1);
    CHECK(parameters_of(clipped) == parameters_of(gradient));

    SmallModel model = start;
    std::optional<AdamW<float>> made;
    require_failures(support::for_every_failing_allocation([&] { made.emplace(model); },
                                                           [&](bool threw) { CHECK(threw); }, failures));
    if (!made) made.emplace(model);
    const std::vector<double> before = parameters_of(model), moments = parameters_of(*made);
    require_failures(support::for_every_failing_allocation([&] { made->step(model, gradient); },
                                                           [&](bool threw) {
                                                             CHECK(threw);
                                                             CHECK(made->steps == 0);
                                                             CHECK(parameters_of(model) == before);
                                                             CHECK(parameters_of(*made) == moments);
                                                           },
                                                           failures));
    if (!support::fails_allocations()) made->step(model, gradient);
    CHECK(parameters_of(model) == parameters_of(expected));
    CHECK(parameters_of(*made) == parameters_of(optimizer));
  }
}
