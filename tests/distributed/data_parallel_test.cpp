#include <diffattn/distributed/data_parallel.hpp>

#include "distributed/data_parallel_cases.hpp"
#include "distributed/ranks.hpp"

TEST_CASE("Several ranks learn what one learns", "[distributed][data_parallel]") {
  support::on_thread_ranks([](auto& communicator) { data_parallel_cases::all_of_them(communicator); });
}

TEST_CASE("Gradients add up in every parameter, small or large", "[distributed][data_parallel]") {
  CHECK(support::said_by([] {
          diffattn::run_ranks(2, [](auto& communicator) { data_parallel_cases::sums_every_parameter(communicator); });
        }) == "");
}
