// Many texts at once: each is the one that its prompt gives alone.

#include <deque>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/models/generate.hpp>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

using namespace diffattn;
using TextModel = Decoder<float, MultiheadDiffAttention<float>>;
using Texts = std::vector<std::vector<Index>>;

const TextModel& text_model() {
  static const TextModel instance = [] {
    TextModel decoder({.vocab_size = 23,
                       .num_layers = 2,
                       .hidden_dim = 24,
                       .attention = {.embed_dim = 16, .num_heads = 2, .rotary = RotaryConfig{}},
                       .seed = 3});
    decoder.embedding *= 50;
    return decoder;
  }();
  return instance;
}

const Texts kBatchPrompts = {{3, 1, 4, 1, 5, 9, 2, 6}, {7}, {2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9}, {22, 0},
                             {1, 6, 1, 8, 0},          {7}};

/// Options that have nothing in common.
std::vector<GenerateOptions> options_of_each() {
  return {{.max_new_tokens = 12},
          {.max_new_tokens = 25, .temperature = 1, .top_k = 9, .seed = 4},
          {.max_new_tokens = 0},
          {.max_new_tokens = 30, .temperature = 2, .top_p = 0.8, .seed = 5, .prefill_chunk = 1},
          {.max_new_tokens = 9, .repetition_penalty = 1.5, .prefill_chunk = 2, .max_length = 11},
          {.max_new_tokens = 17, .temperature = 1, .top_k = 9, .seed = 6}};
}

Texts one_at_a_time(const Texts& prompts, const std::vector<GenerateOptions>& options) {
  Texts texts;
  for (std::size_t i = 0; i < prompts.size(); ++i) texts.push_back(generate(text_model(), prompts[i], options[i]));
  return texts;
}

template <typename Storage>
std::vector<DecoderCache<Storage>*> text_batch(std::deque<DecoderCache<Storage>>& caches) {
  std::vector<DecoderCache<Storage>*> pointers;
  for (auto& cache : caches) pointers.push_back(&cache);
  return pointers;
}

}  // namespace

TEST_CASE("Many texts at once are the texts of their prompts alone", "[models][generate][batch]") {
  const auto options = options_of_each();
  const Texts expected = one_at_a_time(kBatchPrompts, options);
  CHECK(generate(text_model(), kBatchPrompts, options) == expected);
  for (const Index workers : {1, 2, 3}) {
    ThreadPool pool(workers);
    CHECK(generate(text_model(), kBatchPrompts, options, pool) == expected);
  }
  CHECK(expected[2].empty());
  CHECK(expected[4].size() == 6);  // max_length

  // One for all of them, other integers, and no prompt at all.
  const GenerateOptions for_all{.max_new_tokens = 14, .temperature = 1.5, .seed = 9};
  const Texts same = one_at_a_time(kBatchPrompts, std::vector<GenerateOptions>(6, for_all));
  CHECK(generate(text_model(), kBatchPrompts, for_all) == same);
  CHECK(same[1] == same[5]);
  CHECK(generate(text_model(), kBatchPrompts, {.max_new_tokens = 14, .temperature = 1.5, .seed = 9}) == same);
  const std::vector<std::vector<int>> narrow = {{3, 1, 4, 1, 5, 9, 2, 6}, {7}};
  CHECK(generate(text_model(), narrow, for_all) == Texts(same.begin(), same.begin() + 2));
  CHECK(generate(text_model(), std::span(kBatchPrompts).first(1), for_all) == Texts{same[0]});
  CHECK(generate(text_model(), Texts{}).empty());
  CHECK(generate(text_model(), Texts{}, std::vector<GenerateOptions>{}).empty());
}

