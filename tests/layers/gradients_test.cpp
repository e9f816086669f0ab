// The gradients of the parts that layers are made of.

#include <diffattn/layers/linear.hpp>
#include <diffattn/layers/rms_norm.hpp>

#include "layers/layer_checks.hpp"
#include "support/numerical_gradient.hpp"
#include "support/scalars.hpp"

namespace {

using diffattn::Index;
using diffattn::Linear;
using diffattn::Matrix;
using diffattn::RmsNorm;
using diffattn::Store;
using diffattn::Workspace;
using support::excess;
using support::numerical_gradient;

template <typename S>
double dot(const Matrix<S>& a, const Matrix<S>& b) {
  return static_cast<double>(a.cwiseProduct(b).sum());
}

}  // namespace

TEST_CASE("Linear's gradients are what differences say", "[layers][gradients]") {
  auto rng = make_rng();
  for (const bool bias : {false, true}) {
    Linear<double> linear(5, 3, bias), grad(5, 3, bias);
    layer_checks::randomize(linear, rng);
    layer_checks::randomize(grad, rng);
    const Linear<double> before = grad;
    Matrix<double> x = random_matrix<double>(7, 5, rng), dx = random_matrix<double>(7, 5, rng);
    const Matrix<double> dy = random_matrix<double>(7, 3, rng), dx_before = dx;
    Workspace workspace;
    const auto loss = [&] {
      Matrix<double> y(7, 3);
      linear.forward_into(y, x, workspace);
      return dot(y, dy);
    };
    linear.backward_into(dx, dy, x, grad, workspace);
    const Matrix<double> numeric = numerical_gradient(x, loss);
    CHECK(excess(dx, numeric) <= 0);
    CHECK(excess(grad.weight - before.weight, numerical_gradient(linear.weight, loss)) <= 0);
    CHECK(excess(grad.bias - before.bias, numerical_gradient(linear.bias, loss)) <= 0);

    dx = dx_before;
    linear.backward_into(dx, dy, x, grad, workspace, diffattn::Serial{}, Store::add);
    CHECK(excess(dx - dx_before, numeric) <= 0);
  }
}

TEMPLATE_TEST_CASE("Linear's gradients at every shape, stride and number of threads", "[layers][gradients]",
                   DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  auto rng = make_rng();
  for (const Index in : {1, 17, 64, 300}) {
    for (const Index out : {1, 24, 33, 130}) {
      for (const Index n : {0, 1, 4, 13, 96, 270}) {
        INFO("n " << n << ", in " << in << ", out " << out);
        Linear<S> linear(in, out);
        linear.weight = random_matrix<S>(out, in, rng);
        const Matrix<S> x = random_matrix<S>(n, in, rng), dy = random_matrix<S>(n, out, rng);
        const auto wide = [](const Matrix<S>& m) { return Matrix<long double>(m.template cast<long double>()); };
        const Matrix<long double> exact_dx = wide(dy) * wide(linear.weight), exact_dw = wide(dy).transpose() * wide(x);
        const long double u = std::numeric_limits<S>::epsilon();

        Workspace workspace;
        Linear<S> grad(in, out);
        Matrix<S> dx(n, in);
        linear.backward_into(dx, dy, x, grad, workspace);
        CHECK(((wide(dx) - exact_dx).array().abs() <=
               u * static_cast<long double>(out) * (wide(dy).cwiseAbs() * wide(linear.weight).cwiseAbs()).array())
                  .all());
        CHECK(((wide(grad.weight) - exact_dw).array().abs() <=
               u * static_cast<long double>(n) * (wide(dy).cwiseAbs().transpose() * wide(x).cwiseAbs()).array())
                  .all());

        diffattn::ThreadPool pool(3);
        Linear<S> other(in, out);
        Matrix<S> wide_dx = Matrix<S>::Constant(n, in + 2, S(7));
        linear.backward_into(wide_dx.leftCols(in), dy, x, other, workspace, pool);
        CHECK(identical(wide_dx.leftCols(in), dx));
        CHECK(identical(other.weight, grad.weight));
        CHECK((wide_dx.rightCols(2).array() == S(7)).all());

        // Column-major operands are packed another way and multiplied the same.
        const Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic> x_columns = x, dy_columns = dy;
        Linear<S> from_columns(in, out);
        linear.backward_into(dx, dy_columns, x_columns, from_columns, workspace);
        CHECK(identical(wide_dx.leftCols(in), dx));
        CHECK(identical(from_columns.weight, grad.weight));
      }
    }
  }
}

