#pragma once

// Counts what a test takes from the heap: malloc and its kin, and with them operator new and Eigen.

#include <cstddef>

namespace support {

/// Whether allocations are counted: with glibc, and not when a sanitizer has taken malloc over.
bool counts_allocations();

/// Allocations of all threads since the program started.
std::size_t allocations();

}  // namespace support
