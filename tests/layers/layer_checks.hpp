#pragma once

// What every attention layer must do, whichever it is: checks that the tests of all three run. `Oracle` evaluates the
// layer in plain loops: oracle(weights, config, x, mask), any scalar.

#include <array>
#include <cmath>
#include <diffattn/core/error.hpp>
#include <diffattn/core/matrix.hpp>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/core/workspace.hpp>
#include <diffattn/io/safetensors.hpp>
#include <diffattn/kernels/mask.hpp>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "layers/layer_oracle.hpp"
#include "support/catch.hpp"
#include "support/numerical_gradient.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

using support::identical;
using support::make_rng;
using support::random_matrix;
using support::thrown_by;

namespace layer_checks {

using diffattn::CausalMask;
using diffattn::FullMask;
using diffattn::Index;
using diffattn::Matrix;
using diffattn::SlidingWindowMask;
using diffattn::Workspace;

/// Fills every parameter with N(0, spread²): biases and the norm weight too, which start out as something special.
template <typename Layer>
void randomize(Layer& layer, std::mt19937_64& rng, double spread = 0.3) {
  diffattn::visit_parameters(layer, [&](std::string_view, auto& parameter) {
    using S = typename std::remove_reference_t<decltype(parameter)>::Scalar;
    parameter = static_cast<S>(spread) * random_matrix<S>(parameter.rows(), parameter.cols(), rng);
  });
}

/// Calls f(name, a, b) for the parameters of two layers, one after another.
template <typename A, typename B, typename F>
void for_each_pair(A& a, B& b, const F& f) {
  std::vector<Matrix<double>> second;
  diffattn::visit_parameters(b, [&](std::string_view, const auto& parameter) { second.push_back(parameter); });
  std::size_t i = 0;
  diffattn::visit_parameters(
      a, [&](std::string_view name, auto& parameter) { f(std::string(name), parameter, second[i++]); });
  CHECK(i == second.size());
}

/// Every parameter's gradient in `grad` is what differences of loss() say, which reads `layer`.
template <typename Layer, typename Loss>
void parameter_gradients(Layer& layer, Layer& grad, const Loss& loss) {
  Layer numeric = layer;
  diffattn::visit_parameters(layer, [&](std::string_view name, auto& parameter) {
    const Matrix<double> gradient = support::numerical_gradient(parameter, loss);
    diffattn::visit_parameters(numeric, [&](std::string_view other, auto& to) {
      if (name == other) to = gradient;
    });
  });
  for_each_pair(grad, numeric, [](const std::string& name, const auto& got, const auto& expected) {
    INFO(name);
    CHECK(support::excess(got, expected) <= 0);
  });
}

/// float: the error, a mean over rows and draws, is at most 1.5 times that of plain loops in float; where a layer has
/// but a handful of numbers the ratio is luck (a norm over two columns magnifies what little it finds), and a bound has
/// to do. double: 1e-13.
template <template <typename...> class Layer, typename Config, typename Oracle, typename Mask>
void accuracy(const Config& config, Index n, const Mask& mask, const Oracle& oracle, std::mt19937_64& rng) {
  INFO("embed_dim " << config.embed_dim << ", heads " << config.num_heads << "/" << config.num_kv_heads << ", n " << n);
  long double error = 0, naive_error = 0, size = 0;
  for (int draw = 0; draw < (n < 20 ? 24 : 6); ++draw) {
    Layer<float> layer(config);
    randomize(layer, rng);
    const Matrix<float> x = random_matrix<float>(n, config.embed_dim, rng);
    const Matrix<long double> exact =
        oracle(oracle::weights_of<long double>(layer), config, Matrix<long double>(x.cast<long double>()), mask);
    const Matrix<float> naive = oracle(oracle::weights_of<float>(layer), config, x, mask);
    error += (layer.forward(x, mask).template cast<long double>() - exact).rowwise().norm().sum();
    naive_error += (naive.cast<long double>() - exact).rowwise().norm().sum();
    size += exact.rowwise().norm().sum();
  }
  CAPTURE(error / naive_error);
  if (config.embed_dim < 30) {
    CHECK(error <= 1e-4L * size);
  } else {
    CHECK(error <= 1.5L * naive_error);
  }

  Layer<double> layer(config);
  randomize(layer, rng);
  const Matrix<double> x = random_matrix<double>(n, config.embed_dim, rng);
  const Matrix<long double> exact =
      oracle(oracle::weights_of<long double>(layer), config, Matrix<long double>(x.cast<long double>()), mask);
  CHECK((layer.forward(x, mask).template cast<long double>() - exact).norm() <= 1e-13L * exact.norm());
}

/// Weights, x and y recorded from the official implementation in float64, several sequences stacked. double: 1e-12;
/// float: at most 1.5 times the error of plain loops in float.
template <template <typename...> class Layer, typename Config, typename Oracle>
void golden(const Config& config, const diffattn::Safetensors& file, const Oracle& oracle) {
  const Index sequences = std::stol(file.metadata().at("batch")), tokens = std::stol(file.metadata().at("tokens"));
  const std::vector<Index> lengths(static_cast<std::size_t>(sequences), tokens);
  const Matrix<double> x = file.matrix<double>("x"), expected = file.matrix<double>("y");
  REQUIRE(x.rows() == sequences * tokens);

  Layer<double> layer(config);
  load_parameters(layer, file, "weight.");
  const Matrix<double> y = layer.forward(x, CausalMask{}, lengths);
  CHECK((y - expected).cwiseAbs().maxCoeff() <= 1e-12 * expected.cwiseAbs().maxCoeff());

  Layer<float> in_float(config);
  load_parameters(in_float, file, "weight.");
  const Matrix<float> x_float = x.cast<float>(), y_float = in_float.forward(x_float, CausalMask{}, lengths);
  Matrix<float> naive(x.rows(), x.cols());
  for (Index first = 0; first < x.rows(); first += tokens) {
    naive.middleRows(first, tokens) = oracle(oracle::weights_of<float>(in_float), config,
                                             Matrix<float>(x_float.middleRows(first, tokens)), CausalMask{});
  }
  CHECK((y_float.template cast<double>() - expected).norm() <= 1.5 * (naive.cast<double>() - expected).norm());
}

/// Every length and mask, for one configuration.
template <template <typename...> class Layer, typename Config, typename Oracle>
void accuracy_at_all_lengths(const Config& config, const Oracle& oracle, std::mt19937_64& rng) {
  for (const Index n : {1, 2, 4, 5, 7, 26, 70}) {
    accuracy<Layer>(config, n, CausalMask{}, oracle, rng);
    accuracy<Layer>(config, n, FullMask{}, oracle, rng);
    accuracy<Layer>(config, n, SlidingWindowMask{3}, oracle, rng);
  }
}

/// Sequences stacked in rows give what each gives alone: bit for bit, except that a few rows (here 3) are multiplied
/// in another order when they come alone.
template <typename S, typename Layer>
void stacked_sequences(const Layer& layer, std::mt19937_64& rng) {
  const std::vector<Index> lengths = {7, 0, 12, 5, 3, 41, 6};
  const Index embed_dim = layer.config().embed_dim;
  Matrix<S> x = random_matrix<S>(74, embed_dim, rng);
  const auto check = [&](const auto& mask) {
    const Matrix<S> y = layer.forward(x, mask, lengths);
    REQUIRE(y.rows() == 74);
    Index first = 0;
    for (const Index length : lengths) {
      INFO("embed_dim " << embed_dim << ", sequence at row " << first << " of length " << length);
      const Matrix<S> alone = layer.forward(x.middleRows(first, length), mask);
      if (length >= 5 || length == 0) {
        CHECK(identical(alone, y.middleRows(first, length)));
      } else {
        CHECK(alone.isApprox(y.middleRows(first, length), 100 * std::numeric_limits<S>::epsilon()));
      }
      first += length;
    }
  };
  check(CausalMask{});
  check(FullMask{});
  check(SlidingWindowMask{4});

  // NaN in one sequence does not reach another.
  const Matrix<S> expected = layer.forward(x, FullMask{}, lengths);
  x(8, 0) = std::numeric_limits<S>::quiet_NaN();
  const Matrix<S> y = layer.forward(x, FullMask{}, lengths);
  CHECK(identical(y.topRows(7), expected.topRows(7)));
  CHECK(y.middleRows(7, 12).array().isNaN().all());
  CHECK(identical(y.bottomRows(55), expected.bottomRows(55)));
}

/// What comes later changes nothing before it, and a prefix alone gives the same to rounding.
template <typename S, typename Layer>
void causal_prefix(const Layer& layer, std::mt19937_64& rng) {
  const Matrix<S> x = random_matrix<S>(61, layer.config().embed_dim, rng);
  const Matrix<S> y = layer.forward(x);
  for (const Index m : {1, 6, 24, 40}) {
    INFO("prefix of " << m);
    Matrix<S> other = x;
    other.bottomRows(61 - m) = random_matrix<S>(61 - m, x.cols(), rng);
    CHECK(identical(layer.forward(other).topRows(m), y.topRows(m)));
    CHECK_FALSE(identical(layer.forward(other).bottomRows(61 - m), y.bottomRows(61 - m)));
    CHECK(layer.forward(x.topRows(m)).isApprox(y.topRows(m), 1000 * std::numeric_limits<S>::epsilon()));
  }
}

/// The same bits from any number of threads, and from a workspace that has been used before.
template <typename S, typename Layer>
void threads_and_workspace(const Layer& layer, std::mt19937_64& rng) {
  const std::vector<Index> lengths = {3, 150, 40};
  const Matrix<S> x = random_matrix<S>(193, layer.config().embed_dim, rng);
  const Matrix<S> expected = layer.forward(x, CausalMask{}, lengths);
  for (const Index threads : {1, 2, 4}) {
    INFO("threads " << threads);
    diffattn::ThreadPool pool(threads);
    Workspace workspace;
    Matrix<S> y(x.rows(), x.cols());
    layer.forward_into(y, x, CausalMask{}, lengths, workspace, pool);
    CHECK(identical(y, expected));
    y.setConstant(std::numeric_limits<S>::quiet_NaN());
    layer.forward_into(y, x, CausalMask{}, lengths, workspace, pool);
    CHECK(identical(y, expected));
    const std::size_t held = workspace.capacity();
    y.setZero();
    layer.forward_into(y, x, CausalMask{}, lengths, workspace, pool);
    CHECK(identical(y, expected));
    CHECK(workspace.capacity() == held);
  }
}

/// x and y of any strides and either storage order; nothing is written beside y.
template <typename S, typename Layer>
void strides(const Layer& layer, std::mt19937_64& rng) {
  const Index n = 9, width = layer.config().embed_dim;
  const Matrix<S> wide = random_matrix<S>(n + 2, width + 5, rng);
  const Matrix<S> x = wide.block(1, 3, n, width), expected = layer.forward(x);
  Workspace workspace;

  Matrix<S> frame = Matrix<S>::Constant(n + 2, width + 4, S(7));
  layer.forward_into(frame.block(1, 2, n, width), wide.block(1, 3, n, width), CausalMask{}, workspace);
  CHECK(identical(frame.block(1, 2, n, width), expected));
  frame.block(1, 2, n, width).setConstant(S(7));
  CHECK((frame.array() == S(7)).all());

  const Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic> by_columns = x;
  Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic> y(n, width);
  layer.forward_into(y, by_columns, CausalMask{}, workspace);
  CHECK(identical(y, expected));
  CHECK(identical(layer.forward(by_columns), expected));
  layer.forward_into(y, x + Matrix<S>::Zero(n, width), CausalMask{}, workspace);
  CHECK(identical(y, expected));
}

/// Everything that forward refuses, naming `layer_name`; nothing is written then.
template <typename S, typename Layer>
void refusals(const Layer& layer, const std::string& layer_name) {
  const Index width = layer.config().embed_dim;
  const std::string wide = std::to_string(width), wider = std::to_string(width + 1);
  const Matrix<S> x = Matrix<S>::Ones(5, width), wrong = Matrix<S>::Ones(5, width + 1);
  Matrix<S> y = Matrix<S>::Constant(5, width, S(7));
  Workspace workspace;

  CHECK(thrown_by<diffattn::ShapeError>([&] { layer.forward(wrong); }) ==
        layer_name + ": x must be 5 x " + wide + ", got 5 x " + wider);
  CHECK(thrown_by<diffattn::ShapeError>([&] { layer.forward_into(y, wrong, CausalMask{}, workspace); }) ==
        layer_name + ": x must be 5 x " + wide + ", got 5 x " + wider);
  CHECK(thrown_by<diffattn::ShapeError>([&] { layer.forward_into(y, x.topRows(4), CausalMask{}, workspace); }) ==
        layer_name + ": y must be 4 x " + wide + ", got 5 x " + wide);
  CHECK(thrown_by<diffattn::ShapeError>([&] {
          layer.forward(x, CausalMask{}, std::vector<Index>{2, 2});
        }) == layer_name + ": the lengths of the sequences must add up to the 5 rows of x, got 4");
  CHECK(thrown_by<std::invalid_argument>([&] {
          layer.forward(x, CausalMask{}, std::vector<Index>{6, -1});
        }) == layer_name + ": a sequence cannot have -1 tokens");
  CHECK_THROWS_AS(layer.forward_into(y, x, SlidingWindowMask{-1}, workspace), std::invalid_argument);
  const Matrix<S> bias = Matrix<S>::Zero(5, 4);
  CHECK_THROWS_AS(layer.forward_into(y, x, with_bias(CausalMask{}, diffattn::MatrixBias(bias)), workspace),
                  diffattn::ShapeError);
  CHECK((y.array() == S(7)).all());
}

/// What the constructor says to a configuration that cannot be.
template <template <typename...> class Layer>
std::string config_error(const typename Layer<float>::Config& config) {
  return thrown_by<std::invalid_argument>([&] { Layer<float> layer(config); });
}

template <typename S, typename Layer>
void empty_input(const Layer& layer) {
  const Index width = layer.config().embed_dim;
  const Matrix<S> none(0, width);
  CHECK(layer.forward(none).rows() == 0);
  CHECK(layer.forward(none).cols() == width);
  CHECK(layer.forward(none, FullMask{}, std::vector<Index>{}).rows() == 0);
  CHECK(layer.forward(none, FullMask{}, std::vector<Index>{0, 0}).rows() == 0);
}

/// All of the above that need no oracle.
template <template <typename...> class Layer, typename Config>
void laws(const Config& config, const std::string& layer_name) {
  auto rng = make_rng();
  Layer<float> layer(config);
  randomize(layer, rng);
  stacked_sequences<float>(layer, rng);
  causal_prefix<float>(layer, rng);
  threads_and_workspace<float>(layer, rng);
  strides<float>(layer, rng);
  refusals<float>(layer, layer_name);
  empty_input<float>(layer);

  Layer<double> in_double(config);
  randomize(in_double, rng);
  stacked_sequences<double>(in_double, rng);
  causal_prefix<double>(in_double, rng);
  threads_and_workspace<double>(in_double, rng);
}

/// What visit_parameters calls the parameters, with their shapes, in order: "q_proj.weight 8x8 …".
template <typename Layer>
std::vector<std::string> parameter_list(Layer& layer) {
  std::vector<std::string> list;
  diffattn::visit_parameters(layer, [&](std::string_view name, const auto& parameter) {
    list.push_back(std::string(name) + " " + std::to_string(parameter.rows()) + "x" + std::to_string(parameter.cols()));
  });
  return list;
}

template <typename Layer>
bool same_parameters(const Layer& a, const Layer& b) {
  const auto left = oracle::weights_of<double>(a), right = oracle::weights_of<double>(b);
  bool same = left.size() == right.size();
  for (const auto& [name, value] : left) same = same && right.count(name) != 0 && right.at(name) == value;
  return same;
}

/// Every entry within ±bound, and a mean, a mean square and extremes as a uniform distribution has them.
template <typename Derived>
void check_uniform(const Eigen::MatrixBase<Derived>& m, double bound) {
  const auto unit = (m.template cast<double>() / bound).array().eval();
  const double n = static_cast<double>(m.size());
  CHECK(unit.abs().maxCoeff() <= 1);
  CHECK(unit.abs().maxCoeff() > 1 - 20 / n);
  CHECK(std::abs(unit.mean()) < 5 * std::sqrt(1 / (3 * n)));
  CHECK(std::abs(unit.square().mean() - 1.0 / 3) < 5 * std::sqrt(4.0 / (45 * n)));
}

}  // namespace layer_checks
