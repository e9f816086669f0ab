// What the library throws.

#include "diffattn/core/error.hpp"

#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

using diffattn::FormatError;
using diffattn::ShapeError;

static_assert(std::is_base_of_v<std::invalid_argument, ShapeError>);
static_assert(std::is_base_of_v<std::runtime_error, FormatError>);

TEST_CASE("A shape that is right passes") {
  const diffattn::Matrix<float> m(3, 4);
  CHECK_NOTHROW(diffattn::detail::check_shape("here", "m", m, 3, 4));
  CHECK_NOTHROW(diffattn::detail::check_shape("here", "m", m.topRows(0), 0, 4));
}

TEST_CASE("A shape that is wrong is named, with what was expected and what came") {
  const diffattn::Matrix<float> m(3, 4);
  const auto message = [&](diffattn::Index rows, diffattn::Index cols) {
    return support::thrown_by<ShapeError>([&] { diffattn::detail::check_shape("here", "m", m, rows, cols); });
  };
  CHECK(message(3, 5) == "here: m must be 3 x 5, got 3 x 4");
  CHECK(message(4, 3) == "here: m must be 4 x 3, got 3 x 4");
  CHECK(message(0, 4) == "here: m must be 0 x 4, got 3 x 4");
}
