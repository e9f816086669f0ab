// Prompts that ranks prefill together, and text behind them: equal to one rank, what is sent, and what goes wrong.

#include "diffattn/distributed/generate_over_ranks.hpp"

#include "diffattn/distributed/thread_communicator.hpp"
#include "distributed/prefill_cases.hpp"
#include "distributed/ranks.hpp"

namespace {

using diffattn::CacheParallel;
using diffattn::GenerateOptions;
using diffattn::Index;
using diffattn::ThreadCommunicator;
using prefill_cases::model;
using prefill_cases::prompt_of;
using prefill_cases::Tokens;

/// What each of `size` ranks says that calls f(communicator, rank).
template <typename F>
std::vector<std::string> errors_of(Index size, const F& f) {
  std::vector<std::string> errors(static_cast<std::size_t>(size));
  diffattn::run_ranks(size, [&](ThreadCommunicator& communicator) {
    const Index rank = communicator.rank();
    errors[static_cast<std::size_t>(rank)] = support::said_by([&] { f(communicator, rank); });
  });
  return errors;
}

}  // namespace

TEST_CASE("A prompt over ranks goes into their caches, and what follows is that of one", "[distributed]") {
  support::on_thread_ranks([](auto& communicator) { prefill_cases::layers_go_on(communicator); });
  support::on_thread_ranks([](auto& communicator) { prefill_cases::decoder_goes_on(communicator); });
}

TEST_CASE("Text over ranks is that of one", "[distributed]") {
  support::on_thread_ranks([](auto& communicator) { prefill_cases::texts(communicator); });
}

TEST_CASE("A prompt sends keys and values once, a token behind it dv + 4 numbers a head", "[distributed]") {
  const prefill_cases::Layer layer({.embed_dim = 32, .num_heads = 4, .num_kv_heads = 2, .head_dim = 8});
  constexpr Index kRows = 20, kDim = 8;
  diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
    diffattn::SequenceParallel prompt(communicator, kRows);
    diffattn::KvCache<double> cache;
    diffattn::Workspace workspace;
    const Index mine = prompt.placement().mine();
    diffattn::Matrix<double> x = diffattn::Matrix<double>::Ones(mine, 32), y = x;
    auto before = communicator.bytes_sent();
    layer.forward_into(y, x, cache, diffattn::CausalMask{}, workspace, prompt);
    const auto sent_for_prompt = communicator.bytes_sent() - before;
    CacheParallel ranks(communicator);
    ranks.prefilled(prompt.placement());
    std::uint64_t sent_for_token = 0;
    for (int token = 0; token < 2; ++token) {  // the first call agrees on the memory that all need
      ranks.feed(1);
      before = communicator.bytes_sent();
      layer.forward_into(y.topRows(1), x.topRows(1), cache, diffattn::CausalMask{}, workspace, ranks);
      sent_for_token = communicator.bytes_sent() - before;
    }
    if (communicator.rank() != 0) return;
    // Two key heads of two maps, and values; a check at either end, before the heads and behind each of them.
    const Index numbers = mine * 2 * (2 * kDim + 2 * kDim), checks = 3 * (2 + 1 + 2);
    CHECK(sent_for_prompt == static_cast<std::uint64_t>(numbers + checks) * 8);
    CHECK(sent_for_token == 4 * (2 * kDim + 4) * 8);
  });
}

TEST_CASE("Callbacks and stop tokens end a text on all ranks", "[distributed]") {
  const Tokens text = generate(model(), prompt_of(9), {.max_new_tokens = 6});
  std::vector<Tokens> seen(2);
  diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
    Tokens& mine = seen[static_cast<std::size_t>(communicator.rank())];
    CacheParallel ranks(communicator);
    const auto watch = [&](Index token) {
      mine.push_back(token);
      return mine.size() < 3;
    };
    support::expect(generate(model(), prompt_of(9), {.max_new_tokens = 6, .on_token = watch}, ranks).size() == 3, "3");
    const GenerateOptions stops{.max_new_tokens = 6, .stop_tokens = {text[0]}};
    support::expect(generate(model(), prompt_of(9), stops, ranks) == Tokens{text[0]}, "the stop token alone");
    support::expect(generate(model(), prompt_of(9), {.max_new_tokens = 0}, ranks).empty(), "no text");
  });
  for (const Tokens& mine : seen) CHECK(mine == Tokens(text.begin(), text.begin() + 3));
}

TEST_CASE("Ranks that disagree on a text are refused", "[distributed]") {
  const auto errors = [&](const auto& change, Tokens prompt = prompt_of(9)) {
    return errors_of(2, [&](ThreadCommunicator& communicator, Index rank) {
      CacheParallel ranks(communicator);
      GenerateOptions options{.max_new_tokens = 4};
      Tokens of_rank = prompt;
      if (rank == 1) change(of_rank, options);
      generate(model(), of_rank, options, ranks);
    });
  };
  using Errors = std::vector<std::string>;
  const auto both = [](const std::string& text) { return Errors{text, text}; };
  CHECK(errors([](Tokens& prompt, GenerateOptions&) { prompt[3] = 1; }) ==
        both("generate: ranks disagree on the prompt"));
  CHECK(errors([](Tokens& prompt, GenerateOptions&) { prompt.pop_back(); }) ==
        both("generate: ranks disagree on tokens of the prompt: rank 0 has 9, rank 1 has 8"));
  CHECK(errors([](Tokens&, GenerateOptions& options) { options.temperature = 0.5; }) ==
        both("generate: ranks disagree on temperature: rank 0 has 0, rank 1 has 0.5"));
  CHECK(errors([](Tokens&, GenerateOptions& options) { options.seed = 8; }) ==
        both("generate: ranks disagree on seed: rank 0 has 0, rank 1 has 8"));
  CHECK(errors([](Tokens&, GenerateOptions& options) { options.stop_tokens = {3}; }) ==
        both("generate: ranks disagree on stop_tokens"));
  CHECK(errors([](Tokens&, GenerateOptions& options) { options.on_token = [](Index) { return false; }; }) ==
        both("generate: ranks disagree on whether text goes on behind it: rank 0 has 1, rank 1 has 0"));
  const std::string token = "generate: token 0 is 23, outside the vocabulary of 23";
  CHECK(errors([](Tokens& prompt, GenerateOptions&) { prompt[0] = 23; }) == Errors{"rank 1: " + token, token});
  const std::string options = "generate: max_new_tokens must be at least 0, got -1";
  CHECK(errors([](Tokens&, GenerateOptions& how) { how.max_new_tokens = -1; }) ==
        Errors{"rank 1: " + options, options});
  CHECK(errors([](Tokens&, GenerateOptions&) {}, {}) == both("generate: the prompt is empty"));
}

