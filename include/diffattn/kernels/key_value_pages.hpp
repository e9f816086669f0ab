#pragma once

// Keys and values of a cache, in pages of kPageKeys tokens that hold all heads of one layer. A page is packed as the
// kernels read it, once and for good:
//
//   [head][map][strip of kPageKeys][d][kCols] keys, then [head][strip of dv][kPageKeys][kCols] values
//
// in a storage type that may be narrower than the scalar of the arithmetic. Pages never move, so a cache grows without
// copying, drops what a window has left behind, and shares a prefix with its forks.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/product/packed.hpp"

namespace diffattn::inline v0_1 {

/// What every page of a cache holds.
struct PageShape {
  Index heads = 0;     // of keys and values
  Index key_maps = 0;  // 2 when the maps of a differential head have keys of their own
  Index d = 0;
  Index dv = 0;
  Index strip = 0;  // kCols of the scalar that computes

  bool operator==(const PageShape&) const = default;

  Index keys_size() const { return detail::kPageKeys * d; }
  Index values_size() const { return detail::kPageKeys * detail::round_up(dv, strip); }
  Index page_size() const { return heads * (key_maps * keys_size() + values_size()); }
  Index keys_offset(Index head, Index map) const { return (head * key_maps + map) * keys_size(); }
  Index values_offset(Index head) const { return heads * key_maps * keys_size() + head * values_size(); }
};

namespace detail {

template <typename Storage>
struct Page {
  explicit Page(const PageShape& shape)
      : data(allocate(shape.page_size())), finite_values(static_cast<std::size_t>(shape.heads), true) {}

  struct Free {
    void operator()(Storage* p) const { ::operator delete (p, std::align_val_t{64}); }
  };
  static std::unique_ptr<Storage[], Free> allocate(Index count) {
    const auto size = static_cast<std::size_t>(count);
    auto* const memory = static_cast<Storage*>(::operator new (size * sizeof(Storage), std::align_val_t{64}));
    std::unique_ptr<Storage[], Free> owner(memory);
    std::uninitialized_fill_n(memory, size, Storage(0));
    return owner;
  }

  std::unique_ptr<Storage[], Free> data;
  std::vector<char> finite_values;  // a flag a head: char, since heads are written by several threads
};

}  // namespace detail

/// The first n_k tokens of some pages, to be read. They are those of positions [first_key, first_key + n_k): what stood
/// before has been dropped.
template <typename Storage>
struct KeyValuePages {
  const std::shared_ptr<detail::Page<Storage>>* pages = nullptr;
  PageShape shape;
  Index n_k = 0;
  Index first_key = 0;

  const Storage* keys(Index page, Index head, Index map) const {
    return pages[page]->data.get() + shape.keys_offset(head, map);
  }
  const Storage* values(Index page, Index head) const { return pages[page]->data.get() + shape.values_offset(head); }
  bool finite_values(Index page, Index head) const {
    return pages[page]->finite_values[static_cast<std::size_t>(head)] != 0;
  }
};

namespace detail {

/// Packs the keys of one map into rows [first, …) of a page: strip by strip, transposed.
template <typename Scalar, typename Storage>
void pack_keys_into_page(Storage* to, Index first, const StridedView<const Scalar>& keys) {
  constexpr Index kCols = Tile<Scalar>::kCols;
  const Index d = keys.cols;
  for (Index row = 0, present = 0; row < keys.rows; row += present) {
    const Index at = (first + row) % kCols;  // in its strip
    present = std::min(kCols - at, keys.rows - row);
    Storage* const strip = to + (first + row - at) * d;
    if constexpr (std::is_same_v<Scalar, Storage>) {
      if (at == 0) {
        pack_transposed_strip(strip, keys, row, present);
        continue;
      }
    }
    for (Index r = 0; r < present; ++r) {
      Storage* const column = strip + at + r;
      for (Index c = 0; c < d; ++c) column[c * kCols] = static_cast<Storage>(keys(row + r, c));
    }
  }
}

/// Packs values into rows [first, …) of a page. Returns whether all of them are finite, as they are stored.
template <typename Scalar, typename Storage>
bool pack_values_into_page(Storage* to, Index first, const StridedView<const Scalar>& values) {
  constexpr Index kCols = Tile<Scalar>::kCols;
  if constexpr (std::is_same_v<Scalar, Storage>) return pack_columns(to + first * kCols, kPageKeys, values);
  bool finite = true;
  for (Index col = 0; col < values.cols; col += kCols, to += kPageKeys * kCols) {
    const Index present = std::min(kCols, values.cols - col);
    for (Index row = 0; row < values.rows; ++row) {
      Storage* const strip_row = to + (first + row) * kCols;
      for (Index c = 0; c < present; ++c) {
        strip_row[c] = static_cast<Storage>(values(row, col + c));
        finite &= std::isfinite(static_cast<Scalar>(strip_row[c]));
      }
    }
  }
  return finite;
}

/// Packs the rows of one head's keys (all maps side by side) and values into rows [first, …) of a page.
template <typename Scalar, typename Storage>
void pack_into_page(Page<Storage>& page, const PageShape& shape, Index head, Index first,
                    const StridedView<const Scalar>& k, const StridedView<const Scalar>& v) {
  for (Index map = 0; map < shape.key_maps; ++map) {
    pack_keys_into_page(page.data.get() + shape.keys_offset(head, map), first, k.middle_cols(map * shape.d, shape.d));
  }
  const bool finite = pack_values_into_page(page.data.get() + shape.values_offset(head), first, v);
  char& flag = page.finite_values[static_cast<std::size_t>(head)];
  flag = finite && (first == 0 || flag != 0);
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
