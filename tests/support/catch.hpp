#pragma once

// Catch2, version 2.13 (Debian 12) or 3: the tests include this and never Catch2 itself, and write v3's names.

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>

namespace Catch {
inline unsigned int getSeed() { return rngSeed(); }
namespace Matchers {
inline auto ContainsSubstring(const std::string& text) { return Contains(text); }
}  // namespace Matchers
}  // namespace Catch
#endif
