// The cases of this folder on the processes of mpirun, and what concerns MPI alone. Prints what fails and aborts.

#include <cstdio>
#include <diffattn/distributed/mpi.hpp>
#include <exception>

#include "distributed/collective_check_cases.hpp"
#include "distributed/communicator_cases.hpp"
#include "distributed/data_parallel_cases.hpp"
#include "distributed/prefill_cases.hpp"

namespace {

using diffattn::MpiCommunicator;
using support::expect;
using support::said_by;

static_assert(diffattn::Communicator<MpiCommunicator>);

std::string error_for(MPI_Comm communicator) {
  return said_by([&] { MpiCommunicator unused(communicator); });
}

void before_init() {
  expect(error_for(MPI_COMM_WORLD) == "MpiCommunicator: call MPI_Init before, which has not been called", "an error");
}

void after_finalize() {
  expect(error_for(MPI_COMM_WORLD) == "MpiCommunicator: MPI_Finalize has been called already", "an error");
}

void communicators_stay_the_users() {
  expect(error_for(MPI_COMM_NULL) == "MpiCommunicator: the communicator is MPI_COMM_NULL: was it freed?", "an error");
  MPI_Comm theirs = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &theirs);
  {
    MpiCommunicator ours(theirs);
    MPI_Comm_free(&theirs);
    communicator_cases::maxima(ours);  // goes on without it
    expect(error_for(theirs).find("was it freed?") != std::string::npos, "an error");
  }
  MPI_Comm_dup(MPI_COMM_WORLD, &theirs);
  { MpiCommunicator ours(theirs); }
  int size = 0;
  expect(MPI_Comm_size(theirs, &size) == MPI_SUCCESS && size > 0, "a communicator that is still there");
  MPI_Comm_free(&theirs);
}

/// The even and the odd ranks by themselves, and both groups as one intercommunicator, which is refused.
void groups(MpiCommunicator& world) {
  const int rank = static_cast<int>(world.rank());
  MPI_Comm half = MPI_COMM_NULL, between = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, rank % 2, rank, &half);
  {
    MpiCommunicator ours(half);
    expect(ours.size() == (world.size() + 1 - rank % 2) / 2, "half of the ranks");
    communicator_cases::sums_run_in_the_order_of_ranks(ours);
  }
  if (world.size() > 1) {
    MPI_Intercomm_create(half, 0, MPI_COMM_WORLD, 1 - rank % 2, 7, &between);
    expect(error_for(between).find("got an intercommunicator") != std::string::npos, "an error");
    MPI_Comm_free(&between);
  }
  MPI_Comm_free(&half);
}

void long_messages_go_in_pieces() {
  for (const int longest : {61, 4000}) {
    MpiCommunicator ours(MPI_COMM_WORLD, longest);
    communicator_cases::all_of_them(ours);
  }
  expect(said_by([] { MpiCommunicator unused(MPI_COMM_WORLD, 0); }) ==
             "MpiCommunicator: longest_message must be at least 1 byte, got 0",
         "an error");
}

void all_cases() {
  MpiCommunicator world(MPI_COMM_WORLD);
  communicator_cases::all_of_them(world);
  collective_check_cases::all_of_them(world);
  data_parallel_cases::all_of_them(world);
  data_parallel_cases::sums_every_parameter(world);
  prefill_cases::all_of_them(world);
  communicators_stay_the_users();
  groups(world);
  long_messages_go_in_pieces();
}

}  // namespace

int main(int argc, char** argv) {
  try {
    before_init();
    MPI_Init(&argc, &argv);
    all_cases();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, 1);  // the others may be waiting
  }
  MPI_Finalize();
  try {
    after_finalize();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::puts("all cases hold");
  return 0;
}
