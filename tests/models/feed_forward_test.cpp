#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/models/feed_forward.hpp>

#include "layers/layer_checks.hpp"
#include "support/numerical_gradient.hpp"
#include "support/scalars.hpp"

namespace {

using diffattn::FeedForward;
using diffattn::Index;
using diffattn::Matrix;
using support::excess;
using support::numerical_gradient;

template <typename S>
FeedForward<S> random_layer(Index embed_dim, Index hidden_dim, std::mt19937_64& rng) {
  FeedForward<S> layer(embed_dim, hidden_dim);
  layer_checks::randomize(layer, rng, 0.5);
  return layer;
}

template <typename S>
FeedForward<S> zeros_like(const FeedForward<S>& layer) {
  return FeedForward<S>(layer.gate_proj.weight.cols(), layer.gate_proj.weight.rows());
}

}  // namespace

TEST_CASE("SwiGLU is the formula", "[models][feed_forward]") {
  auto rng = make_rng();
  const auto layer = random_layer<double>(6, 10, rng);
  const Matrix<double> x = random_matrix<double>(9, 6, rng);
  Matrix<double> inner(9, 10);
  for (Index i = 0; i < 9; ++i) {
    for (Index j = 0; j < 10; ++j) {
      const double gate = x.row(i).dot(layer.gate_proj.weight.row(j)), up = x.row(i).dot(layer.up_proj.weight.row(j));
      inner(i, j) = gate / (1 + std::exp(-gate)) * up;
    }
  }
  CHECK(layer.forward(x).isApprox(inner * layer.down_proj.weight.transpose(), 1e-14));
}

TEST_CASE("SwiGLU's gradients are what differences say", "[models][feed_forward]") {
  auto rng = make_rng();
  auto layer = random_layer<double>(5, 7, rng), grad = random_layer<double>(5, 7, rng);
  const auto before = grad;
  Matrix<double> x = 2 * random_matrix<double>(6, 5, rng);
  const Matrix<double> dy = random_matrix<double>(6, 5, rng);
  const auto loss = [&] { return layer.forward(x).cwiseProduct(dy).sum(); };

  FeedForward<double>::Tape tape;
  layer.forward(x, tape);
  CHECK(excess(layer.backward(dy, tape, grad), numerical_gradient(x, loss)) <= 0);
  CHECK(excess(grad.gate_proj.weight - before.gate_proj.weight, numerical_gradient(layer.gate_proj.weight, loss)) <= 0);
  CHECK(excess(grad.up_proj.weight - before.up_proj.weight, numerical_gradient(layer.up_proj.weight, loss)) <= 0);
  CHECK(excess(grad.down_proj.weight - before.down_proj.weight, numerical_gradient(layer.down_proj.weight, loss)) <= 0);
}

TEMPLATE_TEST_CASE("SwiGLU with a tape, in place, and on any number of threads", "[models][feed_forward]",
                   DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  auto rng = make_rng();
  const auto layer = random_layer<S>(37, 50, rng);
  const Matrix<S> x = random_matrix<S>(150, 37, rng), dy = random_matrix<S>(150, 37, rng);
  typename FeedForward<S>::Tape tape;
  CHECK(identical(layer.forward(x, tape), layer.forward(x)));
  auto grad = zeros_like(layer);
  const Matrix<S> dx = layer.backward(dy, tape, grad);

  const S* const memory[] = {tape.x.data(), tape.gate.data(), tape.up.data()};
  diffattn::Workspace workspace;
  for (const Index threads : {1, 2, 4}) {
    diffattn::ThreadPool pool(threads);
    auto other = zeros_like(layer);
    Matrix<S> y(150, 37), in_place = dy;
    layer.forward_into(y, x, tape, workspace, pool);
    layer.backward_into(in_place, in_place, tape, other, workspace, pool);
    CHECK(identical(y, layer.forward(x)));
    CHECK(identical(in_place, dx));
    CHECK(identical(other.gate_proj.weight, grad.gate_proj.weight));
    CHECK(identical(other.up_proj.weight, grad.up_proj.weight));
    CHECK(identical(other.down_proj.weight, grad.down_proj.weight));
  }
  CHECK(memory[0] == tape.x.data());  // used again
  CHECK(memory[1] == tape.gate.data());
  CHECK(memory[2] == tape.up.data());

  // Gates so large that exp overflows or vanishes.
  const Matrix<S> large = S(1e4) * x;
  layer.forward(large, tape);
  CHECK(layer.backward(dy, tape, grad).allFinite());
  CHECK(layer.forward(Matrix<S>(0, 37), tape).rows() == 0);
  CHECK(layer.backward(Matrix<S>(0, 37), tape, grad).rows() == 0);
}

