#include <array>
#include <diffattn/distributed/thread_communicator.hpp>
#include <vector>

#include "distributed/communicator_cases.hpp"
#include "distributed/ranks.hpp"
#include "support/allocations.hpp"
#include "support/throws.hpp"

namespace {

using diffattn::Index;
using diffattn::RankError;
using diffattn::ThreadCommunicator;

/// What each of three ranks says that calls f.
template <typename F>
std::array<std::string, 3> thread_ranks_say(F&& f) {
  std::array<std::string, 3> said;
  const std::string thrown = support::said_by([&] {
    diffattn::run_ranks(3, [&](ThreadCommunicator& communicator) {
      try {
        f(communicator);
      } catch (const std::exception& error) {
        said[static_cast<std::size_t>(communicator.rank())] = error.what();
        throw;
      }
    });
  });
  CHECK(std::count(said.begin(), said.end(), thrown) >= 1);
  return said;
}

void reduce_something(ThreadCommunicator& communicator, std::size_t size = 4) {
  std::vector<float> values(size);
  communicator.all_reduce(std::span<float>(values));
}

}  // namespace

static_assert(diffattn::Communicator<ThreadCommunicator>);

TEST_CASE("Ranks that are threads exchange what all ranks exchange", "[distributed][thread_communicator]") {
  support::on_thread_ranks([](auto& communicator) { communicator_cases::all_of_them(communicator); });
}

TEST_CASE("A rank that throws leaves none hanging, and its error comes out", "[distributed][thread_communicator]") {
  const auto said = thread_ranks_say([](ThreadCommunicator& communicator) {
    reduce_something(communicator);
    if (communicator.rank() == 1) throw std::out_of_range("the mask has no such row");
    reduce_something(communicator);
  });
  const std::string waits = "all_gather: rank 1 has failed: the mask has no such row, and this rank waits for it";
  CHECK(said == std::array<std::string, 3>{waits, "the mask has no such row", waits});
  CHECK(support::thrown_by<std::out_of_range>([] {
          diffattn::run_ranks(4, [](ThreadCommunicator& communicator) {
            if (communicator.rank() == 3) throw std::out_of_range("row");
            reduce_something(communicator);
          });
        }) == "row");
  // Also one that throws no std::exception.
  CHECK_THROWS_AS(diffattn::run_ranks(2,
                                      [](ThreadCommunicator& communicator) {
                                        if (communicator.rank() == 0) throw 42;
                                        reduce_something(communicator);
                                      }),
                  int);
}

TEST_CASE("A rank that catches the error of another gets it again", "[distributed][thread_communicator]") {
  std::vector<std::string> again;
  CHECK_THROWS_AS(diffattn::run_ranks(2,
                                      [&](ThreadCommunicator& communicator) {
                                        if (communicator.rank() == 1) throw std::runtime_error("broken");
                                        for (int i = 0; i < 2; ++i) {
                                          again.push_back(support::said_by([&] { reduce_something(communicator); }));
                                        }
                                      }),
                  std::runtime_error);
  REQUIRE(again.size() == 2);
  CHECK(again[0] == "all_gather: rank 1 has failed: broken, and this rank waits for it");
  CHECK(again[1] == again[0]);
}

TEST_CASE("A rank that returns early leaves none hanging", "[distributed][thread_communicator]") {
  const auto said = thread_ranks_say([](ThreadCommunicator& communicator) {
    if (communicator.rank() == 2) return;
    reduce_something(communicator);
  });
  const std::string waits = "all_gather: rank 2 has returned, and this rank waits for it";
  CHECK(said == std::array<std::string, 3>{waits, waits, ""});
}

TEST_CASE("Calls that do not fit each other are an error on every rank", "[distributed][thread_communicator]") {
  const auto other_call = thread_ranks_say([](ThreadCommunicator& communicator) {
    int value = 0;
    if (communicator.rank() == 2) communicator.broadcast(std::span<int>(&value, 1), 0);
    if (communicator.rank() != 2) reduce_something(communicator);
  });
  CHECK(other_call[0] == "rank 0 calls all_gather, rank 2 calls broadcast");
  CHECK(std::count(other_call.begin(), other_call.end(), other_call[0]) == 3);
  const auto other_root = thread_ranks_say([](ThreadCommunicator& communicator) {
    int value = 0;
    communicator.broadcast(std::span<int>(&value, 1), communicator.rank() == 1 ? 1 : 0);
  });
  CHECK(std::count(other_root.begin(), other_root.end(), "rank 0 calls broadcast, rank 1 with another root") == 3);
  const auto other_size = thread_ranks_say(
      [](ThreadCommunicator& communicator) { reduce_something(communicator, communicator.rank() == 2 ? 5 : 4); });
  CHECK(std::count(other_size.begin(), other_size.end(), "rank 0 calls all_gather, rank 2 with other sizes") == 3);
  const auto other_parts = thread_ranks_say([](ThreadCommunicator& communicator) {
    const std::vector<Index> counts = communicator.rank() == 1 ? std::vector<Index>{2, 1, 1} : std::vector<Index>(3, 1);
    const std::vector<char> send(communicator.rank() == 1 ? 4 : 3);
    std::vector<char> received(3);
    communicator.all_to_all(send, counts, std::span<char>(received), std::vector<Index>(3, 1));
  });
  CHECK(std::count(other_parts.begin(), other_parts.end(),
                   "all_to_all: rank 1 sends 2 bytes to rank 0, which expects 1") == 3);
}

TEST_CASE("Repeated calls do not touch the heap", "[distributed][thread_communicator]") {
  if (!support::counts_allocations()) return;
  std::size_t taken = 1;
  diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
    std::vector<float> values(1000), all(2000);
    const auto calls = [&] {
      communicator.all_reduce(std::span<float>(values));
      communicator.all_gather(values, std::span<float>(all));
      communicator.broadcast(std::span<float>(values), 1);
    };
    calls();
    const std::size_t before = support::allocations();
    calls();
    if (communicator.rank() == 0) taken = support::allocations() - before;
    calls();
  });
  CHECK(taken == 0);
}

TEST_CASE("There is at least one rank", "[distributed][thread_communicator]") {
  CHECK(support::thrown_by<std::invalid_argument>([] { diffattn::run_ranks(0, [](auto&) {}); }) ==
        "run_ranks: expected at least one rank, got 0");
}
