// y = x Wᵀ + b, the product of linear layers: every way that it goes for its number of rows and its layouts, on any
// threads, and what is not finite.

#include "diffattn/product/matmul.hpp"

#include <cstring>

#include "diffattn/core/parallel_threads.hpp"
#include "product/plain.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/scalars.hpp"

namespace {

using diffattn::detail::matmul_transposed;
using support::AnyExecutor;
using support::Index;
using support::Laid;
using support::Layout;
using support::Matrix;

/// For one size, of whole numbers: right to the last bit and nowhere else. `draw` picks the layouts.
template <typename Scalar, typename Stored>
void check_matmul(Index rows, Index depth, Index outputs, Index draw, AnyExecutor executor, support::Rng& rng) {
  INFO(rows << " x " << depth << ", " << outputs << " outputs, draw " << draw << ", bytes " << sizeof(Stored));
  const auto x = support::whole_numbers<Scalar>(rows, depth, rng);
  const auto w = support::whole_numbers<Stored>(outputs, depth, rng);
  const Matrix<Scalar> bias_row = support::whole_numbers<Scalar>(1, outputs, rng);
  const bool has_bias = draw % 2 == 0 && outputs != 0;
  const std::vector<Scalar> bias(bias_row.data(), bias_row.data() + (has_bias ? outputs : 0));
  const auto layout = [&](Index divisor) {
    // Most of them with contiguous rows, which have ways of their own.
    return draw % 3 != 0 ? Layout::rows : support::kLayouts[static_cast<std::size_t>(draw / divisor) % 5];
  };
  const Laid<Scalar> y(Matrix<Scalar>::Constant(rows, outputs, 9), layout(3)), x_laid(x, layout(15));
  const Laid<Stored> w_laid(w, layout(75));
  diffattn::Workspace workspace;
  matmul_transposed(y.view(), x_laid.read(), w_laid.read(), has_bias ? bias.data() : nullptr, workspace, executor);
  CHECK(y.matrix() == support::plain_product(x, Matrix<Stored>(w.transpose()), bias));
  CHECK(y.surroundings_untouched());
}

template <typename Scalar>
Matrix<Scalar> matmul_of(const Matrix<Scalar>& x, const Matrix<Scalar>& w, AnyExecutor executor) {
  Matrix<Scalar> y = Matrix<Scalar>::Constant(x.rows(), w.rows(), 9);
  diffattn::Workspace workspace;
  matmul_transposed(diffattn::detail::writable_view_of(y), diffattn::detail::view_of(x), diffattn::detail::view_of(w),
                    static_cast<const Scalar*>(nullptr), workspace, executor);
  return y;
}

}  // namespace

TEMPLATE_TEST_CASE("matmul_transposed is x Wᵀ + b for every way that it goes", "[product]", DIFFATTN_TEST_SCALARS) {
  support::Rng rng = support::make_rng();
  diffattn::Serial serial;
  diffattn::ThreadPool pool(3);
  Index draw = 0;
  for (const Index rows : {0, 1, 2, 3, 4, 5, 8, 17, 63, 64, 65, 90}) {
    for (const Index outputs : {0, 1, 63, 64, 65, 130}) {
      for (const Index depth : {0, 1, 15, 64, 97}) {
        const AnyExecutor executor = draw % 4 == 0 ? AnyExecutor(pool) : AnyExecutor(serial);
        check_matmul<TestType, TestType>(rows, depth, outputs, draw, executor, rng);
        check_matmul<TestType, Eigen::bfloat16>(rows, depth, outputs, draw, executor, rng);
        ++draw;
      }
    }
  }
}

TEMPLATE_TEST_CASE("matmul_transposed has the same bits for any threads, and a few rows each by itself", "[product]",
                   DIFFATTN_TEST_SCALARS) {
  support::Rng rng = support::make_rng();
  std::uniform_real_distribution<TestType> numbers(-1, 1);
  const auto fractions = [&](Index rows, Index cols) {
    return Matrix<TestType>(Matrix<TestType>::NullaryExpr(rows, cols, [&] { return numbers(rng); }));
  };
  const auto same_bits = [](const Matrix<TestType>& a, const Matrix<TestType>& b) {
    return a.size() == b.size() &&
           std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(TestType)) == 0;
  };
  diffattn::Serial serial;
  const Matrix<TestType> w = fractions(201, 331);
  for (const Index rows : {1, 2, 3, 4, 5, 40, 100}) {
    const Matrix<TestType> x = fractions(rows, 331), y = matmul_of(x, w, AnyExecutor(serial));
    INFO(rows << " rows");
    for (const Index threads : {2, 3, 4}) {
      diffattn::ThreadPool pool(threads);
      CHECK(same_bits(matmul_of(x, w, AnyExecutor(pool)), y));
    }
    // Up to 4 rows go one way, more rows another, whose sums have other bits.
    const Index together = rows <= 4 ? 1 : 5;
    for (Index row = 0; row + together <= rows; row += together) {
      CHECK(same_bits(matmul_of<TestType>(x.middleRows(row, together), w, AnyExecutor(serial)),
                      y.middleRows(row, together)));
    }
  }
}

TEST_CASE("What is not finite stays in its row of x or its output in matmul_transposed", "[product]") {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();
  support::Rng rng = support::make_rng();
  diffattn::Serial serial;
  for (const Index rows : {2, 4, 5, 33, 70}) {
    INFO(rows << " rows");
    Matrix<float> x = support::whole_numbers<float>(rows, 70, rng), w = support::whole_numbers<float>(50, 70, rng);
    x.col(3).setOnes();
    const Matrix<float> clean = matmul_of(x, w, AnyExecutor(serial));
    x(rows - 1, 69) = kNaN;
    w(49, 3) = kInf;
    const Matrix<float> y = matmul_of(x, w, AnyExecutor(serial));
    CHECK(y.row(rows - 1).array().isNaN().all());
    CHECK((y.col(49).head(rows - 1).array() == kInf).all());
    CHECK(y.topLeftCorner(rows - 1, 49) == clean.topLeftCorner(rows - 1, 49));
  }
}
