#pragma once

// The version. CMake and pkg-config read it from here. The inline namespace v0_1, which every header opens by name, is
// renamed by hand when the minor version changes.

// Every header includes this one before any other code of ours, so that an older standard is told once and clearly. The
// include of what cannot exist ends the compilation, which would go on after #error, with thousands of lines.
#if __cplusplus < 202002L
#error "diffattn needs C++20: compile with -std=c++20, or in CMake link diffattn::diffattn, which asks for it"
#include "diffattn needs C++20: see the error above"
#endif

#define DIFFATTN_VERSION_MAJOR 0
#define DIFFATTN_VERSION_MINOR 1
#define DIFFATTN_VERSION_PATCH 0

/// Every name of the library lives in `diffattn::v0_1`, an inline namespace: two versions linked into one
/// program stay apart instead of silently sharing a symbol.
namespace diffattn::inline v0_1 {

/// The version of the headers that a program was compiled with.
inline constexpr int kVersionMajor = DIFFATTN_VERSION_MAJOR;
inline constexpr int kVersionMinor = DIFFATTN_VERSION_MINOR;
inline constexpr int kVersionPatch = DIFFATTN_VERSION_PATCH;

}  // namespace diffattn::inline v0_1
