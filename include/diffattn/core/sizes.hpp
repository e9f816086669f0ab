#pragma once

// Products of sizes. A config, a Map or a file may name any number, and a product of large ones could overflow to a
// small number. So products are checked before they are used, and an error names what is too large for any memory.

#include <algorithm>
#include <initializer_list>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1::detail {

/// More values than any memory holds. Small enough that a kernel can multiply it by its tile sizes and by the bytes of
/// a value without overflow.
inline constexpr Index kMostValues = Index{1} << 46;

/// The product of `factors`. Throws std::invalid_argument, which calls the product `what`, if a factor is negative or
/// the product is above kMostValues.
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

/// Throws std::invalid_argument if `rows` x `cols` values fit no memory. An operand can claim such a size: a Map with a
/// stride of 0 is as large as it says.
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

/// Checks as check_positive does and returns the value: for initialiser lists of constructors.
inline Index checked_positive(const char* where, const char* field, Index value) {
  check_positive(where, field, value);
  return value;
}

}  // namespace diffattn::inline v0_1::detail
