#pragma once

// Tests of what runs on several ranks. A case is a template on the communicator: its TEST_CASE runs it on threads, and
// mpi/main.cpp on the processes of mpirun. Catch2 counts on one thread only, so a case says what is wrong by throwing.

#include <diffattn/distributed/thread_communicator.hpp>
#include <stdexcept>
#include <string>

#include "support/catch.hpp"

namespace support {

/// Throws unless `holds`.
inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::logic_error("expected " + what);
}

/// What f says when it throws, or nothing.
template <typename F>
std::string said_by(F&& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

/// Runs a case on 1 to 4 ranks that are threads.
template <typename F>
void on_thread_ranks(F&& f) {
  for (const diffattn::Index size : {1, 2, 3, 4}) {
    INFO(size << " ranks");
    CHECK(said_by([&] { diffattn::run_ranks(size, f); }) == "");
  }
}

}  // namespace support
