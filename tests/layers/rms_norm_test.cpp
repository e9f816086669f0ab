#include <diffattn/layers/rms_norm.hpp>

#include "layers/layer_checks.hpp"

using diffattn::Index;
using diffattn::Matrix;
using diffattn::RmsNorm;

TEMPLATE_TEST_CASE("RmsNorm is x / sqrt(mean(x²) + eps) · w", "[layers][rms_norm]", float, double) {
  using S = TestType;
  auto rng = make_rng();
  const bool with_weight = GENERATE(false, true);
  const double eps = GENERATE(1e-5, 0.5);
  for (const Index width : {1, 2, 7, 16, 33, 128, 1000}) {
    INFO("width " << width << ", weight " << with_weight << ", eps " << eps);
    RmsNorm<S> norm(width, eps, with_weight);
    if (with_weight) norm.weight = random_matrix<S>(width, 1, rng);
    Matrix<S> x = random_matrix<S>(5, width, rng);
    x.row(1) *= S(1e-3);  // eps counts
    x.row(2) *= S(1e6);
    x.row(3).setZero();

    Matrix<long double> exact = x.template cast<long double>();
    oracle::rms_norm<long double>(exact, width, eps, norm.weight.template cast<long double>());
    const Matrix<S> y = norm.forward(x);
    // The mean of squares sums positive terms: half its relative error, (width + 2)/2 roundings, and a few more.
    const long double bound = (static_cast<long double>(width) / 2 + 6) * std::numeric_limits<S>::epsilon();
    CHECK(((y.template cast<long double>() - exact).cwiseAbs().array() <= bound * exact.cwiseAbs().array()).all());
    CHECK(y.row(3).isZero(0));

    Matrix<S> scaled = x;
    for (Index i = 0; i < x.rows(); ++i) norm.apply(scaled.row(i).data(), S(0.25));
    CHECK(identical(scaled, S(0.25) * y));  // a power of two changes no rounding
  }
}

TEST_CASE("RmsNorm starts with a weight of ones, and only where it has one", "[layers][rms_norm]") {
  CHECK(identical(RmsNorm<float>(6).weight, Eigen::VectorXf::Ones(6)));
  CHECK(RmsNorm<float>(6).eps == 1e-5);
  CHECK(RmsNorm<float>(6, 1e-6, false).weight.size() == 0);
  CHECK(RmsNorm<float>(6, 1e-6, false).width() == 6);
}

TEST_CASE("The gradient of RmsNorm's weight is the sum over all rows", "[layers][rms_norm]") {
  auto rng = make_rng();
  const Index rows = 150, width = 11;
  RmsNorm<double> norm(width), grad = zeros_like(norm), expected = zeros_like(norm);
  norm.weight = random_matrix<double>(width, 1, rng);
  const Matrix<double> x = random_matrix<double>(rows, width, rng), dy = random_matrix<double>(rows, width, rng);
  RmsNorm<double>::Tape tape;
  norm.forward(x, tape);
  const Matrix<double> dx = norm.backward(dy, tape, grad);
  for (Index row = 0; row < rows; ++row) {
    RmsNorm<double>::Tape one;
    norm.forward(Matrix<double>(x.row(row)), one);
    CHECK(identical(norm.backward(Matrix<double>(dy.row(row)), one, expected), dx.row(row)));
  }
  CHECK(grad.weight.isApprox(expected.weight, 1e-12));
}

TEST_CASE("RmsNorm refuses an x of another width", "[layers][rms_norm]") {
  CHECK(thrown_by<diffattn::ShapeError>([] { RmsNorm<float>(6).forward(Matrix<float>(2, 7)); }) ==
        "RmsNorm: x must be 2 x 6, got 2 x 7");
  CHECK(RmsNorm<float>(6).forward(Matrix<float>(0, 6)).rows() == 0);
}
