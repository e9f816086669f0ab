#pragma once

// What every attention function can be told besides its operands: options, and how heads are grouped.

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
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
///
/// Differential heads may share their second map, that of the noise (grouped differential attention, arXiv 2510.06949):
/// num_noise_heads divides num_heads and is a multiple of num_kv_heads, and r = num_heads / num_noise_heads heads that
/// follow each other share one; 0 means num_heads, a second map for every head. The queries of a group of them are r
/// signal heads and then its noise head, all of one width, so that r = 1 is the order of the paper. Keys are those of
/// pairs: K1, which all signal heads of a key head read, and K2.
struct Heads {
  Index num_heads = 1;
  Index num_kv_heads = 0;
  Index num_noise_heads = 0;

  /// r: how many heads share a second map.
  constexpr Index noise_sharers() const { return num_noise_heads == 0 ? 1 : num_heads / num_noise_heads; }
  /// How many packed heads the queries have, one behind the other: num_heads + num_noise_heads; num_heads if a head has
  /// but one map.
  constexpr Index query_heads(Index maps = 2) const { return num_heads + (maps - 1) * (num_heads / noise_sharers()); }
  /// Which of them holds the queries of map 0 or 1 of a head: those of map 0 are its own, those of map 1 its group's.
  constexpr Index query_head(Index head, Index map, Index maps = 2) const {
    const Index sharers = noise_sharers();
    return head / sharers * (sharers + maps - 1) + (map == 0 ? head % sharers : sharers);
  }
};

namespace detail {

/// "; name = 1, 2 or 4 would fit": the multiples of `of` that divide `all`.
inline std::string fitting_heads(const char* name, Index of, Index all) {
  std::string numbers;
  constexpr Index kMostNamed = 256;
  for (Index n = of; n <= std::min(all, kMostNamed); n += of) {
    if (all % n == 0) numbers += join({numbers.empty() ? "; " : ", ", numbers.empty() ? name : "", n});
  }
  return numbers.empty() ? numbers : numbers + " would fit";
}

/// num_noise_heads cannot be; says which ones could, and which num_kv_heads would make it fit.
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_noise_heads(const char* where, const Heads& heads) {
  const Index noise = heads.num_noise_heads;
  const bool divides = noise > 0 && heads.num_heads % noise == 0;
  throw_invalid({where, ": num_noise_heads must divide num_heads and be a multiple of num_kv_heads, got ", noise,
                 " for num_heads = ", heads.num_heads, " and num_kv_heads = ", heads.num_kv_heads,
                 fitting_heads("num_noise_heads = ", heads.num_kv_heads, heads.num_heads).c_str(),
                 divides ? fitting_heads("num_kv_heads = ", 1, noise).c_str() : ""});
}

/// Fills in num_kv_heads and num_noise_heads. Throws std::invalid_argument unless both divide num_heads, and the first
/// the second.
inline Heads checked_heads(const char* where, Heads heads) {
  if (heads.num_kv_heads == 0) heads.num_kv_heads = heads.num_heads;
  if (heads.num_heads > kMostValues) throw_invalid({where, ": num_heads = ", heads.num_heads, ", which cannot be"});
  if (heads.num_heads < 1 || heads.num_kv_heads < 1 || heads.num_heads % heads.num_kv_heads != 0) {
    throw_invalid({where, ": num_kv_heads must divide num_heads, got ", heads.num_kv_heads, " and ", heads.num_heads});
  }
  if (heads.num_noise_heads == 0) heads.num_noise_heads = heads.num_heads;
  if (heads.num_noise_heads == heads.num_heads) return heads;
  if (heads.num_noise_heads < 1 || heads.num_heads % heads.num_noise_heads != 0 ||
      heads.num_noise_heads % heads.num_kv_heads != 0) {
    throw_noise_heads(where, heads);
  }
  return heads;
}

/// checked_heads() for heads of `maps` maps: one map alone has no noise.
inline Heads checked_heads(const char* where, Heads heads, Index maps) {
  heads = checked_heads(where, heads);
  if (maps == 1 && heads.num_noise_heads != heads.num_heads) {
    throw_invalid({where, ": num_noise_heads is for differential attention; standard attention has none, got ",
                   heads.num_noise_heads});
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
inline constexpr bool is_scalar_lambda = std::is_arithmetic_v<Lambda> || std::is_same_v<Lambda, Eigen::bfloat16>;

}  // namespace detail
}  // namespace diffattn::inline v0_1
