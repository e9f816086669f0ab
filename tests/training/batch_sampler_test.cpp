#include <algorithm>
#include <cstdint>
#include <diffattn/training/batch_sampler.hpp>
#include <numeric>
#include <set>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"

using diffattn::Batch;
using diffattn::BatchSampler;
using diffattn::Index;

namespace {

/// Tokens that say where they stand.
std::vector<std::uint16_t> counting_tokens(std::size_t count) {
  std::vector<std::uint16_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), std::uint16_t{0});
  return tokens;
}

template <typename Token>
std::vector<Index> inputs_of(BatchSampler<Token>& sampler, int batches) {
  std::vector<Index> all;
  Batch batch;
  for (int i = 0; i < batches; ++i) {
    sampler.next(batch);
    all.insert(all.end(), batch.inputs.begin(), batch.inputs.end());
  }
  return all;
}

}  // namespace

TEST_CASE("A batch is sequences of consecutive tokens, targets one further on", "[training][batch_sampler]") {
  const auto tokens = counting_tokens(1000);
  BatchSampler<std::uint16_t> sampler(tokens, {.length = 7, .batch_size = 5, .seed = 3});
  Batch batch;
  for (int step = 0; step < 100; ++step) {
    sampler.next(batch);
    REQUIRE(batch.inputs.size() == 35);
    REQUIRE(batch.targets.size() == 35);
    CHECK(batch.lengths == std::vector<Index>(5, 7));
    for (std::size_t i = 0; i < 35; ++i) {
      CHECK(batch.targets[i] == batch.inputs[i] + 1);
      if (i % 7 != 0) CHECK(batch.inputs[i] == batch.inputs[i - 1] + 1);
    }
  }
  CHECK(sampler.drawn == 500);
}

TEST_CASE("Every epoch visits every window once, in its own order and at its own offset", "[training][batch_sampler]") {
  const auto tokens = counting_tokens(101);
  BatchSampler<std::uint16_t> sampler(tokens, {.length = 8, .batch_size = 4, .seed = 1});
  REQUIRE(sampler.windows_per_epoch() == 11);  // with room left for an offset of 0 to 12
  std::vector<Index> first_epoch;
  std::set<Index> offsets;
  int orders = 0;
  const auto starts = [&] {
    std::vector<Index> all;
    for (const Index token : inputs_of(sampler, 11 * 20)) all.push_back(token);
    std::vector<Index> begins;
    for (std::size_t i = 0; i < all.size(); i += 8) begins.push_back(all[i]);
    return begins;
  }();
  REQUIRE(starts.size() == 880);  // 80 epochs
  for (auto epoch = starts.begin(); epoch != starts.end(); epoch += 11) {
    std::vector<Index> sorted(epoch, epoch + 11);
    orders += sorted == first_epoch ? 1 : 0;
    first_epoch = sorted;
    std::sort(sorted.begin(), sorted.end());
    offsets.insert(sorted[0]);
    for (std::size_t i = 0; i < 11; ++i) CHECK(sorted[i] == sorted[0] + 8 * static_cast<Index>(i));
    CHECK(sorted.back() + 8 < 101);
  }
  CHECK(orders == 0);
  CHECK(offsets.size() == 13);  // 80 draws miss one of 13 once in 50 seeds; this seed misses none
}

TEST_CASE("A sampler goes on where another stopped, across epochs", "[training][batch_sampler]") {
  const auto tokens = counting_tokens(300);
  const diffattn::BatchSamplerConfig config{.length = 9, .batch_size = 4, .seed = 11};
  BatchSampler<std::uint16_t> whole(tokens, config);
  inputs_of(whole, 13);
  BatchSampler<std::uint16_t> resumed(tokens, config);
  resumed.drawn = whole.drawn;
  CHECK(inputs_of(whole, 40) == inputs_of(resumed, 40));

  BatchSampler<std::uint16_t> again(tokens, config), other(tokens, {.length = 9, .batch_size = 4, .seed = 12});
  const auto first = inputs_of(again, 20);
  CHECK(first != inputs_of(other, 20));
  again.drawn = 0;
  CHECK(first == inputs_of(again, 20));
}

