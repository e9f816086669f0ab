// The gradients of the attention layers: against those recorded from the official code, against differences, and the
// rules for tapes.

#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>

#include "layers/layer_checks.hpp"
#include "support/numerical_gradient.hpp"

namespace {

using diffattn::AlibiBias;
using diffattn::CausalMask;
using diffattn::Index;
using diffattn::Matrix;
using diffattn::RotaryConfig;
using diffattn::SlidingWindowMask;
using diffattn::Workspace;
using diffattn::zeros_like;
using layer_checks::for_each_pair;
using support::excess;
using support::numerical_gradient;

using V1 = diffattn::MultiheadDiffAttention<double>;
using V2 = diffattn::MultiheadDiffAttentionV2<double>;
using Standard = diffattn::MultiheadAttention<double>;
using Lengths = std::vector<Index>;

template <typename Layer>
void check_same(Layer& a, Layer& b) {
  for_each_pair(a, b, [](const std::string& name, const auto& one, const auto& other) {
    INFO(name);
    CHECK(identical(one, other));
  });
}

template <typename Layer>
void check_recorded(const std::string& name, const typename Layer::Config& config) {
  INFO(name);
  const diffattn::Safetensors file(std::string(DIFFATTN_TEST_DATA "/golden/") + name + ".safetensors");
  Layer layer(config);
  load_parameters(layer, file, "weight.");
  const Index tokens = std::stol(file.metadata().at("tokens"));
  const Lengths lengths(static_cast<std::size_t>(std::stol(file.metadata().at("batch"))), tokens);
  const Matrix<double> x = file.matrix<double>("x");

  typename Layer::Tape tape;
  const Matrix<double> y = layer.forward(x, CausalMask{}, lengths, tape);
  CHECK(identical(y, layer.forward(x, CausalMask{}, lengths)));
  Layer grad = zeros_like(layer), expected = zeros_like(layer);
  const Matrix<double> dx = layer.backward(file.matrix<double>("dy"), tape, grad);
  const auto check = [](const auto& got, const auto& recorded) {
    CHECK((got - recorded).cwiseAbs().maxCoeff() <= 1e-9 * recorded.cwiseAbs().maxCoeff());
  };
  check(dx, file.matrix<double>("dx"));
  load_parameters(expected, file, "grad.");
  for_each_pair(grad, expected, [&](const std::string& parameter, const auto& got, const auto& recorded) {
    INFO(parameter);
    check(got, recorded);
  });

  // Another call adds.
  layer.backward(file.matrix<double>("dy"), tape, grad);
  for_each_pair(grad, expected, [&](const std::string& parameter, const auto& got, const auto& recorded) {
    INFO(parameter);
    check(got, 2 * recorded);
  });
}

/// dx and every parameter's gradient by differences of forward, with two sequences and something in grad already.
template <typename Layer, typename Mask>
void check_differences(const typename Layer::Config& config, const Mask& mask) {
  auto rng = make_rng();
  Layer layer(config), grad(config);
  layer_checks::randomize(layer, rng);
  layer_checks::randomize(grad, rng);
  Layer before = grad;
  const Lengths lengths = {5, 1, 3};
  Matrix<double> x = random_matrix<double>(9, config.embed_dim, rng);
  const Matrix<double> dy = random_matrix<double>(9, config.embed_dim, rng);
  const auto loss = [&] { return layer.forward(x, mask, lengths).cwiseProduct(dy).sum(); };
  typename Layer::Tape tape;
  layer.forward(x, mask, lengths, tape);
  const Matrix<double> dx = layer.backward(dy, tape, grad);
  CHECK(excess(dx, numerical_gradient(x, loss)) <= 0);
  for_each_pair(grad, before, [](const std::string&, auto& got, const auto& start) { got -= start; });
  layer_checks::parameter_gradients(layer, grad, loss);
}

/// Any number of threads, a tape and a workspace used again, a sequence alone and in company.
template <typename Layer>
void check_repeats(const typename Layer::Config& config) {
  auto rng = make_rng();
  Layer layer(config);
  layer_checks::randomize(layer, rng);
  const Matrix<double> x = random_matrix<double>(70, config.embed_dim, rng);
  const Matrix<double> dy = random_matrix<double>(70, config.embed_dim, rng);
  typename Layer::Tape tape;
  layer.forward(x, CausalMask{}, tape);
  Layer grad = zeros_like(layer);
  const Matrix<double> dx = layer.backward(dy, tape, grad);

  typename Layer::Tape reused;
  for (const Index threads : {1, 2, 4}) {
    INFO(threads << " threads");
    diffattn::ThreadPool pool(threads);
    Workspace workspace;
    Matrix<double> y(70, config.embed_dim), got(70, config.embed_dim);
    std::size_t capacity = 0;
    const double* memory = nullptr;
    for (int round = 0; round < 4; ++round) {
      Layer other = zeros_like(layer);
      layer.forward_into(y, x, CausalMask{}, reused, workspace, pool);
      layer.backward_into(got, dy, reused, other, workspace, pool);
      CHECK(identical(got, dx));
      check_same(other, grad);
      if (round > 1) CHECK(workspace.capacity() == capacity);
      if (round > 0) CHECK(reused.q.data() == memory);
      capacity = workspace.capacity();
      memory = reused.q.data();
    }
  }

  // Two sequences stacked: what each has by itself.
  const Lengths lengths = {30, 40};
  Layer stacked = zeros_like(layer), apart = zeros_like(layer);
  layer.forward(x, CausalMask{}, lengths, reused);
  const Matrix<double> both = layer.backward(dy, reused, stacked);
  layer.forward(Matrix<double>(x.topRows(30)), CausalMask{}, reused);
  CHECK(both.topRows(30).isApprox(layer.backward(Matrix<double>(dy.topRows(30)), reused, apart), 1e-12));
  layer.forward(Matrix<double>(x.bottomRows(40)), CausalMask{}, reused);
  CHECK(both.bottomRows(40).isApprox(layer.backward(Matrix<double>(dy.bottomRows(40)), reused, apart), 1e-12));
  for_each_pair(stacked, apart, [](const std::string& name, const auto& one, const auto& other) {
    INFO(name);
    CHECK(one.isApprox(other, 1e-12));
  });
}

/// `other` differs in its heads, `wide` in its embed_dim.
template <typename Layer>
void check_refusals(const std::string& name, const typename Layer::Config& config,
                    const typename Layer::Config& other_config, const typename Layer::Config& wide_config) {
  const Layer layer(config), other(other_config), wide(wide_config);
  const Matrix<double> x = Matrix<double>::Ones(4, config.embed_dim);
  Layer grad = zeros_like(layer);
  typename Layer::Tape tape;
  const auto refused = [&](const Layer& of, const Matrix<double>& dy, Layer& to) {
    return thrown_by<std::invalid_argument>([&] { of.backward(dy, tape, to); });
  };
  CHECK(refused(layer, x, grad) == name + ": backward needs a tape that forward(x, mask, tape) has filled");
  layer.forward(x, CausalMask{}, tape);
  Layer other_grad = zeros_like(other), wide_grad = zeros_like(wide);
  CHECK(refused(layer, x, other_grad) == name + ": grad must be a layer of the same configuration");
  CHECK(refused(layer, x, wide_grad) == name + ": grad must be a layer of the same configuration");
  CHECK(refused(other, x, other_grad) == name + ": the tape was filled by a layer of another configuration");
  CHECK(refused(wide, x, wide_grad) == name + ": the tape was filled by a layer of another configuration");
  const Matrix<double> long_dy = Matrix<double>::Ones(5, config.embed_dim);
  CHECK(thrown_by<diffattn::ShapeError>([&] { layer.backward(long_dy, tape, grad); }) ==
        name + ": dy must be 4 x " + std::to_string(config.embed_dim) + ", got 5 x " +
            std::to_string(config.embed_dim));
  visit_parameters(grad, [](std::string_view, const auto& parameter) { CHECK(parameter.isZero(0)); });

  // A forward that was refused leaves no tape.
  CHECK_THROWS_AS(layer.forward(x, SlidingWindowMask{-1}, tape), std::invalid_argument);
  CHECK(refused(layer, x, grad) == name + ": backward needs a tape that forward(x, mask, tape) has filled");

  // No tokens: no gradient.
  const Matrix<double> empty(0, config.embed_dim);
  layer.forward(empty, CausalMask{}, tape);
  CHECK(layer.backward(empty, tape, grad).rows() == 0);
  visit_parameters(grad, [](std::string_view, const auto& parameter) { CHECK(parameter.isZero(0)); });
}

const auto kAlibi = with_bias(CausalMask{}, AlibiBias{0.5});

}  // namespace

