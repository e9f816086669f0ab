#pragma once

// Checks that all ranks make together, on any communicator.

#include <diffattn/distributed/collective_check.hpp>
#include <limits>
#include <new>
#include <string>

#include "distributed/expect.hpp"

namespace collective_check_cases {

using diffattn::Agreed;
using diffattn::Communicator;
using diffattn::Index;
using support::expect;

/// Throws unless check_on_all throws an Error that says `first` on rank `failing`, and `others` elsewhere.
template <typename Error, Communicator C, typename Check>
void expect_error(C& communicator, Check&& check, Index failing, const std::string& first, const std::string& others) {
  const std::string& expected = communicator.rank() == failing ? first : others;
  try {
    diffattn::check_on_all(communicator, "here", check);
  } catch (const Error& error) {
    return expect(error.what() == expected, "\"" + expected + "\", got \"" + error.what() + "\"");
  }
  expect(false, "an error");
}

template <Communicator C>
void errors_of_one_rank_reach_all(C& communicator) {
  const Index rank = communicator.rank(), last = communicator.size() - 1;
  const std::string of_last = "rank " + std::to_string(last) + ": ";
  expect_error<diffattn::ShapeError>(
      communicator,
      [&](Agreed& agreed) {
        agreed.add("rank", rank);  // what ranks disagree on comes second
        if (rank == last) throw diffattn::ShapeError("k must be 3 x 4, got 3 x 5");
      },
      last, "k must be 3 x 4, got 3 x 5", of_last + "k must be 3 x 4, got 3 x 5");
  expect_error<std::invalid_argument>(
      communicator,
      [&] {
        if (rank == last) throw std::invalid_argument("");
      },
      last, "", of_last);
  if (rank == last) {
    expect_error<std::bad_alloc>(
        communicator, [] { throw std::bad_alloc(); }, last, "std::bad_alloc", "");
  } else {
    expect_error<diffattn::RankError>(
        communicator, [] {}, last, "", of_last + "std::bad_alloc");
  }
  // All of them: each its own.
  const std::string own = "row " + std::to_string(rank);
  expect_error<std::out_of_range>(
      communicator, [&] { throw std::out_of_range(own); }, rank, own, "");
}

template <Communicator C>
void agreement(C& communicator) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  diffattn::check_on_all(communicator, "here", [&](Agreed& agreed) {
    agreed.add("tokens", Index{-3});
    agreed.add("lambda", 0.25f);
    agreed.add("scale", nan);
    agreed.add("causal", true);
    agreed.add("mask", "window 8");
  });
  diffattn::check_on_all(communicator, "here", [] {});
}

template <Communicator C>
void disagreement(C& communicator) {
  if (communicator.size() == 1) return;
  const Index last = communicator.size() - 1;
  const bool is_last = communicator.rank() == last;
  const std::string of_last = "rank " + std::to_string(last);
  const auto expect_text = [&](auto&& add, const std::string& text) {
    expect_error<std::invalid_argument>(communicator, add, -1, "", "here: ranks disagree on " + text);
  };
  expect_text(
      [&](Agreed& agreed) {
        agreed.add("heads", 8);
        agreed.add("tokens", is_last ? Index{-1} : Index{64});
      },
      "tokens: rank 0 has 64, " + of_last + " has -1");
  expect_text([&](Agreed& agreed) { agreed.add("lambda", is_last ? 0.5 : 0.25); },
              "lambda: rank 0 has 0.25, " + of_last + " has 0.5");
  expect_text([&](Agreed& agreed) { agreed.add("mask", is_last ? "window 8" : "window 9"); }, "mask");
  expect_text(
      [&](Agreed& agreed) {
        agreed.add("tokens", 1);
        if (is_last) agreed.add("window", 8);
      },
      "what they were called with");
  expect_text([&](Agreed& agreed) { agreed.add(is_last ? "window" : "prefix", 8); }, "what they were called with");
  if (communicator.size() > 2) {  // the lowest rank that differs is named
    expect_text([&](Agreed& agreed) { agreed.add("tokens", communicator.rank()); },
                "tokens: rank 0 has 0, rank 1 has 1");
  }
}

template <Communicator C>
void all_of_them(C& communicator) {
  errors_of_one_rank_reach_all(communicator);
  agreement(communicator);
  disagreement(communicator);
}

}  // namespace collective_check_cases
