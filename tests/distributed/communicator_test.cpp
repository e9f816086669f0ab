#include <diffattn/distributed/communicator.hpp>

#include "distributed/communicator_cases.hpp"
#include "distributed/ranks.hpp"

static_assert(diffattn::Communicator<diffattn::SelfCommunicator>);
static_assert(!diffattn::Communicator<int>);

TEST_CASE("A program that is alone is a rank, too", "[distributed][communicator]") {
  diffattn::SelfCommunicator self;
  CHECK(self.rank() == 0);
  CHECK(self.size() == 1);
  CHECK(support::said_by([&] { communicator_cases::all_of_them(self); }) == "");
  CHECK(self.bytes_sent() == 0);
}