TEST_CASE("Texts of a batch end at their own stops and callbacks", "[models][generate][batch]") {
  const Texts free = one_at_a_time(kBatchPrompts, std::vector<GenerateOptions>(6, {.max_new_tokens = 20}));
  std::vector<GenerateOptions> options(6, GenerateOptions{.max_new_tokens = 20});
  options[0].stop_tokens = {22, free[0][4]};
  std::vector<std::vector<Index>> heard(6);
  for (std::size_t i = 1; i < 6; ++i) {
    options[i].on_token = [&heard, i](Index token) {
      heard[i].push_back(token);
      return heard[i].size() < 3 * i;
    };
  }
  const Texts texts = generate(text_model(), kBatchPrompts, options);
  heard.clear();
  heard.resize(6);
  CHECK(texts == one_at_a_time(kBatchPrompts, options));
  for (std::size_t i = 1; i < 6; ++i) CHECK(texts[i] == heard[i]);
  CHECK(texts[1].size() == 3);
  CHECK(texts[0].back() == options[0].stop_tokens[1]);
}

TEST_CASE("Texts of a batch go on behind caches of yours", "[models][generate][batch]") {
  const std::vector<GenerateOptions> options = options_of_each();
  std::deque<DecoderCache<float>> caches = {
      text_model().make_cache(),
      text_model().make_cache({.window = 5}),
      text_model().make_cache({.reserve = 100}),
      text_model().make_cache({.window = 300}),
      text_model().make_cache({.max_tokens = 40}),
      text_model().make_cache({.max_tokens = 12}),
  };
  for (std::size_t i = 0; i < 6; ++i) text_model().logits(std::vector<Index>(1 + i, 4), caches[i]);
  text_model().logits(std::vector<Index>(400, 6), caches[3]);
  auto alone = caches;
  const auto check = [&](const Texts& prompts, const auto& mask) {
    const Texts texts = generate(text_model(), prompts, options, text_batch(caches), mask);
    for (std::size_t i = 0; i < 6; ++i) {
      CHECK(texts[i] == generate(text_model(), prompts[i], options[i], alone[i], mask));
      CHECK(caches[i].position() == alone[i].position());
      CHECK(text_model().logits({2}, caches[i]).isApprox(text_model().logits({2}, alone[i]), 1e-4f));
    }
    return texts;
  };
  const Texts first = check(kBatchPrompts, CausalMask{});
  CHECK(first[5].size() == 5);  // what its cache has room for
  for (const std::size_t full : {std::size_t{4}, std::size_t{5}}) {
    caches[full].truncate(2);
    alone[full].truncate(2);
  }
  check(kBatchPrompts, SlidingWindowMask{4});
}

TEST_CASE("What a batch refuses it names, and all caches are as before", "[models][generate][batch]") {
  std::deque<DecoderCache<float>> caches(4, text_model().make_cache({.max_tokens = 12}));
  for (auto& cache : caches) text_model().logits({1, 2}, cache);
  const auto pointers = text_batch(caches);
  const Texts good = {{1, 2}, {3}, {4, 5}, {6}};
  const std::vector<GenerateOptions> usual(4);
  const auto refusal = [&](const Texts& prompts, const std::vector<GenerateOptions>& options, const auto& batch) {
    const std::string message =
        support::thrown_by<std::invalid_argument>([&] { generate(text_model(), prompts, options, batch); });
    for (const auto& cache : caches) CHECK(cache.position() == 2);
    return message;
  };
  const auto with = [&](std::size_t at, std::vector<Index> prompt) {
    Texts prompts = good;
    prompts[at] = std::move(prompt);
    return prompts;
  };
  const auto with_options = [&](std::size_t at, const GenerateOptions& changed) {
    auto options = usual;
    options[at] = changed;
    return options;
  };
  CHECK(refusal(with(3, {}), usual, pointers) == "generate: sequence 3: the prompt is empty");
  CHECK(refusal(with(3, {1, 23}), usual, pointers) ==
        "generate: sequence 3: token 1 is 23, outside the vocabulary of 23");
  CHECK(refusal(with(2, std::vector<Index>(11, 1)), usual, pointers) ==
        "generate: sequence 2: the cache holds at most 12 tokens and has 2, cannot append 11");
  CHECK(refusal(good, with_options(1, {.top_k = 0}), pointers) ==
        "generate: sequence 1: top_k must be at least 1, got 0");
  CHECK(refusal(good, with_options(2, {.temperature = -1}), pointers) ==
        "generate: sequence 2: temperature must be 0 or more, got -1.000000");
  CHECK(refusal(good, with_options(2, {.max_new_tokens = -2}), pointers) ==
        "generate: sequence 2: max_new_tokens must be at least 0, got -2");
  CHECK(refusal(good, with_options(2, {.max_length = 3}), pointers) ==
        "generate: sequence 2: the prompt has 2 tokens, there is room for 1");
  CHECK(refusal(good, std::vector<GenerateOptions>(3), pointers) ==
        "generate: there must be options for each of the 4 prompts, got 3");
  CHECK(refusal({{1}, {2}}, std::vector<GenerateOptions>(2), pointers) ==
        "generate: there must be a cache for each of the 2 prompts, got 4");
  auto twice = pointers;
  twice[2] = twice[1];
  CHECK(refusal(good, usual, twice) ==
        "generate: sequence 2: its cache is that of sequence 1 too; did you mean a fork() of it?");
  twice[2] = nullptr;
  CHECK(refusal(good, usual, twice) == "generate: sequence 2: its cache is a null pointer");
  DecoderCache<float> of_three(3);
  twice[2] = &of_three;
  CHECK(refusal(good, usual, twice) == "generate: sequence 2: the cache must have 2 layers, got 3");
  const TextModel other(
      {.vocab_size = 23, .num_layers = 2, .hidden_dim = 8, .attention = {.embed_dim = 8, .num_heads = 1}});
  auto of_other = other.make_cache();
  other.logits({1}, of_other);
  twice[2] = &of_other;
  CHECK_THROWS_AS(generate(text_model(), good, usual, twice), ShapeError);
  for (const auto& cache : caches) CHECK(cache.position() == 2);
}

