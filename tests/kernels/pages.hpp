#pragma once

// Keys and values in the pages of a cache, for tests of the kernels that read them.

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "diffattn/kernels/detail/arithmetic.hpp"
#include "diffattn/kernels/key_value_pages.hpp"
#include "support/random.hpp"

namespace support {

using diffattn::Index;

/// Keys and values of all heads in pages, packed a few rows at a time.
template <typename Storage>
struct Pages {
  template <typename Scalar>
  Pages(const diffattn::Matrix<Scalar>& k, const diffattn::Matrix<Scalar>& v, Index heads, Index key_maps, Rng& rng,
        Index page_size = diffattn::detail::kPageKeys) {
    namespace detail = diffattn::detail;
    constexpr Index kStrip = detail::Tile<detail::ArithmeticOf<Scalar>>::kCols;
    packed.shape = {heads, key_maps, k.cols() / heads / key_maps, v.cols() / heads, kStrip, page_size};
    packed.n_k = k.rows();
    for (Index row = 0; row < k.rows();) {
      if (row % page_size == 0) pages.push_back(std::make_shared<detail::Page<Storage>>(packed.shape));
      const Index at = row % page_size, room = std::min(page_size - at, k.rows() - row);
      const Index count = std::uniform_int_distribution<Index>(1, room)(rng), width = k.cols() / heads;
      for (Index head = 0; head < heads; ++head) {
        pack_into_page(*pages.back(), packed.shape, head, at, detail::view_of(k).block(row, head * width, count, width),
                       detail::view_of(v).block(row, head * packed.shape.dv, count, packed.shape.dv));
      }
      row += count;
    }
    packed.pages = pages.data();
  }

  /// Drops whole pages in front, as a window does.
  void drop(Index count) {
    pages.erase(pages.begin(), pages.begin() + count);
    packed.pages = pages.data();
    packed.first_key += count * packed.shape.page_size;
    packed.n_k -= count * packed.shape.page_size;
  }

  std::vector<std::shared_ptr<diffattn::detail::Page<Storage>>> pages;
  diffattn::KeyValuePages<Storage> packed;
};

}  // namespace support
