// Packing: every value in its place, from any strides and any storage type, and what fills up the last group or strip.

#include "diffattn/product/packed.hpp"

#include <limits>
#include <tuple>

#include "product/plain.hpp"
#include "support/catch.hpp"

namespace {

using support::Index;
using support::Laid;
using support::Layout;

/// A scalar and the type that it is stored as.
template <typename S, typename T>
struct Storing {
  using Scalar = S;
  using Stored = T;
};

using StorageTypes = std::tuple<Storing<float, float>, Storing<double, double>, Storing<double, float>,
                                Storing<float, Eigen::half>, Storing<float, Eigen::bfloat16>>;

/// How often to[place(r, c)] is not matrix(r, c), which is what makes `to` wrong.
template <typename Scalar, typename T, typename Place>
Index wrong_places(const support::Matrix<T>& matrix, Index rows, Index cols, const Place& place, const Scalar* to) {
  Index wrong = 0;
  for (Index r = 0; r < rows; ++r) {
    for (Index c = 0; c < cols; ++c) {
      const T& expected = matrix(std::min(r, matrix.rows() - 1), std::min(c, matrix.cols() - 1));
      wrong += to[place(r, c)] != static_cast<Scalar>(expected);
    }
  }
  return wrong;
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("Rows are packed in groups, the last filled up with its last row", "[product]", StorageTypes) {
  using Scalar = typename TestType::Scalar;
  constexpr Index kRows = diffattn::detail::Tile<Scalar>::kRows;
  support::Rng rng = support::make_rng();
  for (const Index rows : {Index{1}, kRows - 1, kRows, kRows + 1, 3 * kRows + 2}) {
    for (const Index depth : {1, 2, 4, 7, 8, 9, 16, 17, 33}) {
      const auto a = support::whole_numbers<typename TestType::Stored>(rows, depth, rng);
      for (const Layout layout : support::kLayouts) {
        const Laid<typename TestType::Stored> laid(a, layout);
        const Index padded = diffattn::detail::round_up(rows, kRows);
        support::Aligned<Scalar> to(padded * depth, Scalar(99));
        diffattn::detail::pack_rows(to.data(), laid.read());
        const auto place = [&](Index r, Index k) { return r / kRows * kRows * depth + k * kRows + r % kRows; };
        INFO(rows << " x " << depth << ", " << describe(layout));
        CHECK(wrong_places(a, padded, depth, place, to.data()) == 0);
        CHECK(to.end_untouched());
      }
    }
  }
}

TEMPLATE_LIST_TEST_CASE("Copied rows are the rows times the factor", "[product]", StorageTypes) {
  using Scalar = typename TestType::Scalar;
  support::Rng rng = support::make_rng();
  for (const Index rows : {0, 1, 5}) {
    for (const Index depth : {1, 4, 9}) {
      const auto a = support::whole_numbers<typename TestType::Stored>(rows, depth, rng);
      for (const Layout layout : support::kLayouts) {
        const Laid<typename TestType::Stored> laid(a, layout);
        support::Aligned<Scalar> to(rows * depth, Scalar(99));
        diffattn::detail::copy_rows(to.data(), laid.read(), Scalar(0.5));
        INFO(rows << " x " << depth << ", " << describe(layout));
        Index wrong = 0;
        for (Index i = 0; i < rows * depth; ++i) wrong += to[i] != static_cast<Scalar>(a.data()[i]) * Scalar(0.5);
        CHECK(wrong == 0);
        CHECK(to.end_untouched());
      }
    }
  }
}

TEMPLATE_LIST_TEST_CASE("Transposed rows become strips, each filled up to whole packets with its last row", "[product]",
                        StorageTypes) {
  using Scalar = typename TestType::Scalar;
  constexpr Index kCols = diffattn::detail::Tile<Scalar>::kCols, kLanes = diffattn::simd::kLanes<Scalar>;
  support::Rng rng = support::make_rng();
  for (const Index first : {Index{0}, kCols}) {
    for (const Index count : {Index{1}, kLanes, kCols - 1, kCols, kCols + 1, 3 * kCols}) {
      for (const Index depth : {1, 3, 4, 7, 8, 9, 17, 32}) {
        const auto source = support::whole_numbers<typename TestType::Stored>(first + count, depth, rng);
        for (const Layout layout : support::kLayouts) {
          const Laid<typename TestType::Stored> laid(source, layout);
          support::Aligned<Scalar> to(diffattn::detail::packed_strips_size<Scalar>(first + count, depth), Scalar(99));
          diffattn::detail::pack_transposed(to.data(), laid.read(), first, count);
          const auto place = [&](Index c, Index k) {
            return (first + c) / kCols * kCols * depth + k * kCols + (first + c) % kCols;
          };
          INFO("rows " << first << " + " << count << ", depth " << depth << ", " << describe(layout));
          CHECK(wrong_places<Scalar, typename TestType::Stored>(
                    source.bottomRows(count), diffattn::detail::round_up(count, kLanes), depth, place, to.data()) == 0);
          CHECK(std::count(to.data(), to.data() + first * depth, Scalar(99)) == first * depth);
          CHECK(to.end_untouched());
        }
      }
    }
  }
}

TEMPLATE_LIST_TEST_CASE("Columns become strips, filled up with zeros, at any stride", "[product]", StorageTypes) {
  using Scalar = typename TestType::Scalar;
  constexpr Index kCols = diffattn::detail::Tile<Scalar>::kCols, kLanes = diffattn::simd::kLanes<Scalar>;
  support::Rng rng = support::make_rng();
  for (const Index rows : {1, 7, 8, 9, 20}) {
    for (const Index cols : {Index{1}, kLanes, kCols - 1, kCols, kCols + 1, 3 * kCols - 1}) {
      const auto source = support::whole_numbers<typename TestType::Stored>(rows, cols, rng);
      for (const Layout layout : support::kLayouts) {
        for (const bool ahead : {false, true}) {
          const Laid<typename TestType::Stored> laid(source, layout);
          const Index stride = rows + 2, padded = diffattn::detail::round_up(cols, kCols);
          support::Aligned<Scalar> to(padded * stride, Scalar(99));
          INFO(rows << " x " << cols << ", " << describe(layout) << ", ahead " << ahead);
          CHECK(diffattn::detail::pack_columns(to.data(), stride, laid.read(), ahead));
          const auto place = [&](Index k, Index c) { return c / kCols * kCols * stride + k * kCols + c % kCols; };
          CHECK(wrong_places(source, rows, cols, place, to.data()) == 0);
          Index not_zero = 0;
          for (Index k = 0; k < rows; ++k) {
            for (Index c = cols; c < padded; ++c) not_zero += to[place(k, c)] != 0;
          }
          CHECK(not_zero == 0);
          CHECK(std::count(to.data(), to.data() + padded * stride, Scalar(99)) == padded * (stride - rows));
          CHECK(to.end_untouched());
        }
      }
    }
  }
}

TEMPLATE_LIST_TEST_CASE("One NaN or infinity anywhere in columns is found, and the largest numbers are none",
                        "[product]", StorageTypes) {
  using Scalar = typename TestType::Scalar;
  using Stored = typename TestType::Stored;
  using Limits = std::numeric_limits<Stored>;
  constexpr Index kCols = diffattn::detail::Tile<Scalar>::kCols, kRows = 9;
  for (const Index cols : {kCols - 1, kCols, 2 * kCols + 1}) {
    for (const Layout layout : {Layout::rows, Layout::columns}) {
      support::Aligned<Scalar> to(diffattn::detail::packed_strips_size<Scalar>(cols, kRows), Scalar(0));
      const Laid<Stored> laid(support::Matrix<Stored>::Constant(kRows, cols, Limits::max()), layout);
      INFO(cols << " columns, " << describe(layout));
      CHECK(diffattn::detail::pack_columns(to.data(), kRows, laid.read()));
      Index missed = 0;
      for (Index i = 0; i < kRows; ++i) {
        for (Index j = 0; j < cols; ++j) {
          for (const Stored bad : {Limits::quiet_NaN(), Limits::infinity(), Stored(-Limits::infinity())}) {
            laid.view()(i, j) = bad;
            missed += diffattn::detail::pack_columns(to.data(), kRows, laid.read());
          }
          laid.view()(i, j) = Limits::max();
        }
      }
      CHECK(missed == 0);
    }
  }
}