TEST_CASE("A batch of texts leaves all caches as they were, whatever is thrown", "[models][generate][batch]") {
  std::deque<DecoderCache<float>> caches = {text_model().make_cache(), text_model().make_cache({.window = 20}),
                                            text_model().make_cache()};
  for (std::size_t i = 0; i < 3; ++i) text_model().logits(std::vector<Index>(250 + i, 4), caches[i]);
  const Texts prompts = {{1, 2, 3}, {4}, {5, 6}};
  std::vector<GenerateOptions> options(3, GenerateOptions{.max_new_tokens = 12, .temperature = 1, .seed = 2});
  auto untouched = caches;
  const Texts expected = generate(text_model(), prompts, options, text_batch(untouched));
  const auto check = [&] {
    for (std::size_t i = 0; i < 3; ++i) CHECK(caches[i].position() == static_cast<Index>(250 + i));
    auto forks = caches;
    CHECK(generate(text_model(), prompts, options, text_batch(forks)) == expected);
  };

  auto throwing = options;
  throwing[1].on_token = [heard = 0](Index) mutable -> bool {
    if (++heard == 7) throw std::runtime_error("enough");
    return true;
  };
  CHECK_THROWS_AS(generate(text_model(), prompts, throwing, text_batch(caches)), std::runtime_error);
  check();

  // A model that gives NaN to one of the sequences.
  TextModel broken = text_model();
  broken.embedding.row(6).setConstant(std::numeric_limits<float>::quiet_NaN());
  CHECK(support::thrown_by<std::runtime_error>([&] {
          generate(broken, prompts, options, text_batch(caches));
        }).find("is NaN") != std::string::npos);
  check();

  for (const auto failures : {support::Failures::one, support::Failures::all_later}) {
    const auto before = caches;
    const auto batch = text_batch(caches);
    Texts texts;
    const std::size_t failed =
        support::for_every_failing_allocation([&] { texts = generate(text_model(), prompts, options, batch); },
                                              [&](bool threw) {
                                                CHECK(threw);
                                                for (std::size_t i = 0; i < 3; ++i)
                                                  CHECK(caches[i].position() == static_cast<Index>(250 + i));
                                              },
                                              failures);
    CHECK((failed > 0) == support::fails_allocations());
    if (failed > 0) CHECK(texts == expected);
    for (std::size_t i = 0; i < 3; ++i) caches[i] = before[i];
    check();
  }
}
