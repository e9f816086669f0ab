#pragma once

// Keys and values of a cache, in pages of page_size tokens that hold all heads of one layer. A page is packed as the
// kernels read it, once and for good:
//
//   [head][map][strip of page_size][d][kCols] keys, then [head][strip of dv][page_size][kCols] values
//
// in a storage type that may be narrower than the scalar of the arithmetic. Where the target multiplies pairs of
// bfloat16, pages of it hold pairs along depth (product/packed_pairs.hpp), [⌈d / 2⌉][kCols] and [page_size / 2][kCols]:
// queries of bfloat16 then multiply them as they are. Pages never move, so a cache grows without copying, drops what a
// window has left behind, and shares a prefix with its forks.
//
// Sizes    a power of two, at least 32: a page is then a whole number of strips, and either it holds whole chunks
//          (kernels/detail/blocking.hpp) or a chunk whole pages. Chunks begin at the same positions whatever the size,
//          so results are the same, bit for bit, as long as all values are finite.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/detail/arithmetic.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/product/packed.hpp"
#include "diffattn/product/packed_pairs.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// What a page of Storage is made of.
template <typename Storage>
using StoredAs = std::conditional_t<is_narrow<Storage> && simd::kUsesPairs, simd::Pair, Storage>;

}  // namespace detail

/// What every page of a cache holds.
struct PageShape {
  Index heads = 0;     // of keys and values
  Index key_maps = 0;  // 2 when the maps of a differential head have keys of their own
  Index d = 0;
  Index dv = 0;
  Index strip = 0;                      // kCols of the scalar that computes
  Index page_size = detail::kPageKeys;  // tokens

  bool operator==(const PageShape&) const = default;

  /// The keys of one map of a head in a page: numbers, or pairs of them where Stored is one; so do the others count.
  template <typename Stored = float>
  Index keys_size() const {
    return page_size * detail::steps_of<Stored>(d);
  }
  /// The values of a head in a page.
  template <typename Stored = float>
  Index values_size() const {
    return detail::steps_of<Stored>(page_size) * detail::round_up(dv, strip);
  }
  /// All of a page.
  template <typename Stored = float>
  Index size() const {
    return heads * (key_maps * keys_size<Stored>() + values_size<Stored>());
  }
  /// Where in a page the keys of a head and map begin.
  template <typename Stored = float>
  Index keys_offset(Index head, Index map) const {
    return (head * key_maps + map) * keys_size<Stored>();
  }
  /// Where in a page the values of a head begin.
  template <typename Stored = float>
  Index values_offset(Index head) const {
    return heads * key_maps * keys_size<Stored>() + head * values_size<Stored>();
  }
};

namespace detail {

template <typename Storage>
struct Page {
  using Stored = StoredAs<Storage>;

  explicit Page(const PageShape& shape)
      : data(allocate(shape.size<Stored>())), finite_values(static_cast<std::size_t>(shape.heads), true) {}

  struct Free {
    void operator()(Stored* p) const { ::operator delete (p, std::align_val_t{64}); }
  };
  static std::unique_ptr<Stored[], Free> allocate(Index count) {
    const auto size = static_cast<std::size_t>(count);
    auto* const memory = static_cast<Stored*>(::operator new (size * sizeof(Stored), std::align_val_t{64}));
    std::unique_ptr<Stored[], Free> owner(memory);
    std::uninitialized_fill_n(memory, size, Stored{});
    return owner;
  }

  std::unique_ptr<Stored[], Free> data;
  std::vector<char> finite_values;  // a flag a head: char, since heads are written by several threads
};

}  // namespace detail

/// The first n_k tokens of some pages, to be read. They are those of positions [first_key, first_key + n_k): what stood
/// before has been dropped.
template <typename Storage>
struct KeyValuePages {
  using Stored = detail::StoredAs<Storage>;

  const std::shared_ptr<detail::Page<Storage>>* pages = nullptr;
  PageShape shape;
  Index n_k = 0;
  Index first_key = 0;
  /// Keys that one of the calls to come sees: scratch is taken for as many at once. 0: for those of this call.
  Index most_seen = 0;