TEST_CASE("MultiheadDiffAttention's gradients are the official ones", "[layers][gradients][golden]") {
  check_recorded<V1>("layer_v1_0", {.embed_dim = 64, .num_heads = 4, .rotary = RotaryConfig{}});
  check_recorded<V1>("layer_v1_1",
                     {.embed_dim = 96, .num_heads = 6, .num_kv_heads = 2, .depth = 5, .rotary = RotaryConfig{}});
  check_recorded<V1>("layer_v1_2",
                     {.embed_dim = 48, .num_heads = 2, .num_kv_heads = 1, .depth = 2, .rotary = RotaryConfig{}});
}

TEST_CASE("MultiheadDiffAttentionV2's gradients are the official ones", "[layers][gradients][golden]") {
  check_recorded<V2>("layer_v2_0",
                     {.embed_dim = 64, .num_heads = 4, .num_kv_heads = 2, .head_dim = 16, .rotary = RotaryConfig{}});
  check_recorded<V2>("layer_v2_1", {.embed_dim = 48, .num_heads = 3, .head_dim = 8, .rotary = RotaryConfig{}});
}

TEST_CASE("MultiheadDiffAttention's gradients are what differences say", "[layers][gradients]") {
  check_differences<V1>({.embed_dim = 8, .num_heads = 2, .num_kv_heads = 1, .depth = 3, .rotary = RotaryConfig{}},
                        CausalMask{});
  check_differences<V1>({.embed_dim = 6, .num_heads = 1, .lambda_init = 0.3, .bias = true}, SlidingWindowMask{2});
  check_differences<V1>({.embed_dim = 8, .num_heads = 2, .norm_eps = 0.1, .norm_weight = false}, kAlibi);
}

