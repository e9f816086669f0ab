#pragma once

// What every attention function can be told besides its operands: options, and how heads are grouped.

#include <cmath>
#include <optional>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/sizes.hpp"

namespace diffattn::inline v0_1 {

/// What every attention function can be told besides its operands and its mask.
struct AttentionOptions {
  /// What q·k is multiplied by; 1/sqrt(d) if left out.
  std::optional<double> scale = std::nullopt;
};

/// Heads that lie side by side in the columns. Query head h reads key and value head h / (num_heads / num_kv_heads),
/// the grouping of the official flash variants (grouped-query attention); num_kv_heads = 0 means num_heads.
struct Heads {
  Index num_heads = 1;
  Index num_kv_heads = 0;
};

namespace detail {

/// Fills in num_kv_heads. Throws std::invalid_argument unless it divides num_heads.
inline Heads checked_heads(const char* where, Heads heads) {
  if (heads.num_kv_heads == 0) heads.num_kv_heads = heads.num_heads;
  if (heads.num_heads > kMostValues) throw_invalid({where, ": num_heads = ", heads.num_heads, ", which cannot be"});
  if (heads.num_heads < 1 || heads.num_kv_heads < 1 || heads.num_heads % heads.num_kv_heads != 0) {
    throw_invalid({where, ": num_kv_heads must divide num_heads, got ", heads.num_kv_heads, " and ", heads.num_heads});
  }
  return heads;
}

template <typename Scalar>
Scalar scale_of(const AttentionOptions& options, Index d) {
  if (options.scale) return static_cast<Scalar>(*options.scale);
  return Scalar(1) / std::sqrt(static_cast<Scalar>(d));
}

/// Whether λ is given as one number for all, and not as a matrix with one for every query.
template <typename Lambda>
inline constexpr bool is_scalar_lambda = std::is_arithmetic_v<Lambda>;

}  // namespace detail
}  // namespace diffattn::inline v0_1