  /// Where the chunk begins that the first key is in. The kernels count keys from here.
  Index origin() const { return first_key - lead(); }
  /// Keys between origin() and the first one: dropped, and a whole number of pages.
  Index lead() const { return first_key % detail::kChunk; }
  /// Keys that scratch is taken for, where there are fewer, if they may begin `unit` keys before the first that is seen.
  Index room(Index unit) const { return most_seen == 0 ? 0 : most_seen + unit; }
  /// The page of a key, which is counted from origin().
  Index page_of(Index key) const {
    return (key - lead()) >> std::countr_zero(static_cast<std::size_t>(shape.page_size));
  }
  /// The place of a key in its page.
  Index row_of(Index key) const { return (key - lead()) & (shape.page_size - 1); }

  /// The keys of a head and map in a page.
  const Stored* keys(Index page, Index head, Index map) const {
    return pages[page]->data.get() + shape.keys_offset<Stored>(head, map);
  }
  /// The values of a head in a page.
  const Stored* values(Index page, Index head) const {
    return pages[page]->data.get() + shape.values_offset<Stored>(head);
  }
  /// Whether all values of a head in a page are finite.
  bool finite_values(Index page, Index head) const {
    return pages[page]->finite_values[static_cast<std::size_t>(head)] != 0;
  }

  /// The strip of keys that begins with `key`, counted from origin().
  const Stored* key_strip(Index key, Index head, Index map) const {
    return keys(page_of(key), head, map) + row_of(key) * detail::steps_of<Stored>(shape.d);
  }
  /// The row of `key`, counted from origin(), in the first strip of values, or the row of pairs that it is in; the next
  /// strip is value_stride() rows on.
  const Stored* value_row(Index key, Index head) const {
    return values(page_of(key), head) + row_of(key) / detail::kStepDepth<Stored> * shape.strip;
  }
  /// Rows from one strip of values in a page to the next.
  Index value_stride() const { return detail::steps_of<Stored>(shape.page_size); }
  /// Whether the values of the pages are finite which hold some of the `count` keys from `key` on, counted from
  /// origin(); none stands for those that are not there.
  bool finite_values_of(Index key, Index count, Index head) const {
    const Index end = std::min(key + count, lead() + n_k);
    key = std::max(key, lead());
    for (Index page = page_of(key); key < end && page <= page_of(end - 1); ++page) {
      if (!finite_values(page, head)) return false;
    }
    return true;
  }
};