TEST_CASE("MultiheadDiffAttentionV2's gradients are what differences say", "[layers][gradients]") {
  check_differences<V2>({.embed_dim = 6, .num_heads = 2, .num_kv_heads = 1, .head_dim = 4, .rotary = RotaryConfig{}},
                        CausalMask{});
  check_differences<V2>({.embed_dim = 5, .num_heads = 1, .head_dim = 3, .bias = true}, kAlibi);
}

TEST_CASE("MultiheadAttention's gradients are what differences say", "[layers][gradients]") {
  check_differences<Standard>({.embed_dim = 8, .num_heads = 4, .num_kv_heads = 2, .rotary = RotaryConfig{}},
                              CausalMask{});
  check_differences<Standard>({.embed_dim = 6, .num_heads = 2, .bias = true}, kAlibi);
}

TEST_CASE("Gradients do not depend on threads, on company or on what a tape held before", "[layers][gradients]") {
  check_repeats<V1>({.embed_dim = 24, .num_heads = 3, .num_kv_heads = 1, .rotary = RotaryConfig{}});
  check_repeats<V2>({.embed_dim = 24, .num_heads = 4, .num_kv_heads = 2, .head_dim = 6, .rotary = RotaryConfig{}});
  check_repeats<Standard>({.embed_dim = 24, .num_heads = 6, .num_kv_heads = 3, .rotary = RotaryConfig{}});
}

TEST_CASE("A tape, a gradient layer or a dy that does not fit is refused", "[layers][gradients]") {
  check_refusals<V1>("MultiheadDiffAttention", {.embed_dim = 24, .num_heads = 6, .num_kv_heads = 3},
                     {.embed_dim = 24, .num_heads = 6}, {.embed_dim = 48, .num_heads = 6, .num_kv_heads = 3});
  check_refusals<V2>("MultiheadDiffAttentionV2", {.embed_dim = 24, .num_heads = 6, .head_dim = 4},
                     {.embed_dim = 24, .num_heads = 4, .head_dim = 6},
                     {.embed_dim = 30, .num_heads = 6, .head_dim = 4});
  check_refusals<Standard>("MultiheadAttention", {.embed_dim = 24, .num_heads = 6, .num_kv_heads = 3},
                           {.embed_dim = 24, .num_heads = 6}, {.embed_dim = 48, .num_heads = 6});
}

