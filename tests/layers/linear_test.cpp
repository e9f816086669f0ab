#include <diffattn/layers/linear.hpp>

#include "layers/layer_checks.hpp"
#include "support/scalars.hpp"

namespace {

using diffattn::FrozenMatrix;
using diffattn::Index;
using diffattn::Linear;
using diffattn::Matrix;

template <typename S>
Linear<S> random_linear(Index in, Index out, bool bias, std::mt19937_64& rng) {
  Linear<S> linear(in, out, bias);
  linear.weight = random_matrix<S>(out, in, rng);
  if (bias) linear.bias = random_matrix<S>(out, 1, rng);
  return linear;
}

template <typename S, typename Weight>
Matrix<S> apply(const Linear<S, Weight>& linear, const Matrix<S>& x) {
  diffattn::Workspace workspace;
  Matrix<S> y(x.rows(), linear.weight.rows());
  linear.forward_into(y, x, workspace);
  return y;
}

/// A sum of `in` products and a bias, in any order: each is rounded at most in + 1 times.
template <typename S>
void check_against_long_double(const Linear<S>& linear, const Matrix<S>& x, const Matrix<S>& y) {
  using Wide = Matrix<long double>;
  const Wide w = linear.weight.template cast<long double>(), wide_x = x.template cast<long double>();
  Wide exact = wide_x * w.transpose(), magnitude = wide_x.cwiseAbs() * w.cwiseAbs().transpose();
  if (linear.bias.size() != 0) {
    exact.rowwise() += linear.bias.template cast<long double>().transpose();
    magnitude.rowwise() += linear.bias.template cast<long double>().cwiseAbs().transpose();
  }
  const long double unit = std::numeric_limits<S>::epsilon() / 2;
  const Wide bound = (static_cast<long double>(x.cols()) + 1) * 1.01L * unit * magnitude;
  REQUIRE(((y.template cast<long double>() - exact).cwiseAbs().array() <= bound.array()).all());
}

}  // namespace

TEMPLATE_TEST_CASE("Linear is x Wᵀ + b at every shape", "[layers][linear]", DIFFATTN_TEST_SCALARS) {
  auto rng = make_rng();
  const bool bias = GENERATE(false, true);
  const auto check = [&](Index n, Index in, Index out) {
    INFO("n " << n << ", in " << in << ", out " << out << ", bias " << bias);
    const auto linear = random_linear<TestType>(in, out, bias, rng);
    const Matrix<TestType> x = random_matrix<TestType>(n, in, rng);
    check_against_long_double(linear, x, apply(linear, x));
  };
  for (const Index in : {1, 3, 8, 17, 64, 191, 192, 193, 700}) {
    for (const Index out : {1, 2, 5, 16, 17, 33, 130, 300}) {
      for (const Index n : {0, 1, 2, 4, 5, 6, 7, 13, 48, 49, 110}) {
        if (n * in * out <= 3'000'000) check(n, in, out);
      }
    }
  }
  check(1025, 200, 9);  // more rows than a block has
  check(2060, 3, 300);
  check(5, 2050, 9);  // more depth than one has
}

TEMPLATE_TEST_CASE("Linear reads and writes any strides, and nothing beside its output", "[layers][linear]",
                   DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  auto rng = make_rng();
  const auto linear = random_linear<S>(19, 37, true, rng);
  diffattn::Workspace workspace;
  for (const Index n : {1, 3, 9, 50}) {
    INFO("n " << n);
    const Matrix<S> wide = random_matrix<S>(n + 2, 30, rng);
    const Matrix<S> x = wide.block(1, 4, n, 19), expected = apply(linear, x);
    // One row is read in place or through a packed copy, depending on its strides: the sums are ordered differently.
    const auto same = [&](const auto& y) { return y.isApprox(expected, S(20) * std::numeric_limits<S>::epsilon()); };

    Matrix<S> frame = Matrix<S>::Constant(n + 2, 50, S(7));
    linear.forward_into(frame.block(1, 5, n, 37), wide.block(1, 4, n, 19), workspace);
    CHECK(same(frame.block(1, 5, n, 37)));
    frame.block(1, 5, n, 37).setConstant(S(7));
    CHECK((frame.array() == S(7)).all());

    const Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic> by_columns = x;
    Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic> y_by_columns(n, 37);
    linear.forward_into(y_by_columns, by_columns, workspace);
    CHECK(same(y_by_columns));

    Matrix<S> y(n, 37);
    linear.forward_into(y, x + Matrix<S>::Zero(n, 19), workspace);
    CHECK(identical(y, expected));
  }
}

