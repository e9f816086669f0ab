// Memory that is short on one rank, at any moment: an error on all of them, which are as far as each other afterwards.

#include <diffattn/distributed/data_parallel.hpp>
#include <diffattn/distributed/thread_communicator.hpp>
#include <optional>

#include "distributed/prefill_cases.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"

namespace {

using diffattn::CacheParallel;
using diffattn::CausalMask;
using diffattn::Index;
using diffattn::Matrix;
using diffattn::SequenceParallel;
using diffattn::ThreadCommunicator;
using diffattn::Workspace;
using prefill_cases::model;
using prefill_cases::prompt_of;

constexpr Index kRows = 12;

/// Calls f(communicator, attempt) on two ranks, in which attempt(call) calls call() with the k-th allocation of rank 1
/// failing, for k = 1, 2, … until it asks for fewer.
template <typename F>
void lack_memory(const F& f) {
  if (!support::fails_allocations()) return;
  for (std::size_t k = 1;; ++k) {
    INFO("allocation " << k);
    std::vector<std::string> said(2);
    bool failed = false;
    diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
      const auto attempt = [&](const auto& call) {
        std::string& mine = said[static_cast<std::size_t>(communicator.rank())];
        std::optional<support::FailingAllocation> failing;
        if (communicator.rank() == 1) failing.emplace(k);
        mine = support::said_by(call);
        if (failing) failed = failing->failed();
        return mine.empty();
      };
      f(communicator, attempt);
      diffattn::check_on_all(communicator, "afterwards", [](auto& agreed) { agreed.add("all ranks here", 1); });
    });
    if (!failed) {
      CHECK(said == std::vector<std::string>(2));
      CHECK(k > 1);
      return;
    }
    REQUIRE(said == std::vector<std::string>{"rank 1: std::bad_alloc", "std::bad_alloc"});
  }
}

}  // namespace

TEST_CASE("A kernel over ranks, one of which lacks memory", "[distributed]") {
  const Matrix<double> all = Matrix<double>::Constant(kRows, 8, 0.25);
  lack_memory([&](ThreadCommunicator& communicator, const auto& attempt) {
    SequenceParallel ranks(communicator, kRows);
    const Matrix<double> x = ranks.placement().rows_of(all);
    Matrix<double> out(x.rows(), 8), gathered;
    attempt([&] {
      Workspace workspace;
      multihead_diff_attention_into(out, x, x, x, 0.5, {2, 2}, CausalMask{}, {}, workspace, ranks);
      diff_attention_into(out, x, x, x, x, x, 0.5, CausalMask{}, {}, workspace, ranks);
      gathered = ranks.gather(out);
    });
  });
}

TEST_CASE("A layer over ranks, one of which lacks memory", "[distributed]") {
  const auto& layer = model().blocks[0].attention;
  lack_memory([&](ThreadCommunicator& communicator, const auto& attempt) {
    SequenceParallel ranks(communicator, kRows);
    const Matrix<double> x = Matrix<double>::Ones(ranks.placement().mine(), 16);
    Matrix<double> y = x, dx = x;
    auto gradient = diffattn::zeros_like(layer);
    attempt([&] {
      Workspace workspace;
      diffattn::KvCache<double> cache;
      prefill_cases::Layer::Tape tape;
      layer.forward_into(y, x, CausalMask{}, tape, workspace, ranks);
      layer.backward_into(dx, y, tape, gradient, workspace, ranks);
      layer.forward_into(y, x, cache, CausalMask{}, workspace, ranks);
      sum_gradients(communicator, gradient);
    });
  });
}

TEST_CASE("A decoder over ranks, one of which lacks memory", "[distributed]") {
  const auto tokens = prompt_of(kRows);
  lack_memory([&](ThreadCommunicator& communicator, const auto& attempt) {
    SequenceParallel ranks(communicator, kRows);
    const auto mine = ranks.placement().elements_of(tokens);
    Matrix<double> logits(ranks.placement().mine(), 23);
    auto gradient = diffattn::zeros_like(model());
    auto cache = model().make_cache();
    const bool good = attempt([&] {
      Workspace workspace;
      prefill_cases::Model::Tape tape;
      model().logits_into(logits, mine, {kRows / 2}, tape, workspace, ranks);
      model().backward(logits, tape, gradient, workspace, ranks);
      model().logits_into(logits, mine, cache, CausalMask{}, workspace, ranks);
    });
    support::expect(cache.empty() != good, "a cache as before, or with all rows");
  });
}

TEST_CASE("Text over ranks, one of which lacks memory", "[distributed]") {
  const auto tokens = prompt_of(kRows);
  const auto expected = generate(model(), tokens, {.max_new_tokens = 3});
  lack_memory([&](ThreadCommunicator& communicator, const auto& attempt) {
    CacheParallel ranks(communicator);
    auto cache = model().make_cache();
    diffattn::GenerateOptions options{.max_new_tokens = 3};
    prefill_cases::Tokens text;
    if (attempt([&] { text = generate(model(), tokens, options, cache, ranks); })) {
      return support::expect(text == expected, "the text");
    }
    support::expect(cache.empty() && ranks.tokens() == 0, "a cache as before");
    support::expect(generate(model(), tokens, options, cache, ranks) == expected, "the text the second time");
  });
}

TEST_CASE("A cache over ranks, one of which lacks memory", "[distributed]") {
  const auto tokens = prompt_of(3);
  const Matrix<double> expected = model().logits(tokens);
  lack_memory([&](ThreadCommunicator& communicator, const auto& attempt) {
    CacheParallel ranks(communicator);
    auto cache = model().make_cache();
    Matrix<double> logits(3, 23);
    {  // the head, behind the last exchange, finds all that it needs
      auto other = model().make_cache();
      Workspace workspace;
      CacheParallel before(communicator);
      before.feed(3);
      model().logits_into(logits, tokens, other, CausalMask{}, workspace, before);
      logits.setZero();
      attempt([&] {
        ranks.feed(3);
        model().logits_into(logits, tokens, cache, CausalMask{}, workspace, ranks);
      });
    }
    if (logits.isZero(0)) {
      ranks.take_back();
      ranks.feed(3);
      Workspace workspace;
      model().logits_into(logits, tokens, cache, CausalMask{}, workspace, ranks);
    }
    prefill_cases::expect_close(logits, expected, 1e-10, "logits");
  });
}
