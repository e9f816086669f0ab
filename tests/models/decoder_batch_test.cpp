// Logits of many sequences at once: each gives what it gives alone, and all keep what they were fed, or none.

#include <array>
#include <deque>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <diffattn/models/decoder.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

using namespace diffattn;
using support::identical;

template <typename Attention>
Decoder<float, Attention> batch_model() {
  return Decoder<float, Attention>(
      {.vocab_size = 19,
       .num_layers = 3,
       .hidden_dim = 20,
       .attention = {.embed_dim = 16, .num_heads = 2, .num_kv_heads = 1, .rotary = RotaryConfig{}},
       .seed = 4});
}
using BatchModel = Decoder<float, MultiheadDiffAttention<float>>;

std::vector<Index> batch_tokens(Index count, Index first) {
  std::vector<Index> tokens;
  for (Index i = 0; i < count; ++i) tokens.push_back((first + 5 * i) % 19);
  return tokens;
}

template <typename Storage = float, typename Model>
std::deque<DecoderCache<Storage>> batch_of_caches(const Model& model, Index count) {
  const std::array<KvCacheOptions, 4> options = {
      KvCacheOptions{}, {.window = 20}, {.reserve = 300, .max_tokens = 400}, {.window = 260}};
  const std::array<Index, 4> lengths = {255, 0, 3, 300};
  std::deque<DecoderCache<Storage>> caches;
  for (Index i = 0; i < count; ++i) {
    caches.push_back(model.template make_cache<Storage>(options[static_cast<std::size_t>(i % 4)]));
    const Index length = lengths[static_cast<std::size_t>(i % 4)];
    if (length != 0) model.logits(batch_tokens(length, i), caches.back());
  }
  return caches;
}

template <typename Storage>
std::vector<DecoderCache<Storage>*> pointers_to(std::deque<DecoderCache<Storage>>& caches) {
  std::vector<DecoderCache<Storage>*> pointers;
  for (auto& cache : caches) pointers.push_back(&cache);
  return pointers;
}

template <typename Storage>
bool are_at(const std::deque<DecoderCache<Storage>>& caches, const std::deque<DecoderCache<Storage>>& before) {
  for (std::size_t i = 0; i < caches.size(); ++i) {
    for (const auto& layer : caches[i].layers) {
      if (layer.position() != before[i].position()) return false;
    }
  }
  return true;
}

/// Gives up at the run with this number.
struct DecoderFailingExecutor {
  Index fails_at;
  Index runs = 0;

  static Index concurrency() { return 1; }
  template <typename Task>
  void run(Index count, Task&& task) {
    if (runs++ == fails_at) throw std::runtime_error("gave up");
    Serial::run(count, task);
  }
};

}  // namespace

TEMPLATE_TEST_CASE("Logits of many sequences are those of each alone", "[models][batch]", MultiheadAttention<float>,
                   MultiheadDiffAttention<float>, MultiheadDiffAttentionV2<float>) {
  const auto model = batch_model<TestType>();
  ThreadPool one(1), two(2), three(3);
  auto caches = batch_of_caches(model, 4), alone = caches, in_pools = caches;
  const auto batch = pointers_to(caches), pool_batch = pointers_to(in_pools);
  for (Index step = 0; step < 6; ++step) {
    const auto tokens = batch_tokens(4, step);
    const Matrix<float> logits = model.logits(tokens, batch);
    for (Index i = 0; i < 4; ++i) {
      CHECK(identical(Matrix<float>(logits.row(i)),
                      model.logits({tokens[static_cast<std::size_t>(i)]}, alone[static_cast<std::size_t>(i)])));
    }
    ThreadPool& pool = step % 3 == 0 ? one : step % 3 == 1 ? two : three;
    CHECK(identical(model.logits(tokens, pool_batch, pool), logits));
  }
  CHECK(are_at(caches, alone));

  // More of them are rounded otherwise than one, and like each other.
  auto many = batch_of_caches(model, 9), again = many;
  auto some = std::deque<DecoderCache<float>>(again.begin(), again.begin() + 6);
  const auto tokens = batch_tokens(9, 2);
  const Matrix<float> logits = model.logits(tokens, pointers_to(many), three);
  const Matrix<float> of_some = model.logits(std::span(tokens).first(6), pointers_to(some));
  CHECK(identical(Matrix<float>(logits.topRows(6)), of_some));
  for (std::size_t i = 0; i < 9; ++i) {
    CHECK(logits.row(static_cast<Index>(i)).isApprox(model.logits({tokens[i]}, again[i]), 1e-4f));
  }
}

TEST_CASE("Logits of many sequences under a mask, and from narrow caches", "[models][batch]") {
  const auto model = batch_model<MultiheadDiffAttention<float>>();
  const auto mask = with_bias(SlidingWindowMask{25}, AlibiBias{alibi_slopes(2)});
  auto caches = batch_of_caches<Eigen::bfloat16>(model, 4), alone = caches;
  const auto tokens = batch_tokens(4, 1);
  const Matrix<float> logits = model.logits(tokens, pointers_to(caches), mask);
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(identical(Matrix<float>(logits.row(static_cast<Index>(i))),
                    model.logits(std::span(tokens).subspan(i, 1), alone[i], mask)));
  }
  CHECK(model.logits(std::vector<Index>{}, std::vector<DecoderCache<float>*>{}).rows() == 0);
}

