#pragma once

// What every communicator must do.

#include <algorithm>
#include <diffattn/distributed/communicator.hpp>
#include <limits>
#include <span>
#include <vector>

#include "distributed/expect.hpp"

namespace communicator_cases {

using diffattn::Communicator;
using diffattn::Index;
using diffattn::Reduction;
using support::expect;

/// A number whose sum depends on the order of the additions.
inline float number_of(Index rank, Index i) {
  const float magnitude[] = {1e8f, 1.f, -1e8f, 3.f};
  return magnitude[(rank + i) % 4] + static_cast<float>(i) * 0.37f;
}

template <Communicator C>
void sums_run_in_the_order_of_ranks(C& communicator) {
  for (const Index count : {0, 1, 2, 3, 128, 129, 1000, 4099}) {
    std::vector<float> values, expected;
    for (Index i = 0; i < count; ++i) {
      values.push_back(number_of(communicator.rank(), i));
      float sum = number_of(0, i);
      for (Index r = 1; r < communicator.size(); ++r) sum += number_of(r, i);
      expected.push_back(sum);
    }
    communicator.all_reduce(std::span<float>(values));
    expect(values == expected, "the sum in the order of ranks of " + std::to_string(count) + " values");
  }
}

template <Communicator C>
void maxima(C& communicator) {
  for (const Index count : {1, 300}) {
    std::vector<double> values(static_cast<std::size_t>(count), -1.0 - static_cast<double>(communicator.rank()));
    values.back() = static_cast<double>(communicator.rank());
    communicator.all_reduce(std::span<double>(values), Reduction::max);
    expect(values.back() == static_cast<double>(communicator.size() - 1), "the largest value");
    if (count > 1) expect(values.front() == -1, "the largest of negative values");
  }
}

template <Communicator C>
void gathers_parts_of_any_size(C& communicator) {
  const Index size = communicator.size(), rank = communicator.rank();
  std::vector<Index> counts, expected;
  for (Index r = 0; r < size; ++r) {
    counts.push_back(r == 1 ? 0 : 2 * r + 1);
    expected.insert(expected.end(), static_cast<std::size_t>(counts.back()), 100 + r);
  }
  std::vector<Index> mine(static_cast<std::size_t>(counts[static_cast<std::size_t>(rank)]), 100 + rank);
  std::vector<Index> all(expected.size(), -1);
  communicator.all_gather(mine, std::span<Index>(all), counts);
  expect(all == expected, "the parts one after another");

  // The part may already be where it belongs.
  std::fill(all.begin(), all.end(), -1);
  const auto begin = std::find(expected.begin(), expected.end(), 100 + rank) - expected.begin();
  const std::span<Index> place = std::span<Index>(all).subspan(mine.empty() ? 0 : static_cast<std::size_t>(begin));
  std::copy(mine.begin(), mine.end(), place.begin());
  communicator.all_gather(place.first(mine.size()), std::span<Index>(all), counts);
  expect(all == expected, "the parts one after another, in place");

  std::vector<short> equal(2, static_cast<short>(rank)), two(2 * static_cast<std::size_t>(size));
  communicator.all_gather(equal, std::span<short>(two));
  for (std::size_t i = 0; i < two.size(); ++i) expect(two[i] == static_cast<short>(i / 2), "parts of two values");
}

/// Rank r sends r + 2·to values to rank `to`.
template <Communicator C>
void exchanges_parts_of_any_size(C& communicator) {
  const Index size = communicator.size(), rank = communicator.rank();
  std::vector<Index> send_counts, receive_counts;
  std::vector<double> send, expected;
  for (Index r = 0; r < size; ++r) {
    send_counts.push_back(rank + 2 * r);
    receive_counts.push_back(r + 2 * rank);
    send.insert(send.end(), static_cast<std::size_t>(rank + 2 * r), static_cast<double>(10 * rank + r));
    expected.insert(expected.end(), static_cast<std::size_t>(r + 2 * rank), static_cast<double>(10 * r + rank));
  }
  std::vector<double> received(expected.size());
  communicator.all_to_all(send, send_counts, std::span<double>(received), receive_counts);
  expect(received == expected, "from every rank what it has for this one");
}

template <Communicator C>
void broadcasts_from_every_rank(C& communicator) {
  for (Index root = 0; root < communicator.size(); ++root) {
    std::vector<int> values(17, static_cast<int>(communicator.rank()));
    communicator.broadcast(std::span<int>(values), root);
    expect(values == std::vector<int>(17, static_cast<int>(root)), "the root's values");
  }
  expect(!support::said_by([&] {
            int value = 0;
            communicator.broadcast(std::span<int>(&value, 1), communicator.size());
          }).empty(),
         "an error for a root that is no rank");
}

template <Communicator C>
void counts_what_it_sends(C& communicator) {
  const auto size = static_cast<std::uint64_t>(communicator.size()), others = size - 1;
  std::vector<float> few(10), many(1000 * size);
  const auto bytes_of = [&](auto&& f) {
    const std::uint64_t before = communicator.bytes_sent();
    f();
    return communicator.bytes_sent() - before;
  };
  expect(bytes_of([&] { communicator.all_reduce(std::span<float>(few)); }) == 40 * others, "few: one message a rank");
  expect(bytes_of([&] { communicator.all_reduce(std::span<float>(many)); }) == 2 * 4000 * others, "many: two pieces");
  const std::uint64_t root = communicator.rank() == 0 ? 40 * others : 0;
  expect(bytes_of([&] { communicator.broadcast(std::span<float>(few), 0); }) == root, "the root's bytes only");
  std::vector<float> all(10 * size);
  expect(bytes_of([&] { communicator.all_gather(few, std::span<float>(all)); }) == 40 * others, "mine, to the others");
  const std::vector<Index> counts(size, 10);
  std::vector<float> received(all.size());
  expect(bytes_of([&] { communicator.all_to_all(all, counts, std::span<float>(received), counts); }) == 40 * others,
         "nothing to itself");
}

template <Communicator C>
void refuses_counts_that_do_not_fit(C& communicator) {
  const auto size = static_cast<std::size_t>(communicator.size());
  std::vector<float> mine(2), all(2 * size);
  const std::vector<Index> good(size, 2), bad(size, 3), short_of_one(size - 1, 2), more(size + 1, 2);
  const auto gather = [&](const std::vector<Index>& counts) {
    return support::said_by([&] { communicator.all_gather(mine, std::span<float>(all), counts); });
  };
  expect(gather(good).empty(), "counts that fit");
  expect(gather(bad).find("all must hold " + std::to_string(3 * size)) != std::string::npos, "counts that do not");
  expect(gather(more).find("a count for each of " + std::to_string(size)) != std::string::npos, "too many counts");
  expect(gather(short_of_one).find("a count for each of " + std::to_string(size)) != std::string::npos, "too few");
  std::vector<Index> negative(size + 1, 2);
  negative[0] = -2;
  negative.resize(size);
  expect(gather(negative).find("the count of rank 0 is -2") != std::string::npos, "a negative count");
}

template <Communicator C>
void all_of_them(C& communicator) {
  sums_run_in_the_order_of_ranks(communicator);
  maxima(communicator);
  gathers_parts_of_any_size(communicator);
  exchanges_parts_of_any_size(communicator);
  broadcasts_from_every_rank(communicator);
  counts_what_it_sends(communicator);
  refuses_counts_that_do_not_fit(communicator);
}

}  // namespace communicator_cases
