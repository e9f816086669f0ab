#include <algorithm>
#include <cmath>
#include <cstddef>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/layers/layer_norm.hpp>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numerical_gradient.hpp"
#include "support/parameters_of.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace layer_norm_test {

using diffattn::Index;
using diffattn::LayerNorm;
using diffattn::Matrix;
using diffattn::Workspace;
using support::identical;
using support::make_rng;
using support::random_matrix;
using support::thrown_by;
using LongMatrix = Matrix<long double>;

template <typename S>
LayerNorm<S> random_norm(Index width, double eps, bool with_weight, bool with_bias, support::Rng& rng) {
  LayerNorm<S> norm(width, eps, with_weight, with_bias);
  if (with_weight) norm.weight = random_matrix<S>(width, 1, rng);
  if (with_bias) norm.bias = random_matrix<S>(width, 1, rng);
  return norm;
}

/// (x − mean) / sqrt(var + eps), in plain loops; of x less its first value, which changes nothing and keeps a long
/// double's digits for what varies.
inline LongMatrix normalized(const LongMatrix& x, double eps) {
  LongMatrix z(x.rows(), x.cols());
  for (Index i = 0; i < x.rows(); ++i) {
    const auto width = static_cast<long double>(x.cols());
    const auto shifted = [&](Index c) { return x(i, c) - x(i, 0); };
    long double mean = 0, variance = 0;
    for (Index c = 0; c < x.cols(); ++c) mean += shifted(c) / width;
    for (Index c = 0; c < x.cols(); ++c) variance += (shifted(c) - mean) * (shifted(c) - mean) / width;
    for (Index c = 0; c < x.cols(); ++c) z(i, c) = (shifted(c) - mean) / std::sqrt(variance + eps);
  }
  return z;
}

/// y against plain loops in long double. The deviations are rounded a few times and sums of `width` of them as often,
/// relative to deviations of order 1: the bound does not know the mean.
template <typename S>
void check_forward(const LayerNorm<S>& norm, const Matrix<S>& x, const Matrix<S>& y) {
  const LongMatrix z = normalized(x.template cast<long double>(), norm.eps);
  const Index width = norm.width();
  const long double unit = support::kUnitRoundoff<S>;
  for (Index i = 0; i < x.rows(); ++i) {
    long double worst = 0;
    for (Index c = 0; c < width; ++c) {
      const long double w = norm.weight.size() == 0 ? 1 : norm.weight(c), b = norm.bias.size() == 0 ? 0 : norm.bias(c);
      const long double bound = (static_cast<long double>(width) + 8) * (1 + std::abs(z(i, c))) * std::abs(w);
      const long double error = std::abs(static_cast<long double>(y(i, c)) - (w * z(i, c) + b));
      worst = std::max(worst, error / (unit * (bound + 2 * std::abs(b))));
    }
    CAPTURE(i, worst);
    CHECK(worst <= 1);
  }
}

}  // namespace layer_norm_test

using namespace layer_norm_test;

TEMPLATE_TEST_CASE("LayerNorm is (x − mean) / sqrt(var + eps) ∘ w + b", "[layers][layer_norm]", DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  auto rng = make_rng();
  const bool with_weight = GENERATE(false, true), with_bias = GENERATE(false, true);
  const double eps = GENERATE(1e-5, 0.5);
  for (const Index width : {1, 2, 7, 16, 33, 128, 1000}) {
    INFO("width " << width << ", weight " << with_weight << ", bias " << with_bias << ", eps " << eps);
    const LayerNorm<S> norm = random_norm<S>(width, eps, with_weight, with_bias, rng);
    Matrix<S> x = random_matrix<S>(5, width, rng);
    x.row(1) *= S(1e-3);  // eps counts
    x.row(2) *= S(1e6);
    x.row(3).setZero();
    x.row(4).array() += S(3);
    const Matrix<S> y = norm.forward(x);
    check_forward(norm, x, y);
    // What does not vary is the bias, exactly: a row of zeros, and any row of one column.
    const Matrix<S> bias = with_bias ? Matrix<S>(norm.bias.transpose()) : Matrix<S>::Zero(1, width);
    CHECK(identical(y.row(3), bias));
    if (width == 1) CHECK(identical(y, bias.replicate(5, 1)));
  }
}