TEST_CASE("The order is the same on every machine", "[training][batch_sampler]") {
  const auto tokens = counting_tokens(40);
  BatchSampler<std::uint16_t> sampler(tokens, {.length = 4, .batch_size = 1, .seed = 5});
  Batch batch;
  std::vector<Index> begins;
  for (int i = 0; i < 12; ++i) {
    sampler.next(batch);
    begins.push_back(batch.inputs[0]);
  }
  CHECK(begins == std::vector<Index>{25, 5, 1, 9, 17, 13, 33, 21, 29, 25, 5, 13});
}

TEST_CASE("The least number of tokens is a window and its last target", "[training][batch_sampler]") {
  const std::vector<std::uint8_t> tokens = {250, 251, 252, 255};
  BatchSampler<std::uint8_t> sampler(tokens, {.length = 3, .batch_size = 2});
  Batch batch;
  sampler.next(batch);
  CHECK(batch.inputs == std::vector<Index>{250, 251, 252, 250, 251, 252});
  CHECK(batch.targets == std::vector<Index>{251, 252, 255, 251, 252, 255});

  using Sampler = BatchSampler<std::uint8_t>;
  CHECK(support::thrown_by<std::invalid_argument>([&] { Sampler(tokens, {.length = 4}); }) ==
        "BatchSampler: a window of 4 inputs and their targets needs at least 5 tokens, got 4");
  CHECK(support::thrown_by<std::invalid_argument>([&] { Sampler(tokens, {.length = 0, .batch_size = 1}); }) ==
        "BatchSampler: length and batch_size must be at least 1, got 0 and 1");
  CHECK(support::thrown_by<std::invalid_argument>([&] { Sampler(tokens, {.length = 1, .batch_size = -2}); }) ==
        "BatchSampler: length and batch_size must be at least 1, got 1 and -2");
}

TEST_CASE("Ranks share a batch, which is the same for any number of them", "[training][batch_sampler]") {
  const auto tokens = counting_tokens(200);
  const diffattn::BatchSamplerConfig config{.length = 7, .batch_size = 5, .seed = 3};
  BatchSampler<std::uint16_t> alone(tokens, config);
  Batch whole, part;
  for (const Index num_ranks : {1, 2, 3, 5}) {
    std::vector<BatchSampler<std::uint16_t>> ranks;
    for (Index rank = 0; rank < num_ranks; ++rank) {
      auto of_rank = config;
      of_rank.rank = rank;
      of_rank.num_ranks = num_ranks;
      ranks.emplace_back(tokens, of_rank);
      ranks.back().drawn = alone.drawn;  // goes on from any other number of ranks
    }
    for (int step = 0; step < 20; ++step) {  // across epochs, which have 27 windows
      alone.next(whole);
      Batch together;
      for (auto& rank : ranks) {
        rank.next(part);
        const auto mine = static_cast<Index>(part.lengths.size());
        CHECK(mine >= 5 / num_ranks);
        CHECK(mine <= (5 + num_ranks - 1) / num_ranks);
        together.inputs.insert(together.inputs.end(), part.inputs.begin(), part.inputs.end());
        together.targets.insert(together.targets.end(), part.targets.begin(), part.targets.end());
        together.lengths.insert(together.lengths.end(), part.lengths.begin(), part.lengths.end());
        CHECK(rank.drawn == alone.drawn);
      }
      REQUIRE(together.inputs == whole.inputs);
      REQUIRE(together.targets == whole.targets);
      REQUIRE(together.lengths == whole.lengths);
    }
  }

  using Sampler = BatchSampler<std::uint16_t>;
  const auto refused = [&](Index batch_size, Index rank, Index num_ranks) {
    return support::thrown_by<std::invalid_argument>(
        [&] { Sampler(tokens, {.length = 7, .batch_size = batch_size, .rank = rank, .num_ranks = num_ranks}); });
  };
  CHECK(refused(4, 3, 3) == "BatchSampler: rank must be from 0 to num_ranks - 1, got 3 of 3");
  CHECK(refused(4, -1, 3) == "BatchSampler: rank must be from 0 to num_ranks - 1, got -1 of 3");
  CHECK(refused(4, 0, 0) == "BatchSampler: rank must be from 0 to num_ranks - 1, got 0 of 0");
  CHECK(refused(2, 0, 3) == "BatchSampler: a batch must have a sequence for each of 3 ranks, got batch_size 2");
}