TEST_CASE("Heads of another width or number are another configuration, whatever shapes agree", "[layers][gradients]") {
  const Standard six({.embed_dim = 24, .num_heads = 6}), four({.embed_dim = 24, .num_heads = 4});
  const Matrix<double> x = Matrix<double>::Ones(4, 24);
  Standard::Tape tape;
  six.forward(x, CausalMask{}, tape);
  Standard grad = zeros_like(four);
  CHECK(thrown_by<std::invalid_argument>([&] { four.backward(x, tape, grad); }) ==
        "MultiheadAttention: the tape was filled by a layer of another configuration");
  CHECK(thrown_by<std::invalid_argument>([&] { six.backward(x, tape, grad); }) ==
        "MultiheadAttention: grad must be a layer of the same configuration");
}

TEST_CASE("Linear and RmsNorm have tapes too", "[layers][gradients]") {
  auto rng = make_rng();
  diffattn::Linear<double> linear(5, 3, true), linear_grad = zeros_like(linear);
  diffattn::RmsNorm<double> norm(5), norm_grad = zeros_like(norm);
  layer_checks::randomize(linear, rng);
  layer_checks::randomize(norm, rng);
  Matrix<double> x = random_matrix<double>(4, 5, rng);
  const Matrix<double> dy = random_matrix<double>(4, 3, rng);
  const auto loss = [&] { return linear.forward(norm.forward(x)).cwiseProduct(dy).sum(); };
  diffattn::Linear<double>::Tape linear_tape;
  diffattn::RmsNorm<double>::Tape norm_tape;
  CHECK(thrown_by<std::invalid_argument>([&] { linear.backward(dy, linear_tape, linear_grad); }) ==
        "Linear: backward needs a tape that forward(x, tape) has filled");
  CHECK(thrown_by<std::invalid_argument>([&] { norm.backward(x, norm_tape, norm_grad); }) ==
        "RmsNorm: backward needs a tape that forward(x, tape) has filled");
  linear.forward(norm.forward(x, norm_tape), linear_tape);
  const Matrix<double> dx = norm.backward(linear.backward(dy, linear_tape, linear_grad), norm_tape, norm_grad);
  CHECK(excess(dx, numerical_gradient(x, loss)) <= 0);
  CHECK(excess(linear_grad.weight, numerical_gradient(linear.weight, loss)) <= 0);
  CHECK(excess(linear_grad.bias, numerical_gradient(linear.bias, loss)) <= 0);
  CHECK(excess(norm_grad.weight, numerical_gradient(norm.weight, loss)) <= 0);
  CHECK(thrown_by<diffattn::ShapeError>([&] { norm.backward(dy, norm_tape, norm_grad); }) ==
        "RmsNorm: dy must be 4 x 5, got 4 x 3");
}

TEST_CASE("λ's gradient is what differences say", "[layers][gradients]") {
  auto rng = make_rng();
  diffattn::DiffLambda<double> lambda(4, 0.7), grad = zeros_like(lambda);
  layer_checks::randomize(lambda, rng);
  const auto loss = [&] { return -1.7 * lambda.value(); };
  lambda.backward(-1.7, grad);
  visit_parameters(lambda, [&](std::string_view name, auto& parameter) {
    const Matrix<double> numeric = numerical_gradient(parameter, loss);
    visit_parameters(grad, [&](std::string_view other, const auto& gradient) {
      if (name == other) CHECK(excess(gradient, numeric) <= 0);
    });
  });
}

TEST_CASE("Rotary turns back: the transpose of what it does", "[layers][gradients]") {
  auto rng = make_rng();
  for (const auto pairing : {diffattn::RotaryPairing::interleaved, diffattn::RotaryPairing::half}) {
    const diffattn::Rotary<double> rotary({.pairing = pairing, .dim = 6, .table_positions = 4}, 8);
    const Matrix<double> x = random_matrix<double>(7, 16, rng), dy = random_matrix<double>(7, 16, rng);
    Matrix<double> y = x, dx = dy;
    rotary.apply(diffattn::detail::writable_view_of(y), 2, 3);
    rotary.apply(diffattn::detail::writable_view_of(dx), 2, 3, 0, diffattn::Turn::back);
    CHECK(std::abs(y.cwiseProduct(dy).sum() - x.cwiseProduct(dx).sum()) <= 1e-13 * y.norm() * dy.norm());
    rotary.apply(diffattn::detail::writable_view_of(y), 2, 3, 0, diffattn::Turn::back);
    CHECK(y.isApprox(x, 1e-14));
  }
}
