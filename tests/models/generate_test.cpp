#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/models/generate.hpp>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace {

using diffattn::Decoder;
using diffattn::DecoderCache;
using diffattn::GenerateOptions;
using diffattn::Index;
using Model = Decoder<float, diffattn::MultiheadAttention<float>>;
using Tokens = std::vector<Index>;

const Model& model() {
  static const Model instance = [] {
    Model decoder({.vocab_size = 23,
                   .num_layers = 2,
                   .hidden_dim = 24,
                   .attention = {.embed_dim = 16, .num_heads = 2, .rotary = diffattn::RotaryConfig{}},
                   .seed = 3});
    decoder.embedding *= 50;
    return decoder;
  }();
  return instance;
}

std::string refusal(const GenerateOptions& options, const Tokens& prompt = {1}) {
  return support::thrown_by<std::invalid_argument>([&] { generate(model(), prompt, options); });
}

}  // namespace

TEST_CASE("Greedy text is the best token of the uncached logits, step by step", "[models][generate]") {
  const Tokens prompt = {3, 1, 4, 1, 5, 9, 2, 6};
  Tokens expected = prompt;
  for (int i = 0; i < 12; ++i) {
    Index best = 0;
    model().logits(expected).bottomRows(1).row(0).maxCoeff(&best);
    expected.push_back(best);
  }
  expected.erase(expected.begin(), expected.begin() + 8);
  CHECK(generate(model(), prompt, {.max_new_tokens = 12}) == expected);
  CHECK(generate(model(), prompt, {.max_new_tokens = 12, .prefill_chunk = 1}) == expected);
  CHECK(generate(model(), prompt, {.max_new_tokens = 12, .prefill_chunk = 3}) == expected);

  diffattn::ThreadPool pool(2);
  CHECK(generate(model(), prompt, {.max_new_tokens = 12}, pool) == expected);
  CHECK(generate(model(), {3, 1, 4, 1, 5, 9, 2, 6}, {.max_new_tokens = 12}, pool) == expected);

  // A cache goes on where it was, if it is given the last token, which is not in it yet.
  DecoderCache<float> cache(2);
  Tokens halves = generate(model(), prompt, {.max_new_tokens = 5}, cache);
  CHECK(cache.position() == 12);
  const Tokens rest = generate(model(), Tokens{halves.back()}, {.max_new_tokens = 7}, cache);
  halves.insert(halves.end(), rest.begin(), rest.end());
  CHECK(halves == expected);
}

TEST_CASE("Text under a mask is the best token under that mask, step by step", "[models][generate]") {
  const diffattn::SlidingWindowMask mask{3};
  const Tokens prompt = {3, 1, 4, 1, 5, 9, 2, 6};
  Tokens expected = prompt;
  for (int i = 0; i < 12; ++i) {
    Index best = 0;
    model().logits(expected, mask).bottomRows(1).row(0).maxCoeff(&best);
    expected.push_back(best);
  }
  expected.erase(expected.begin(), expected.begin() + 8);
  CHECK(expected != generate(model(), prompt, {.max_new_tokens = 12}));
  for (const Index chunk : {1, 3, 512}) {
    DecoderCache<float> cache = model().make_cache();
    CHECK(generate(model(), prompt, {.max_new_tokens = 12, .prefill_chunk = chunk}, cache, mask) == expected);
  }
}

TEST_CASE("A model that gives NaN is told so, and the cache is as before", "[models][generate]") {
  Model broken = model();
  broken.embedding(5, 3) = std::numeric_limits<float>::quiet_NaN();
  DecoderCache<float> cache(2);
  broken.logits({1, 2}, cache);
  CHECK(support::thrown_by<std::runtime_error>([&] {
          generate(broken, Tokens{3, 5}, {.max_new_tokens = 3}, cache);
        }).find("generate: at position 2 the logit of token 0 is NaN") == 0);
  CHECK(cache.position() == 2);
}

TEST_CASE("The seed fixes what is drawn", "[models][generate]") {
  const auto text = [](std::uint64_t seed) {
    return generate(model(), {1, 2, 3}, {.max_new_tokens = 30, .temperature = 2, .seed = seed});
  };
  CHECK(text(7) == text(7));
  CHECK(text(7) != text(8));
}

