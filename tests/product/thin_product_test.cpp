// The product of a few rows: every number of rows, every layout and stored type, and the bits of the product of many.

#include "diffattn/product/thin_product.hpp"

#include <cstring>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/product/matmul.hpp"
#include "product/plain.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"

namespace {

using diffattn::Serial;
using diffattn::StridedView;
using diffattn::Workspace;
using diffattn::detail::multiply_thin;
using diffattn::detail::ThinOutput;
using diffattn::detail::view_of;
using diffattn::detail::writable_view_of;
using support::Index;
using support::Laid;
using support::Layout;

template <typename Scalar, typename Stored>
void thin_multiply_one(const StridedView<Scalar>& y, const StridedView<const Scalar>& x,
                       const StridedView<const Stored>& w, const Scalar* bias = nullptr) {
  Workspace workspace;
  Serial serial;
  const ThinOutput<Scalar, Stored> output{y, w, bias};
  multiply_thin(std::span<const ThinOutput<Scalar, Stored>>(&output, 1), x, workspace, serial);
}

template <typename Scalar>
std::vector<Scalar> thin_bias(Index outputs) {
  std::vector<Scalar> bias(static_cast<std::size_t>(outputs));
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<Scalar>(i % 7) - 3;
  return bias;
}

/// Values with all their bits in use, so that another order of additions shows.
template <typename T>
support::Matrix<T> thin_fractions(Index rows, Index cols, support::Rng& rng) {
  std::uniform_real_distribution<float> numbers(-1, 1);
  support::Matrix<T> matrix(rows, cols);
  for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = static_cast<T>(numbers(rng));
  return matrix;
}

template <typename Scalar>
bool thin_same_bits(const support::Matrix<Scalar>& a, const support::Matrix<Scalar>& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return false;
  // Nothing has no address that memcmp would take.
  return a.size() == 0 || std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(Scalar)) == 0;
}

}  // namespace

TEMPLATE_TEST_CASE("A thin product is x Wᵀ + b for every number of rows and stored type", "[product]",
                   DIFFATTN_TEST_SCALARS) {
  support::Rng rng = support::make_rng();
  const auto check = [&]<typename Stored>(Stored) {
    for (Index rows = 1; rows <= 70; ++rows) {
      const Index depth = 1 + (rows * 37) % 200, outputs = 1 + (rows * 53) % 200;
      INFO("rows " << rows << ", depth " << depth << ", outputs " << outputs << ", bytes " << sizeof(Stored));
      const auto x = support::whole_numbers<TestType>(rows, depth, rng);
      const auto w = support::whole_numbers<Stored>(outputs, depth, rng);
      const auto bias = thin_bias<TestType>(outputs);
      const support::Matrix<Stored> right = w.transpose();
      const support::Matrix<TestType> start = support::Matrix<TestType>::Zero(rows, outputs);
      const Laid<TestType> x_laid(x, support::kLayouts[static_cast<std::size_t>(rows) % 5]);
      const Laid<TestType> y(start, support::kLayouts[static_cast<std::size_t>(rows / 5) % 5]);
      const Laid<Stored> w_laid(w, rows % 2 == 0 ? Layout::rows : Layout::rows_apart);
      thin_multiply_one(y.view(), x_laid.read(), w_laid.read(), bias.data());
      CHECK(y.matrix() == support::plain_product(x, right, bias));
      CHECK(y.surroundings_untouched());
    }
  };
  check(TestType{});
  check(float{});
  check(Eigen::bfloat16{});
  check(Eigen::half{});
}

TEMPLATE_TEST_CASE("A thin product has the bits of the packed one, and of every row by itself", "[product]",
                   DIFFATTN_TEST_SCALARS) {
  support::Rng rng = support::make_rng();
  for (const Index depth : {1, 63, 64, 65, 200, 1100}) {
    const Index outputs = depth == 1100 ? 200 : 61;
    const auto all = thin_fractions<TestType>(64, depth, rng);
    const auto w = thin_fractions<TestType>(outputs, depth, rng);
    const Laid<TestType> x(all, Layout::rows), w_laid(w, Layout::rows);
    support::Matrix<TestType> packed(64, outputs);
    Workspace workspace;
    Serial serial;
    diffattn::detail::multiply<TestType, TestType>(writable_view_of(packed), x.read(), w_laid.read().transposed(),
                                                   nullptr, diffattn::Store::overwrite, workspace, serial);
    for (const Index rows : {1, 5, 8, 9, 16, 17, 31, 32, 33, 48, 49, 64}) {
      INFO("depth " << depth << ", rows " << rows);
      support::Matrix<TestType> y(rows, outputs);
      thin_multiply_one(writable_view_of(y), x.read().middle_rows(0, rows), w_laid.read());
      CHECK(thin_same_bits<TestType>(y, packed.topRows(rows)));
    }
  }
}

TEST_CASE("Thin products of one x have the same bits for any number of threads, some of them empty", "[product]") {
  support::Rng rng = support::make_rng();
  const Index depth = 130;
  for (const Index rows : {5, 12, 40}) {
    const auto x = thin_fractions<float>(rows, depth, rng);
    const Laid<float> x_laid(x, Layout::rows);
    std::vector<support::Matrix<float>> weights, expected;
    for (const Index outputs : {0, 150, 1, 0, 300, 0}) {
      weights.push_back(thin_fractions<float>(outputs, depth, rng));
      expected.emplace_back(rows, outputs);
      if (outputs == 0) continue;
      const Laid<float> w(weights.back(), Layout::rows);
      thin_multiply_one(writable_view_of(expected.back()), x_laid.read(), w.read());
    }
    for (const Index threads : {1, 2, 3}) {
      INFO("rows " << rows << ", threads " << threads);
      std::vector<support::Matrix<float>> ys = expected;
      std::vector<ThinOutput<float, float>> outputs;
      for (std::size_t i = 0; i < ys.size(); ++i) {
        ys[i].setZero();
        outputs.push_back({writable_view_of(ys[i]), view_of(weights[i])});
      }
      diffattn::ThreadPool pool(threads);
      Workspace workspace;
      multiply_thin(std::span<const ThinOutput<float, float>>(outputs), x_laid.read(), workspace, pool);
      for (std::size_t i = 0; i < ys.size(); ++i) CHECK(thin_same_bits(ys[i], expected[i]));
    }
  }
}

TEST_CASE("NaN and Inf stay in their row of x or their row of W", "[product]") {
  support::Rng rng = support::make_rng();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();
  for (const Index rows : {5, 16, 33}) {
    auto x = support::whole_numbers<float>(rows, 70, rng), w = support::whole_numbers<float>(50, 70, rng);
    x.col(3).setOnes();
    const auto multiply = [&] {
      support::Matrix<float> y(rows, 50);
      thin_multiply_one(writable_view_of(y), view_of(std::as_const(x)), view_of(std::as_const(w)));
      return y;
    };
    const auto clean = multiply();
    x(rows - 1, 69) = kNaN;
    w(49, 3) = kInf;
    const auto y = multiply();
    CHECK(y.row(rows - 1).array().isNaN().all());
    CHECK((y.col(49).head(rows - 1).array() == kInf).all());
    CHECK(y.topLeftCorner(rows - 1, 49) == clean.topLeftCorner(rows - 1, 49));
  }
}
