#pragma once

// Sizes that are multiplied. A config, a Map or a file may name any number: products are checked before they are used,
// so that what cannot be in memory is refused by name and never wraps around to something small.

#include <algorithm>
#include <initializer_list>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1::detail {

/// More values than any memory holds, and few enough that a kernel may multiply them by tiles, maps and bytes.
inline constexpr Index kMostValues = Index{1} << 46;

/// The product of `factors`. Throws std::invalid_argument, with `what` for the name of the product, if one of them is
/// negative or the product is beyond kMostValues.
inline Index checked_product(const char* where, const char* what, std::initializer_list<Index> factors) {
  Index product = 1;
  for (const Index factor : factors) {
    if (factor < 0) throw_invalid({where, ": ", what, " cannot be made of ", factor});
    if (factor != 0 && product > kMostValues / factor) {
      throw_invalid({where, ": ", what, " would be more than ", kMostValues, ", which no memory holds"});
    }
    product *= factor;
  }
  return product;
}

/// Throws std::invalid_argument if an operand of `rows` x `cols` can be no matrix in memory: a Map with a stride of 0
/// may say so.
inline void check_operand_size(const char* where, const char* tensor, Index rows, Index cols) {
  if (std::max(rows, cols) <= kMostValues && (cols == 0 || rows <= kMostValues / cols)) return;
  throw_invalid({where, ": ", tensor, " would be ", rows, " x ", cols, " values, which no memory holds"});
}

/// Throws std::invalid_argument naming the field unless it is at least 1.
inline void check_positive(const char* where, const char* field, Index value) {
  if (value < 1) {
    throw_invalid({where, ": ", field, " must be at least 1, got ", value});
  }
}

/// The value, once it is known to be at least 1: for constructors, which need their numbers before their body.
inline Index checked_positive(const char* where, const char* field, Index value) {
  check_positive(where, field, value);
  return value;
}

}  // namespace diffattn::inline v0_1::detail