TEST_CASE("Generation ends at a stop token, when the callback says so, or where there is no room",
          "[models][generate]") {
  const Tokens prompt = {3, 1, 4, 1, 5};
  const Tokens free = generate(model(), prompt, {.max_new_tokens = 10});
  REQUIRE(free.size() == 10);
  const auto first = std::find(free.begin(), free.end(), free[4]);
  CHECK(generate(model(), prompt, {.max_new_tokens = 10, .stop_tokens = {22, free[4]}}) ==
        Tokens(free.begin(), first + 1));
  Tokens heard;
  GenerateOptions options{.max_new_tokens = 10};
  options.on_token = [&](Index token) { return heard.push_back(token), heard.size() < 3; };
  CHECK(generate(model(), prompt, options) == Tokens(free.begin(), free.begin() + 3));
  CHECK(heard == Tokens(free.begin(), free.begin() + 3));
  CHECK(generate(model(), prompt, {.max_new_tokens = 10, .max_length = 9}) == Tokens(free.begin(), free.begin() + 4));
  DecoderCache<float> cache(2, {.max_tokens = 9});
  CHECK(generate(model(), prompt, {.max_new_tokens = 10}, cache) == Tokens(free.begin(), free.begin() + 4));
  CHECK(generate(model(), prompt, {.max_new_tokens = 0}).empty());

  // What is in the cache already takes room, too.
  DecoderCache<float> begun(2, {.max_tokens = 9});
  model().logits({3, 1}, begun);
  CHECK(generate(model(), Tokens{4, 1, 5}, {.max_new_tokens = 10}, begun) == Tokens(free.begin(), free.begin() + 4));
}

TEST_CASE("Options that cannot be are refused by name, and the cache is as before", "[models][generate]") {
  CHECK(refusal({.max_new_tokens = -1}) == "generate: max_new_tokens must be at least 0, got -1");
  CHECK(refusal({.temperature = -1}) == "generate: temperature must be 0 or more, got -1.000000");
  CHECK(refusal({.temperature = std::numeric_limits<double>::quiet_NaN()}).find("temperature") != std::string::npos);
  CHECK(refusal({.top_k = 0}) == "generate: top_k must be at least 1, got 0");
  CHECK(refusal({.max_length = 0}) == "generate: max_length must be at least 1, got 0");
  CHECK(refusal({.top_p = 0}) == "generate: top_p must be more than 0 and at most 1, got 0.000000");
  CHECK(refusal({.top_p = 1.5}) == "generate: top_p must be more than 0 and at most 1, got 1.500000");
  CHECK(refusal({.repetition_penalty = 0}) == "generate: repetition_penalty must be positive, got 0.000000");
  CHECK(refusal({.prefill_chunk = 0}) == "generate: prefill_chunk must be at least 1, got 0");
  CHECK(refusal({}, {}) == "generate: the prompt is empty");
  CHECK(refusal({}, {1, 23}) == "Decoder: token 1 is 23, outside the vocabulary of 23");
  CHECK(refusal({.max_length = 2}, {1, 2, 3}) == "generate: the prompt has 3 tokens, there is room for 2");

  DecoderCache<float> cache(2, {.max_tokens = 4});
  model().logits({1, 2}, cache);
  CHECK(support::thrown_by<std::invalid_argument>([&] {
          generate(model(), Tokens{1, 2, 3}, {}, cache);
        }) == "Decoder: the cache holds at most 4 tokens and has 2, cannot append 3");
  GenerateOptions options;
  options.on_token = [](Index) -> bool { throw std::runtime_error("enough"); };
  CHECK_THROWS_AS(generate(model(), Tokens{1}, options, cache), std::runtime_error);
  CHECK(cache.position() == 2);
  options.on_token = [&](Index) -> bool {
    cache.clear();
    throw std::runtime_error("cleared");
  };
  CHECK_THROWS_AS(generate(model(), Tokens{1}, options, cache), std::runtime_error);
  CHECK(cache.position() == 0);
}

TEST_CASE("A thousand times the same text and the same logits behind it, on 1, 2, 3, 4 and 8 threads",
          "[models][generate][.]") {
  const Tokens prompt = {3, 1, 4, 1, 5, 9, 2, 6};
  const std::vector<Tokens> prompts = {prompt, {7}, {2, 2, 5}};
  const GenerateOptions options = {.max_new_tokens = 12, .temperature = 1.5, .seed = 5};
  DecoderCache<float> behind = model().make_cache();
  const Tokens expected = generate(model(), prompt, options, behind);
  const std::vector<Tokens> all_expected = generate(model(), prompts, options);
  const Tokens last = {expected.back()};
  diffattn::Matrix<float> logits(1, 23), again(1, 23);
  const auto logits_behind = [&](diffattn::Matrix<float>& to, DecoderCache<float>& cache, auto& executor) {
    diffattn::Workspace workspace;
    model().logits_into(to, last, cache, diffattn::CausalMask{}, workspace, executor);
  };
  diffattn::Serial serial;
  logits_behind(logits, behind, serial);
  for (const Index threads : {1, 2, 3, 4, 8}) {
    diffattn::ThreadPool pool(threads);
    for (int round = 0; round < 1000; ++round) {
      INFO(threads << " threads, round " << round);
      DecoderCache<float> cache = model().make_cache();
      REQUIRE(generate(model(), prompt, options, cache, pool) == expected);
      logits_behind(again, cache, pool);
      REQUIRE(again == logits);
      REQUIRE(generate(model(), prompts, options, pool) == all_expected);
    }
  }
}
