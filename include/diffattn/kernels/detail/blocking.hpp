#pragma once

// The sizes in which the kernels take their work.

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1::detail {

/// Keys in a chunk: a multiple of every kCols.
inline constexpr Index kChunk = 256;

/// Tokens in a page: a chunk of the kernels never straddles two of them.
inline constexpr Index kPageKeys = 256;
static_assert(kPageKeys % kChunk == 0);

}  // namespace diffattn::inline v0_1::detail