TEST_CASE("Linear refuses gradients of another shape", "[layers][gradients]") {
  Linear<float> linear(4, 3, true), narrow(3, 3, true), without(4, 3);
  Matrix<float> x(2, 4), dy(2, 3), dx(2, 4);
  Workspace workspace;
  const auto message = [&](auto& grad, const auto& to, const auto& from) {
    return thrown_by<diffattn::ShapeError>([&] { linear.backward_into(to, from, x, grad, workspace); });
  };
  CHECK(message(narrow, dx, dy) == "Linear: the gradient's weight must be 3 x 4, got 3 x 3");
  CHECK(message(without, dx, dy) == "Linear: the gradient's bias must be 3 x 1, got 0 x 1");
  CHECK(message(linear, dx, x) == "Linear: dy must be 2 x 3, got 2 x 4");
  CHECK(message(linear, dy, dy) == "Linear: dx must be 2 x 4, got 2 x 3");
}

TEST_CASE("RmsNorm's gradients are what differences say", "[layers][gradients]") {
  auto rng = make_rng();
  const bool with_weight = GENERATE(false, true);
  for (const Index width : {1, 2, 5, 8, 21}) {
    INFO("width " << width << ", weight " << with_weight);
    RmsNorm<double> norm(width, 1e-2, with_weight), grad(width, 1e-2, with_weight);
    layer_checks::randomize(norm, rng);
    layer_checks::randomize(grad, rng);
    const RmsNorm<double> before = grad;
    Matrix<double> x = random_matrix<double>(6, width, rng);
    x.row(3).setZero();
    const Matrix<double> dy = random_matrix<double>(6, width, rng);
    const auto loss = [&] {
      Matrix<double> y = x;
      for (Index i = 0; i < 6; ++i) norm.apply(&y(i, 0), 0.7);
      return dot(y, dy);
    };
    Workspace workspace;
    diffattn::Serial serial;
    Matrix<double> dx = dy;  // in place
    norm.backward_rows(dx.data(), dx.data(), x.data(), 6, grad, 0.7, Store::overwrite, workspace, serial);
    const Matrix<double> numeric = numerical_gradient(x, loss);
    CHECK(excess(dx, numeric) <= 0);
    CHECK(excess(grad.weight - before.weight, numerical_gradient(norm.weight, loss)) <= 0);

    const Matrix<double> start = random_matrix<double>(6, width, rng);
    dx = start;
    norm.backward_rows(dx.data(), dy.data(), x.data(), 6, grad, 0.7, Store::add, workspace, serial);
    CHECK(excess(dx - start, numeric) <= 0);
  }
}

TEST_CASE("RmsNorm's gradients do not depend on threads", "[layers][gradients]") {
  auto rng = make_rng();
  RmsNorm<float> norm(33);
  const Matrix<float> x = random_matrix<float>(300, 33, rng), dy = random_matrix<float>(300, 33, rng);
  Workspace workspace;
  const auto run = [&](Index threads) {
    diffattn::ThreadPool pool(threads);
    RmsNorm<float> grad(33);
    grad.weight.setZero();
    Matrix<float> dx(300, 33);
    norm.backward_rows(dx.data(), dy.data(), x.data(), 300, grad, 1.0F, Store::overwrite, workspace, pool);
    return std::pair(dx, grad.weight);
  };
  const auto [dx, dw] = run(1);
  for (const Index threads : {2, 4}) {
    const auto [other_dx, other_dw] = run(threads);
    CHECK(identical(dx, other_dx));
    CHECK(identical(dw, other_dw));
  }
  RmsNorm<float> other(32);
  Matrix<float> out(300, 33);
  diffattn::Serial serial;
  CHECK(thrown_by<diffattn::ShapeError>([&] {
          norm.backward_rows(out.data(), dy.data(), x.data(), 300, other, 1.0F, Store::overwrite, workspace, serial);
        }) == "RmsNorm: the gradient's weight must be 33 x 1, got 32 x 1");
}