TEMPLATE_TEST_CASE("Weights of another type multiply as their widened values", "[layers][linear]",
                   DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  auto rng = make_rng();
  for (const Index in : {1, 17, 64, 300}) {
    for (const Index out : {1, 5, 130}) {
      const auto check = [&]<typename Stored>(Stored) {
        const Matrix<Stored> stored = random_matrix<S>(out, in, rng).template cast<Stored>();
        Linear<S> wide(in, out, true);
        wide.weight = stored.template cast<S>();
        wide.bias = random_matrix<S>(out, 1, rng);
        Linear<S, Matrix<Stored>> narrow(in, out, true);
        narrow.weight = stored;
        narrow.bias = wide.bias;
        Linear<S, FrozenMatrix> frozen(in, out, true);
        frozen.weight = FrozenMatrix(stored);
        frozen.bias = wide.bias;
        CHECK(frozen.weight.memory_bytes() == static_cast<std::size_t>(in * out) * sizeof(Stored));
        CHECK(identical(frozen.weight.template to_matrix<S>(), wide.weight));
        for (const Index n : {0, 1, 3, 50}) {
          INFO("in " << in << ", out " << out << ", n " << n << ", bytes a weight " << sizeof(Stored));
          const Matrix<S> x = random_matrix<S>(n, in, rng), expected = apply(wide, x);
          CHECK(identical(apply(narrow, x), expected));
          CHECK(identical(apply(frozen, x), expected));
        }
      };
      check(Eigen::bfloat16{});
      check(Eigen::half{});
      check(float{});
      check(S{});
    }
  }
}

TEST_CASE("A frozen weight shares what it is given, and is refused while it is not", "[layers][linear]") {
  auto values = std::make_shared<Matrix<float>>(Matrix<float>::Constant(3, 4, 2));
  Linear<float, FrozenMatrix> linear(4, 3);
  const Matrix<float> x = Matrix<float>::Ones(1, 4);
  CHECK(thrown_by<std::invalid_argument>([&] { apply(linear, x); }) == "FrozenMatrix: has no values yet");
  const std::weak_ptr<Matrix<float>> alive = values;
  linear.weight = FrozenMatrix(std::shared_ptr<const float>(values, values->data()), 3, 4);
  values->setConstant(3);
  values.reset();
  CHECK(apply(linear, x)(0, 2) == 12);
  const auto copy = linear;
  linear.weight = FrozenMatrix(3, 4);
  CHECK(apply(copy, x)(0, 0) == 12);
  CHECK_FALSE(alive.expired());
}

TEST_CASE("Linear gives the same bits for any number of threads", "[layers][linear]") {
  auto rng = make_rng();
  for (const Index n : {1, 4, 5, 130, 1100}) {
    const auto linear = random_linear<float>(301, 275, true, rng);
    const Matrix<float> x = random_matrix<float>(n, 301, rng), expected = apply(linear, x);
    for (const Index threads : {1, 2, 4}) {
      INFO("n " << n << ", threads " << threads);
      diffattn::ThreadPool pool(threads);
      diffattn::Workspace workspace;
      Matrix<float> y(n, 275);
      linear.forward_into(y, x, workspace, pool);
      CHECK(identical(y, expected));
    }
  }
}

TEST_CASE("NaN in one row of x stays in that row of y", "[layers][linear]") {
  auto rng = make_rng();
  const auto linear = random_linear<float>(40, 35, false, rng);
  Matrix<float> x = random_matrix<float>(20, 40, rng);
  const Matrix<float> expected = apply(linear, x);
  x(7, 3) = std::numeric_limits<float>::quiet_NaN();
  const Matrix<float> y = apply(linear, x);
  CHECK(y.row(7).array().isNaN().all());
  CHECK(identical(y.topRows(7), expected.topRows(7)));
  CHECK(identical(y.bottomRows(12), expected.bottomRows(12)));
}

TEST_CASE("Linear refuses an x or y that does not fit, and writes nothing", "[layers][linear]") {
  const Linear<float> linear(4, 3);
  diffattn::Workspace workspace;
  Matrix<float> y = Matrix<float>::Constant(5, 3, 7.0f);
  CHECK(thrown_by<diffattn::ShapeError>([&] { linear.forward_into(y, Matrix<float>(5, 6), workspace); }) ==
        "Linear: x must be 5 x 4, got 5 x 6");
  CHECK(thrown_by<diffattn::ShapeError>([&] { linear.forward_into(y, Matrix<float>(2, 4), workspace); }) ==
        "Linear: y must be 2 x 3, got 5 x 3");
  CHECK((y.array() == 7.0f).all());
}
