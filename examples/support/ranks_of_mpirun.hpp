#pragma once

// The part of main() that every program on ranks of mpirun has.

#include <cstdio>
#include <cstdlib>
#include <diffattn/distributed/mpi.hpp>
#include <exception>

/// Starts MPI, calls run(communicator), which says whether all went well, and ends MPI: what main() returns. An exception
/// ends the program on all ranks, because the others may be waiting for this one.
template <typename Run>
int on_ranks_of_mpirun(int& argc, char**& argv, const Run& run) {
  MPI_Init(&argc, &argv);
  bool good = false;
  try {
    diffattn::MpiCommunicator communicator(MPI_COMM_WORLD);
    good = run(communicator);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
  }
  MPI_Finalize();
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
