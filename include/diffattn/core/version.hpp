#pragma once

// The version. CMake and pkg-config read it from here. The inline namespace v0_1, which every header opens by name, is
// renamed by hand when the minor version changes.

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
