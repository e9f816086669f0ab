#pragma once

// What the cases of this folder are written with. A case is a template on the communicator: a TEST_CASE runs it on
// threads (ranks.hpp), and mpi/main.cpp on the processes of mpirun, without Catch2. It says what is wrong by throwing.

#include <exception>
#include <stdexcept>
#include <string>

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

}  // namespace support