TEMPLATE_TEST_CASE("a mean that is large costs LayerNorm nothing", "[layers][layer_norm]", DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  auto rng = make_rng();
  const S large = S(0.01) / std::numeric_limits<S>::epsilon();  // deviations keep a hundred steps
  for (const Index width : {2, 7, 64, 1000}) {
    INFO("width " << width);
    const LayerNorm<S> norm = random_norm<S>(width, 1e-5, true, true, rng);
    Matrix<S> x = random_matrix<S>(4, width, rng).array() + large;
    x.row(1) *= S(-1);
    x.row(2).setConstant(large * S(0.7));  // the bias: what the mean is rounded to does not matter
    const Matrix<S> y = norm.forward(x);
    check_forward(norm, x, y);
  }
}

TEMPLATE_TEST_CASE("equal values of any size have a LayerNorm", "[layers][layer_norm]", DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  // Where rows are long, rounding finds variances that are large beside eps, some of them below 0.
  const S huge = S(1e5) / std::numeric_limits<S>::epsilon();
  for (const Index width : {3, 7, 1000, 300'007}) {
    const LayerNorm<S> norm(width);
    for (Index step = 0; step < 20; ++step) {
      const Matrix<S> x = Matrix<S>::Constant(1, width, huge * (1 + S(0.041) * static_cast<S>(step)));
      const Matrix<S> y = norm.forward(x);
      INFO("width " << width << ", step " << step);
      CHECK(y.allFinite());
    }
  }
}

TEST_CASE("LayerNorm starts as PyTorch's", "[layers][layer_norm]") {
  const LayerNorm<float> norm(6);
  CHECK(identical(norm.weight, Eigen::VectorXf::Ones(6)));
  CHECK(identical(norm.bias, Eigen::VectorXf::Zero(6)));
  CHECK(norm.eps == 1e-5);
  CHECK(norm.width() == 6);
  const auto names = [](const LayerNorm<float>& of) {
    std::string list;
    diffattn::visit_parameters(of, [&](std::string_view name, const auto& p) {
      list += std::string(name) + " " + std::to_string(p.size()) + " ";
    });
    return list;
  };
  CHECK(names(norm) == "weight 6 bias 6 ");
  CHECK(names(LayerNorm<float>(6, 1e-6, true, false)) == "weight 6 ");
  CHECK(names(LayerNorm<float>(6, 1e-6, false, true)) == "bias 6 ");
  CHECK(names(LayerNorm<float>(6, 1e-6, false, false)).empty());
}

TEST_CASE("the gradients of LayerNorm are those of differences", "[layers][layer_norm]") {
  auto rng = make_rng();
  const bool with_weight = GENERATE(false, true), with_bias = GENERATE(false, true);
  for (const Index width : {1, 2, 7, 33}) {
    INFO("width " << width << ", weight " << with_weight << ", bias " << with_bias);
    LayerNorm<double> norm = random_norm<double>(width, 0.1, with_weight, with_bias, rng);
    Matrix<double> x = random_matrix<double>(5, width, rng);
    x.row(2).array() += 10;
    x.row(3).setZero();
    const Matrix<double> dy = random_matrix<double>(5, width, rng);
    LayerNorm<double> grad = zeros_like(norm);
    LayerNorm<double>::Tape tape;
    CHECK(identical(norm.forward(x, tape), norm.forward(x)));
    const Matrix<double> dx = norm.backward(dy, tape, grad);
    const auto loss = [&] { return norm.forward(x).cwiseProduct(dy).sum(); };
    CHECK(support::excess(dx, support::numerical_gradient(x, loss)) <= 0);
    if (with_weight) CHECK(support::excess(grad.weight, support::numerical_gradient(norm.weight, loss)) <= 0);
    if (with_bias) CHECK(support::excess(grad.bias, support::numerical_gradient(norm.bias, loss)) <= 0);

    // Gradients are added to what is there; dx is, too, where that is asked for, and may be dy.
    const LayerNorm<double> once = grad;
    Workspace workspace;
    diffattn::Serial serial;
    Matrix<double> in_place = dy;
    norm.backward_into(in_place, in_place, x, grad, workspace);
    CHECK(identical(in_place, dx));
    if (with_weight) CHECK(identical(grad.weight, 2 * once.weight));
    if (with_bias) CHECK(identical(grad.bias, 2 * once.bias));
    norm.backward_rows(in_place.data(), dy.data(), x.data(), 5, grad, diffattn::Store::add, workspace, serial);
    CHECK(identical(in_place, 2 * dx));
  }
}

TEST_CASE("the gradients of LayerNorm in float are those in double", "[layers][layer_norm]") {
  auto rng = make_rng();
  const LayerNorm<float> norm = random_norm<float>(200, 1e-5, true, true, rng);
  LayerNorm<double> exact(200);
  exact.weight = norm.weight.cast<double>();
  exact.bias = norm.bias.cast<double>();
  Matrix<float> x = random_matrix<float>(90, 200, rng);
  x.topRows(30).array() += 1e4F;
  const Matrix<float> dy = random_matrix<float>(90, 200, rng);
  LayerNorm<float>::Tape tape;
  LayerNorm<double>::Tape exact_tape;
  norm.forward(x, tape);
  exact.forward(x.cast<double>(), exact_tape);
  LayerNorm<float> grad = zeros_like(norm);
  LayerNorm<double> exact_grad = zeros_like(exact);
  const Matrix<double> dx = norm.backward(dy, tape, grad).cast<double>();
  const Matrix<double> exact_dx = exact.backward(dy.cast<double>(), exact_tape, exact_grad);
  CHECK((dx - exact_dx).cwiseAbs().maxCoeff() <= 1e-5 * exact_dx.cwiseAbs().maxCoeff());
  CHECK((grad.weight.cast<double>() - exact_grad.weight).norm() <= 1e-6 * exact_grad.weight.norm());
  CHECK((grad.bias.cast<double>() - exact_grad.bias).norm() <= 1e-6 * exact_grad.bias.norm());
}

TEMPLATE_TEST_CASE("LayerNorm gives the same bits on any number of threads", "[layers][layer_norm]",
                   DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  auto rng = make_rng();
  const LayerNorm<S> norm = random_norm<S>(37, 1e-5, true, true, rng);
  for (const Index rows : {0, 1, 64, 65, 300}) {
    INFO("rows " << rows);
    const Matrix<S> x = random_matrix<S>(rows, 37, rng), dy = random_matrix<S>(rows, 37, rng);
    Workspace workspace;
    LayerNorm<S> expected_grad = zeros_like(norm);
    Matrix<S> expected_dx(rows, 37);
    norm.backward_into(expected_dx, dy, x, expected_grad, workspace);
    const Matrix<S> expected = norm.forward(x);
    const auto check = [&](auto&& executor) {
      Matrix<S> y = Matrix<S>::Constant(rows, 37, S(7)), dx = y;
      LayerNorm<S> grad = zeros_like(norm);
      norm.forward_into(y, x, workspace, executor);
      norm.backward_into(dx, dy, x, grad, workspace, executor);
      CHECK(identical(y, expected));
      CHECK(identical(dx, expected_dx));
      CHECK(support::parameters_of(grad) == support::parameters_of(expected_grad));
    };
    check(support::Backwards{});
    for (const Index threads : {1, 2, 4}) check(diffattn::ThreadPool(threads));
  }
}

TEMPLATE_TEST_CASE("LayerNorm reads and writes any strides, and nothing beside its output", "[layers][layer_norm]",
                   DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  auto rng = make_rng();
  const LayerNorm<S> norm = random_norm<S>(11, 1e-5, true, true, rng);
  for (const Index rows : {1, 3, 70}) {
    INFO("rows " << rows);
    const Matrix<S> x = random_matrix<S>(rows, 11, rng), dy = random_matrix<S>(rows, 11, rng);
    const Matrix<S> expected = norm.forward(x);
    Workspace workspace;
    LayerNorm<S> expected_grad = zeros_like(norm);
    Matrix<S> expected_dx(rows, 11);
    norm.backward_into(expected_dx, dy, x, expected_grad, workspace);

    using Strided = Eigen::Map<Matrix<S>, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;
    for (const auto& [row_stride, col_stride] : {std::pair<Index, Index>{13, 1}, {40, 3}, {1, rows + 2}}) {
      INFO("strides " << row_stride << ", " << col_stride);
      const auto size = static_cast<std::size_t>((rows + 2) * 40 + 11 * (rows + 2));
      std::vector<S> x_memory(size, S(7)), y_memory(size, S(7)), dy_memory(size, S(7));
      const Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic> stride(row_stride, col_stride);
      Strided x_view(x_memory.data(), rows, 11, stride), y_view(y_memory.data(), rows, 11, stride),
          dy_view(dy_memory.data(), rows, 11, stride);
      x_view = x;
      dy_view = dy;
      norm.forward_into(y_view, x_view, workspace);
      CHECK(identical(y_view, expected));
      LayerNorm<S> grad = zeros_like(norm);
      norm.backward_into(y_view, dy_view, x_view, grad, workspace);
      CHECK(identical(y_view, expected_dx));
      CHECK(support::parameters_of(grad) == support::parameters_of(expected_grad));
      norm.forward_into(x_view, x_view, workspace);
      CHECK(identical(x_view, expected));
      y_view.setConstant(S(7));
      CHECK(std::count(y_memory.begin(), y_memory.end(), S(7)) == static_cast<std::ptrdiff_t>(size));
    }
    CHECK(identical(norm.forward(x + Matrix<S>::Zero(rows, 11)), expected));
    CHECK(identical(norm.forward(Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic>(x)), expected));
  }
}

TEMPLATE_TEST_CASE("NaN and infinity stay in their row of a LayerNorm", "[layers][layer_norm]", DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  auto rng = make_rng();
  const LayerNorm<S> norm = random_norm<S>(19, 1e-5, true, true, rng);
  const Matrix<S> x = random_matrix<S>(4, 19, rng), expected = norm.forward(x);
  for (const S value : {std::numeric_limits<S>::quiet_NaN(), std::numeric_limits<S>::infinity()}) {
    for (const Index at : {0, 10, 18}) {
      INFO("value " << value << " at " << at);
      Matrix<S> broken = x;
      broken(1, at) = value;
      const Matrix<S> y = norm.forward(broken);
      CHECK(y.row(1).array().isNaN().all());
      CHECK(identical(y.row(0), expected.row(0)));
      CHECK(identical(y.bottomRows(2), expected.bottomRows(2)));
    }
  }
}

TEST_CASE("LayerNorm leaves the heap alone", "[layers][layer_norm]") {
  if (!support::counts_allocations()) return;
  auto rng = make_rng();
  const LayerNorm<float> norm = random_norm<float>(19, 1e-5, true, true, rng);
  LayerNorm<float> grad = zeros_like(norm);
  const Eigen::MatrixXf by_columns = random_matrix<float>(130, 19, rng);
  const Matrix<float> x = by_columns;
  Matrix<float> y = x, dx = x;
  Workspace workspace;
  diffattn::ThreadPool pool(2);
  const auto run = [&] {
    norm.forward_into(y, x, workspace, pool);
    norm.forward_into(y, by_columns, workspace, pool);
    norm.backward_into(dx, by_columns, x, grad, workspace, pool);
  };
  for (int warm_up = 0; warm_up < 2; ++warm_up) run();
  const std::size_t before = support::allocations();
  run();
  CHECK(support::allocations() == before);
}

TEST_CASE("LayerNorm refuses what does not fit, and changes nothing then", "[layers][layer_norm]") {
  const LayerNorm<float> norm(6);
  LayerNorm<float> grad(6);
  Workspace workspace;
  const Matrix<float> x = Matrix<float>::Ones(2, 6);
  Matrix<float> y = Matrix<float>::Constant(2, 6, 7), wrong = Matrix<float>::Constant(2, 7, 7);
  const auto refused = [](const auto& call) { return thrown_by<diffattn::ShapeError>(call); };
  CHECK(refused([&] { (void)norm.forward(wrong); }) == "LayerNorm: x must be 2 x 6, got 2 x 7");
  CHECK(refused([&] { norm.forward_into(y, wrong, workspace); }) == "LayerNorm: x must be 2 x 6, got 2 x 7");
  CHECK(refused([&] { norm.forward_into(wrong, x, workspace); }) == "LayerNorm: y must be 2 x 6, got 2 x 7");
  CHECK(refused([&] { norm.forward_into(y, x.topRows(1), workspace); }) == "LayerNorm: y must be 1 x 6, got 2 x 6");
  CHECK(refused([&] { norm.backward_into(y, wrong, x, grad, workspace); }) == "LayerNorm: dy must be 2 x 6, got 2 x 7");
  CHECK(refused([&] { norm.backward_into(wrong, x, x, grad, workspace); }) == "LayerNorm: dx must be 2 x 6, got 2 x 7");
  LayerNorm<float> no_weight(6, 1e-5, false), no_bias(6, 1e-5, true, false);
  CHECK(refused([&] { norm.backward_into(y, x, x, no_weight, workspace); }) ==
        "LayerNorm: the gradient's weight must be 6 x 1, got 0 x 1");
  CHECK(refused([&] { norm.backward_into(y, x, x, no_bias, workspace); }) ==
        "LayerNorm: the gradient's bias must be 6 x 1, got 0 x 1");
  CHECK((y.array() == 7).all());
  CHECK((wrong.array() == 7).all());
  CHECK(thrown_by<std::invalid_argument>([&] { (void)norm.backward(x, {}, grad); }) ==
        "LayerNorm: backward needs a tape that forward(x, tape) has filled");
  CHECK(thrown_by<std::invalid_argument>([] { LayerNorm<float>(-1); }) == "LayerNorm: width cannot be made of -1");
  CHECK(norm.forward(Matrix<float>(0, 6)).rows() == 0);
}