TEST_CASE("Logits of many sequences refuse what does not fit in the name of the sequence", "[models][batch]") {
  const auto model = batch_model<MultiheadDiffAttention<float>>();
  const Decoder<float, MultiheadDiffAttention<float>> wider(
      {.vocab_size = 19, .num_layers = 3, .hidden_dim = 20, .attention = {.embed_dim = 32, .num_heads = 2}});
  auto caches = batch_of_caches(model, 5);
  const auto before = caches;
  auto full = model.make_cache({.max_tokens = 2}), of_wider = wider.make_cache(), of_two = DecoderCache<float>(2);
  model.logits({1, 2}, full);
  wider.logits({1, 2}, of_wider);
  auto batch = pointers_to(caches);
  const auto refusal = [&](std::size_t at, DecoderCache<float>* cache, std::vector<Index> tokens = {1, 2, 3, 4, 5}) {
    auto changed = batch;
    changed[at] = cache;
    std::string message;
    try {
      model.logits(tokens, changed);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    CHECK(are_at(caches, before));
    CHECK(full.position() == 2);
    return message;
  };
  CHECK(refusal(3, batch[3], {1, 2, 3, 19, 5}) == "Decoder: sequence 3: token 0 is 19, outside the vocabulary of 19");
  CHECK(refusal(3, batch[3], {1, 2, 3, -1, 5}) == "Decoder: sequence 3: token 0 is -1, outside the vocabulary of 19");
  CHECK(refusal(4, &full) == "Decoder: sequence 4: the cache holds at most 2 tokens and has 2, cannot append 1");
  CHECK(refusal(2, &of_two) == "Decoder: sequence 2: the cache must have 3 layers, got 2");
  CHECK(refusal(1, &of_wider).find("Decoder: sequence 1: the cache must hold 1 heads of 2 x 4 key and 8") == 0);
  CHECK(refusal(2, batch[0]) ==
        "Decoder: sequence 2: its cache is that of sequence 0 too; did you mean a fork() of it?");
  CHECK(refusal(4, nullptr) == "Decoder: sequence 4: its cache is a null pointer");
  CHECK(refusal(0, batch[0], {1, 2, 3}) == "Decoder: there must be a cache for each of the 3 tokens, got 5");
  Matrix<float> y(4, 19);
  Workspace workspace;
  CHECK_THROWS_AS(model.logits_into(y, batch_tokens(5, 0), batch, workspace), ShapeError);
  CHECK(are_at(caches, before));
}

TEST_CASE("A batch of a model keeps what it is fed as a whole or not at all", "[models][batch]") {
  const auto model = batch_model<MultiheadDiffAttention<float>>();
  auto fed = batch_of_caches(model, 6);
  const auto before = fed;
  const auto tokens = batch_tokens(6, 3);
  const Matrix<float> expected = model.logits(tokens, pointers_to(fed));
  const auto check = [&](const std::deque<DecoderCache<float>>& caches) {
    CHECK(are_at(caches, before));
    auto forks = caches;
    CHECK(identical(model.logits(tokens, pointers_to(forks)), expected));
  };
  Index fails_at = 0;
  for (bool failed = true; failed; ++fails_at) {
    auto caches = before;
    const auto batch = pointers_to(caches);
    Matrix<float> y(6, 19);
    Workspace workspace;
    DecoderFailingExecutor executor{fails_at};
    failed = false;
    try {
      model.logits_into(y, tokens, batch, workspace, executor);
    } catch (const std::runtime_error&) {
      failed = true;
      check(caches);
    }
  }
  CHECK(fails_at > 30);

  for (const auto failures : {support::Failures::one, support::Failures::all_later}) {
    auto caches = before;
    const auto batch = pointers_to(caches);
    Matrix<float> logits;
    const std::size_t failed = support::for_every_failing_allocation([&] { logits = model.logits(tokens, batch); },
                                                                     [&](bool threw) {
                                                                       CHECK(threw);
                                                                       check(caches);
                                                                     },
                                                                     failures);
    CHECK((failed > 0) == support::fails_allocations());
    if (failed > 0) CHECK(identical(logits, expected));
  }
}

TEST_CASE("A batch of a model takes nothing from the heap after a first call", "[models][batch]") {
  const auto model = batch_model<MultiheadDiffAttention<float>>();
  ThreadPool pool(2);
  std::deque<DecoderCache<float>> caches;
  for (Index i = 0; i < 5; ++i) {
    caches.push_back(model.make_cache(i % 2 == 0 ? KvCacheOptions{.reserve = 1400} : KvCacheOptions{.window = 40 + i}));
  }
  const auto batch = pointers_to(caches);
  const auto tokens = batch_tokens(5, 1);
  Matrix<float> y(5, 19);
  Eigen::Matrix<float, 1, 19> row;
  Workspace workspace;
  const auto decode = [&](Index steps) {
    for (Index i = 0; i < steps; ++i) {
      model.logits_into(y, tokens, batch, workspace, pool);
      // A matrix of fixed size is as good, and so are fewer sequences.
      model.logits_into(row, std::span(tokens).first(1), std::span(batch).first(1), workspace, pool);
      model.logits_into(row, std::span(tokens).first(1), caches[2], workspace, pool);
    }
  };
  decode(400);
  for (std::size_t i = 0; i < 5; i += 2) caches[i].truncate(100);
  const std::size_t before = support::allocations();
  decode(280);
  CHECK(support::allocations() == before);
}