namespace detail {

/// Whether packed.hpp or packed_pairs.hpp has a way to pack the one as the other.
template <typename Scalar, typename Stored>
inline constexpr bool is_packed_at_once =
    kStepDepth<Stored> == 2 ? std::is_same_v<ArithmeticOf<Scalar>, float>
                            : std::is_same_v<Scalar, Stored> && !is_narrow<Stored>;

/// Packs the keys of one map into rows [first, …) of a page: strip by strip, transposed.
template <typename Scalar, typename Stored>
void pack_keys_into_page(Stored* to, Index first, const StridedView<const Scalar>& keys) {
  constexpr Index kCols = Tile<ArithmeticOf<Scalar>>::kCols;
  const Index d = steps_of<Stored>(keys.cols);
  for (Index row = 0, present = 0; row < keys.rows; row += present) {
    const Index at = (first + row) % kCols;  // in its strip
    present = std::min(kCols - at, keys.rows - row);
    Stored* const strip = to + (first + row - at) * d;
    if constexpr (is_packed_at_once<Scalar, Stored>) {
      if (at == 0) {
        pack_transposed_strip(strip, keys, row, present);
        continue;
      }
    }
    for (Index r = 0; r < present; ++r) {
      Stored* const column = strip + at + r;
      for (Index c = 0; c < d; ++c) {
        if constexpr (kStepDepth<Stored> == 1) column[c * kCols] = static_cast<Stored>(keys(row + r, c));
        if constexpr (kStepDepth<Stored> == 2)
          column[c * kCols] = pair_at(&keys(row + r, 0), keys.col_stride, keys.cols, c);
      }
    }
  }
}

/// Packs values into rows [first, …) of a page of page_size rows. Returns whether all of them are finite, as they are
/// stored.
template <typename Scalar, typename Stored>
bool pack_values_into_page(Stored* to, Index page_size, Index first, const StridedView<const Scalar>& values) {
  constexpr Index kCols = Tile<ArithmeticOf<Scalar>>::kCols;
  if constexpr (is_packed_at_once<Scalar, Stored>) {
    return pack_columns(to + first * kCols, page_size, values);
  } else {
    bool finite = true;
    for (Index col = 0; col < values.cols; col += kCols, to += page_size * kCols) {
      const Index present = std::min(kCols, values.cols - col);
      for (Index row = 0; row < values.rows; ++row) {
        Stored* const strip_row = to + (first + row) * kCols;
        for (Index c = 0; c < present; ++c) {
          strip_row[c] = static_cast<Stored>(values(row, col + c));
          finite &= std::isfinite(static_cast<ArithmeticOf<Scalar>>(strip_row[c]));
        }
      }
    }
    return finite;
  }
}

/// One row of values as the second ones of the pairs that the row before it began. Returns whether they are finite.
template <typename Scalar>
bool complete_pairs(simd::Pair* to, Index page_size, Index row, const StridedView<const Scalar>& values) {
  constexpr Index kCols = Tile<ArithmeticOf<Scalar>>::kCols;
  bool finite = true;
  for (Index col = 0; col < values.cols; ++col) {
    simd::Pair& pair = to[col / kCols * page_size / 2 * kCols + row / 2 * kCols + col % kCols];
    pair.second = static_cast<Eigen::bfloat16>(values(0, col));
    if (!std::isfinite(static_cast<float>(pair.second))) finite = false;
  }
  return finite;
}

/// Packs values into rows [first, …) of a page of page_size rows of pairs; the second of a last pair is 0 until another
/// row comes.
template <typename Scalar>
bool pack_values_into_page(simd::Pair* to, Index page_size, Index first, const StridedView<const Scalar>& values) {
  constexpr Index kCols = Tile<ArithmeticOf<Scalar>>::kCols;
  const Index begun = std::min(first % 2, values.rows);  // rows that complete a pair
  const bool finite = begun == 0 || complete_pairs(to, page_size, first, values);
  const auto rest = values.middle_rows(begun, values.rows - begun);
  simd::Pair* const pairs = to + (first + begun) / 2 * kCols;
  if constexpr (is_packed_at_once<Scalar, simd::Pair>) {
    return pack_columns(pairs, page_size / 2, rest) && finite;
  } else {
    bool rest_finite = true;
    for (Index col = 0; col < rest.cols; ++col) {
      simd::Pair* const column = pairs + col / kCols * page_size / 2 * kCols + col % kCols;
      for (Index pair = 0; pair < divide_up(rest.rows, 2); ++pair) {
        column[pair * kCols] = pair_at(&rest(0, col), rest.row_stride, rest.rows, pair);
        rest_finite &= std::isfinite(static_cast<float>(column[pair * kCols].first)) &&
                       std::isfinite(static_cast<float>(column[pair * kCols].second));
      }
    }
    return rest_finite && finite;
  }
}

/// Packs the rows of one head's keys (all maps side by side) and values into rows [first, …) of a page.
template <typename Scalar, typename Storage>
void pack_into_page(Page<Storage>& page, const PageShape& shape, Index head, Index first,
                    const StridedView<const Scalar>& k, const StridedView<const Scalar>& v) {
  using Stored = StoredAs<Storage>;
  for (Index map = 0; map < shape.key_maps; ++map) {
    pack_keys_into_page(page.data.get() + shape.keys_offset<Stored>(head, map), first,
                        k.middle_cols(map * shape.d, shape.d));
  }
  Stored* const values = page.data.get() + shape.values_offset<Stored>(head);
  const bool finite = pack_values_into_page(values, shape.page_size, first, v);
  char& flag = page.finite_values[static_cast<std::size_t>(head)];
  flag = finite && (first == 0 || flag != 0);
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
