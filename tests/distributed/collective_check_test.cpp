#include "distributed/collective_check_cases.hpp"
#include "distributed/ranks.hpp"

#include <diffattn/distributed/collective_check.hpp>

#include "support/allocations.hpp"
#include "support/throws.hpp"

TEST_CASE("A check that fails on one rank fails on all", "[distributed][collective_check]") {
  support::on_thread_ranks([](auto& communicator) { collective_check_cases::all_of_them(communicator); });
}

TEST_CASE("A check that all ranks pass does not touch the heap", "[distributed][collective_check]") {
  if (!support::counts_allocations()) return;
  std::size_t taken = 1;
  diffattn::run_ranks(2, [&](diffattn::ThreadCommunicator& communicator) {
    const auto check = [&] {
      diffattn::check_on_all(communicator, "here", [](diffattn::Agreed& agreed) { agreed.add("tokens", 5); });
    };
    check();
    const std::size_t before = support::allocations();
    check();
    if (communicator.rank() == 0) taken = support::allocations() - before;
    check();
  });
  CHECK(taken == 0);
}

TEST_CASE("A check holds 32 values", "[distributed][collective_check]") {
  diffattn::SelfCommunicator self;
  const auto add = [&](int count) {
    diffattn::check_on_all(self, "here", [&](diffattn::Agreed& agreed) {
      for (int i = 0; i < count; ++i) agreed.add("value", i);
    });
  };
  CHECK_NOTHROW(add(32));
  CHECK(support::thrown_by<std::length_error>([&] { add(33); }) == "Agreed: more than 32 values");
}