TEST_CASE("Caches that are not those of the CacheParallel are refused", "[distributed]") {
  const auto errors = errors_of(2, [&](ThreadCommunicator& communicator, Index rank) {
    CacheParallel ranks(communicator);
    auto cache = model().make_cache(), other = cache;
    generate(model(), prompt_of(9), {.max_new_tokens = 4}, cache, ranks);
    generate(model(), prompt_of(2), {.max_new_tokens = 4}, rank == 0 ? cache : other, ranks);
  });
  CHECK(errors[1].find("into this rank's cache, got one that has 0; every sequence") != std::string::npos);
  CHECK(errors[0] == "rank 1: " + errors[1]);
  const auto without = errors_of(2, [&](ThreadCommunicator& communicator, Index) {
    CacheParallel ranks(communicator);
    ranks.feed(1);
    generate(model(), prompt_of(9), {}, ranks);
  });
  CHECK(without[0] == "generate: 1 tokens have been fed to the CacheParallel: pass the cache that they are in, too");
  const auto full = errors_of(2, [&](ThreadCommunicator& communicator, Index) {
    CacheParallel ranks(communicator);
    auto cache = model().make_cache({.max_tokens = 12});
    support::expect(generate(model(), prompt_of(9), {.max_new_tokens = 40}, cache, ranks).size() == 3, "3 tokens");
    generate(model(), prompt_of(2), {}, cache, ranks);
  });
  CHECK(full[0] == "generate: the caches hold at most 12 tokens together and have 11, cannot append 2");
}

TEST_CASE("A sequence over ranks is refused by a cache that holds something, and by a wrong placement",
          "[distributed]") {
  const auto held = errors_of(2, [&](ThreadCommunicator& communicator, Index rank) {
    diffattn::SequenceParallel rows(communicator, 6);
    auto cache = model().make_cache();
    if (rank == 1) model().logits({1, 2}, cache);
    diffattn::Matrix<double> logits(3, 23);
    diffattn::Workspace workspace;
    model().logits_into(logits, Tokens{1, 2, 3}, cache, diffattn::CausalMask{}, workspace, rows);
  });
  CHECK(held[1].find("goes into an empty cache, got one that has 2 tokens") != std::string::npos);
  CHECK(held[0] == "rank 1: " + held[1]);
  const auto placed = errors_of(2, [&](ThreadCommunicator& communicator, Index rank) {
    CacheParallel(communicator).prefilled(diffattn::SequencePlacement(9, 2, 1 - rank));
  });
  CHECK(placed[0] == "CacheParallel: the sequence must be placed as for rank 0 of 2, got rank 1 of 2");
  const auto twice = errors_of(2, [&](ThreadCommunicator& communicator, Index rank) {
    CacheParallel ranks(communicator);
    ranks.prefilled(diffattn::SequencePlacement(9, 2, rank));
    ranks.prefilled(diffattn::SequencePlacement(9, 2, rank));
  });
  CHECK(twice[0] == "CacheParallel: prefilled() is for empty caches, 9 tokens have been fed");
  const auto taken =
      errors_of(1, [&](ThreadCommunicator& communicator, Index) { CacheParallel(communicator).take_back(1); });
  CHECK(taken[0] == "CacheParallel: cannot take back to 1 tokens, 0 have been fed");
}

TEST_CASE("A callback that fails on one rank leaves all caches as they were", "[distributed]") {
  const Tokens prompt = prompt_of(9), expected = generate(model(), prompt, {.max_new_tokens = 6});
  std::vector<std::string> errors(3);
  diffattn::run_ranks(3, [&](ThreadCommunicator& communicator) {
    CacheParallel ranks(communicator);
    auto cache = model().make_cache();
    int calls = 0;
    const auto fails = [&](Index) -> bool {
      if (++calls == 3 && communicator.rank() == 1) throw std::runtime_error("no more");
      return true;
    };
    const GenerateOptions how{.max_new_tokens = 6, .on_token = fails};
    errors[static_cast<std::size_t>(communicator.rank())] =
        support::said_by([&] { generate(model(), prompt, how, cache, ranks); });
    support::expect(ranks.tokens() == 0 && cache.empty(), "caches as before");
    support::expect(generate(model(), prompt, {.max_new_tokens = 6}, cache, ranks) == expected, "the text");
  });
  CHECK(errors == std::vector<std::string>{"rank 1: no more", "no more", "rank 1: no more"});
}
