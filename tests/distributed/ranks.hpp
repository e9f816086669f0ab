#pragma once

// Cases on ranks that are threads. Catch2 counts on one thread only, so what a case throws is checked when all are done.

#include <diffattn/distributed/thread_communicator.hpp>

#include "distributed/expect.hpp"
#include "support/catch.hpp"

namespace support {

/// Runs a case on 1 to 4 ranks that are threads.
template <typename F>
void on_thread_ranks(F&& f) {
  for (const diffattn::Index size : {1, 2, 3, 4}) {
    INFO(size << " ranks");
    CHECK(said_by([&] { diffattn::run_ranks(size, f); }) == "");
  }
}

}  // namespace support
