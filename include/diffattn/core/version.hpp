#pragma once

// The one place that states the version: CMake, pkg-config and the inline namespace follow it.

#define DIFFATTN_VERSION_MAJOR 0
#define DIFFATTN_VERSION_MINOR 1
#define DIFFATTN_VERSION_PATCH 0

/// Every name of the library lives in `diffattn::v0_1`, an inline namespace: two versions linked into one
/// program stay apart instead of silently sharing a symbol.
namespace diffattn::inline v0_1 {

inline constexpr int kVersionMajor = DIFFATTN_VERSION_MAJOR;
inline constexpr int kVersionMinor = DIFFATTN_VERSION_MINOR;
inline constexpr int kVersionPatch = DIFFATTN_VERSION_PATCH;

}  // namespace diffattn::inline v0_1