TEST_CASE("One projection, an activation, biases: the formula, its gradients and its names", "[models][feed_forward]") {
  auto rng = make_rng();
  for (const auto activation : {diffattn::Activation::gelu, diffattn::Activation::gelu_tanh}) {
    for (const bool bias : {false, true}) {
      INFO("activation " << static_cast<int>(activation) << ", bias " << bias);
      FeedForward<double> layer(5, 7, activation, bias), grad(5, 7, activation, bias);
      layer_checks::randomize(layer, rng, 0.5);
      layer_checks::randomize(grad, rng, 0.5);
      const auto before = grad;
      std::vector<std::string> names{"up_proj.weight 7x5", "down_proj.weight 5x7"};
      if (bias) names = {"up_proj.weight 7x5", "up_proj.bias 7x1", "down_proj.weight 5x7", "down_proj.bias 5x1"};
      CHECK(layer_checks::parameter_list(layer) == names);

      Matrix<double> x = 2 * random_matrix<double>(6, 5, rng);
      Matrix<double> inner = x * layer.up_proj.weight.transpose();
      if (bias) inner.rowwise() += layer.up_proj.bias.transpose();
      for (double& h : inner.reshaped()) {
        const double cubic = 0.7978845608028654 * (h + 0.044715 * h * h * h);
        h *= activation == diffattn::Activation::gelu ? std::erfc(-h / std::sqrt(2.0)) / 2 : (1 + std::tanh(cubic)) / 2;
      }
      Matrix<double> expected = inner * layer.down_proj.weight.transpose();
      if (bias) expected.rowwise() += layer.down_proj.bias.transpose();
      CHECK(layer.forward(x).isApprox(expected, 1e-14));

      FeedForward<double>::Tape tape;
      CHECK(identical(layer.forward(x, tape), layer.forward(x)));
      const Matrix<double> dy = random_matrix<double>(6, 5, rng);
      const auto loss = [&] { return layer.forward(x).cwiseProduct(dy).sum(); };
      CHECK(excess(layer.backward(dy, tape, grad), numerical_gradient(x, loss)) <= 0);
      const auto added = oracle::weights_of<double>(grad), start = oracle::weights_of<double>(before);
      visit_parameters(layer, [&](std::string_view name, auto& parameter) {
        const std::string key(name);
        CHECK(excess(added.at(key) - start.at(key), numerical_gradient(parameter, loss)) <= 0);
      });
    }
  }
}

TEST_CASE("A feed-forward layer with ReLU on any number of threads", "[models][feed_forward]") {
  auto rng = make_rng();
  FeedForward<float> layer(37, 50, diffattn::Activation::relu, true), grad = layer;
  layer_checks::randomize(layer, rng, 0.5);
  grad = diffattn::zeros_like(layer);
  const Matrix<float> x = random_matrix<float>(150, 37, rng), dy = random_matrix<float>(150, 37, rng);
  const Matrix<float> inner = ((x * layer.up_proj.weight.transpose()).rowwise() + layer.up_proj.bias.transpose());
  const Matrix<float> expected =
      (inner.cwiseMax(0) * layer.down_proj.weight.transpose()).rowwise() + layer.down_proj.bias.transpose();
  FeedForward<float>::Tape tape;
  CHECK(layer.forward(x, tape).isApprox(expected, 1e-5f));
  const Matrix<float> dx = layer.backward(dy, tape, grad);
  diffattn::Workspace workspace;
  for (const Index threads : {1, 3}) {
    diffattn::ThreadPool pool(threads);
    auto other = diffattn::zeros_like(layer);
    Matrix<float> in_place = x, d_in_place = dy;
    layer.forward_into(in_place, in_place, workspace, pool);
    CHECK(identical(in_place, layer.forward(x)));
    layer.backward_into(d_in_place, d_in_place, tape, other, workspace, pool);
    CHECK(identical(d_in_place, dx));
    CHECK(layer_checks::same_parameters(other, grad));
  }
  FeedForward<float> smooth(37, 50, diffattn::Activation::gelu, true);
  CHECK(thrown_by<std::invalid_argument>([&] { layer.backward(dy, tape, smooth); }) ==
        "FeedForward: grad must have the same activation");
}

TEST_CASE("SwiGLU refuses what does not fit", "[models][feed_forward]") {
  const FeedForward<float> layer(4, 6);
  FeedForward<float> grad(4, 6), narrow(4, 5);
  FeedForward<float>::Tape tape, other;
  const Matrix<float> x = Matrix<float>::Ones(3, 4);
  CHECK(thrown_by<std::invalid_argument>([&] { layer.backward(x, tape, grad); }) ==
        "FeedForward: backward needs a tape that forward(x, tape) has filled");
  layer.forward(x, tape);
  FeedForward<float>(4, 5).forward(x, other);
  CHECK(thrown_by<diffattn::ShapeError>([&] { layer.backward(x, other, grad); }) ==
        "FeedForward: the tape's gate must be 3 x 6, got 3 x 5");
  CHECK(thrown_by<diffattn::ShapeError>([&] { layer.backward(x.topRows(2), tape, grad); }) ==
        "FeedForward: the tape's x must be 2 x 4, got 3 x 4");
  CHECK(thrown_by<diffattn::ShapeError>([&] { layer.backward(x, tape, narrow); }) ==
        "Linear: the gradient's weight must be 6 x 4, got 5 x 4");
  CHECK(grad.down_proj.weight.isZero(0));
  CHECK(thrown_by<std::invalid_argument>([&] { FeedForward<float>(4, 0, diffattn::Activation::gelu); }) ==
        "FeedForward: hidden_dim must be at least 1, got 0");
}
