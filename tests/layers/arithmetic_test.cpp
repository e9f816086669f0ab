// Arithmetic::bfloat16 in layers: near the same layer in float, in every way that it is called, and refused by name
// where weights are not bfloat16.

#include "diffattn/layers/arithmetic.hpp"

#include <cmath>
#include <diffattn/kernels/diff_attention.hpp>
#include <diffattn/layers/linear.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <string>

#include "layers/layer_checks.hpp"

namespace {

using diffattn::Arithmetic;
using diffattn::FrozenMatrix;
using diffattn::Index;
using diffattn::Linear;
using diffattn::Matrix;

using Narrow = Matrix<Eigen::bfloat16>;
using NarrowLayer = diffattn::MultiheadDiffAttention<float, FrozenMatrix>;

NarrowLayer arithmetic_layer(Arithmetic arithmetic) {
  NarrowLayer layer({.embed_dim = 48,
                     .num_heads = 4,
                     .num_kv_heads = 2,
                     .head_dim = 10,
                     .rotary = diffattn::RotaryConfig{},
                     .arithmetic = arithmetic});
  auto rng = make_rng();
  diffattn::visit_parameters(layer, [&](std::string_view, auto& parameter) {
    const Matrix<float> values = random_matrix<float>(parameter.rows(), parameter.cols(), rng);
    if constexpr (std::is_same_v<std::remove_reference_t<decltype(parameter)>, FrozenMatrix>) {
      parameter = FrozenMatrix(Narrow((0.15f * values).cast<Eigen::bfloat16>()));
    } else {
      parameter = 0.3f * values;
    }
  });
  return layer;
}

/// The root of the mean square of what differs, against that of b.
double arithmetic_difference(const Matrix<float>& a, const Matrix<float>& b) { return (a - b).norm() / b.norm(); }

template <typename Scalar, typename Stored>
std::string arithmetic_refused() {
  return thrown_by<std::invalid_argument>([] { Linear<Scalar, Matrix<Stored>>(3, 2, false, Arithmetic::bfloat16); });
}

}  // namespace

TEST_CASE("Linear with bfloat16 arithmetic multiplies the rounded x, alone or with others", "[layers][linear]") {
  auto rng = make_rng();
  Linear<float, Narrow> linear(37, 20, true, Arithmetic::bfloat16);
  linear.weight = random_matrix<float>(20, 37, rng).cast<Eigen::bfloat16>();
  linear.bias = random_matrix<float>(20, 1, rng);
  for (const Index n : {1, 6, 50}) {
    const Matrix<float> x = random_matrix<float>(n, 37, rng), y = linear.forward(x);
    Matrix<double> exact = x.cast<Eigen::bfloat16>().cast<double>() * linear.weight.cast<double>().transpose();
    exact.rowwise() += linear.bias.cast<double>().transpose();
    CHECK((y.cast<double>() - exact).cwiseAbs().maxCoeff() < 1e-5);
    linear.arithmetic = Arithmetic::scalar;
    CHECK((linear.forward(x) - y).cwiseAbs().maxCoeff() > 1e-4f);  // x as it is
    linear.arithmetic = Arithmetic::bfloat16;
  }
}

TEST_CASE("A layer in bfloat16 is near the one in float, at once, behind a cache, in a batch", "[layers]") {
  const NarrowLayer wide = arithmetic_layer(Arithmetic::scalar), narrow = arithmetic_layer(Arithmetic::bfloat16);
  auto rng = make_rng();
  const Matrix<float> x = random_matrix<float>(40, 48, rng), expected = wide.forward(x), y = narrow.forward(x);
  CHECK(arithmetic_difference(y, expected) < 0.02);
  CHECK(arithmetic_difference(y, expected) > 1e-4);

  const auto in_pieces = [&](auto cache) {
    Matrix<float> pieces(40, 48);
    pieces.topRows(30) = narrow.forward(x.topRows(30), cache);
    for (Index i = 30; i < 37; ++i) pieces.row(i) = narrow.forward(x.row(i), cache);
    auto* const batch = &cache;
    for (Index i = 37; i < 40; ++i) pieces.row(i) = narrow.forward(x.row(i), std::span(&batch, 1));
    return arithmetic_difference(pieces, expected);
  };
  CHECK(in_pieces(diffattn::KvCache<float>()) < 0.02);
  CHECK(in_pieces(diffattn::KvCache<Eigen::bfloat16>()) < 0.02);
}

TEST_CASE("A layer in bfloat16 attends in it: q, k and v are rounded once, at once or behind a cache", "[layers]") {
  const NarrowLayer layer = arithmetic_layer(Arithmetic::bfloat16);
  auto rng = make_rng();
  const Matrix<float> x = random_matrix<float>(40, 48, rng);
  const diffattn::CausalMask causal;
  NarrowLayer::Tape tape;
  const Matrix<float> y = layer.forward(x, causal, tape);
  CHECK(layer.forward(x) == y);
  const float lambda = layer.lambda_value();
  const auto narrow = [](const Matrix<float>& values) { return Narrow(values.cast<Eigen::bfloat16>()); };
  Matrix<float> attended(40, tape.attended.cols());
  diffattn::multihead_diff_attention_into(attended, narrow(tape.q), narrow(tape.k), narrow(tape.v), lambda,
                                          layer.heads(), causal);
  CHECK(tape.attended == attended);
  diffattn::multihead_diff_attention_into(attended, tape.q, tape.k, tape.v, lambda, layer.heads(), causal);
  const double rounded = arithmetic_difference(tape.attended, attended);
  CHECK(rounded > 1e-4);

  // Behind a cache the sums have another order, which W_O's rounding may show in a few places.
  diffattn::KvCache<float> wide_cache;
  diffattn::KvCache<Eigen::bfloat16> cache;
  CHECK(arithmetic_difference(layer.forward(x, wide_cache), y) < rounded / 4);
  CHECK(arithmetic_difference(layer.forward(x.topRows(20), cache), y.topRows(20)) < rounded / 4);
  CHECK(arithmetic_difference(layer.forward(x.bottomRows(20), cache), y.bottomRows(20)) < rounded / 4);
  // Sequences one behind the other, of which one is short enough to be attended to in float.
  const Matrix<float> stacked = layer.forward(x, causal, {36, 4});
  CHECK(stacked.topRows(36) == layer.forward(x.topRows(36)));
  CHECK(arithmetic_difference(stacked.bottomRows(4), layer.forward(x.bottomRows(4))) < rounded / 4);

  // Cross-attention, and what its memory's cache has.
  diffattn::KvCache<Eigen::bfloat16> memory;
  layer.write_memory(x.topRows(30), memory);
  const Matrix<float> cross = layer.forward_cross(x, x.topRows(30), diffattn::FullMask{}, tape);
  diffattn::multihead_diff_attention_into(attended, narrow(tape.q), narrow(tape.k), narrow(tape.v), lambda,
                                          layer.heads(), diffattn::FullMask{});
  CHECK(tape.attended == attended);
  CHECK(layer.forward_cross(x, x.topRows(30)) == cross);
  CHECK(arithmetic_difference(layer.forward_cross(x, memory), cross) < rounded / 4);
}

TEST_CASE("Packed weights change no bit, are shared by copies and go with the values", "[layers][linear]") {
  NarrowLayer layer = arithmetic_layer(Arithmetic::bfloat16);
  auto rng = make_rng();
  const Matrix<float> x = random_matrix<float>(40, 48, rng), y = layer.forward(x);
  const std::size_t bytes = layer.q_proj.weight.memory_bytes();
  diffattn::pack_weights(layer);
  CHECK(layer.forward(x) == y);
  CHECK(layer.forward(x.topRows(3)) == arithmetic_layer(Arithmetic::bfloat16).forward(x.topRows(3)));
  FrozenMatrix& weight = layer.q_proj.weight;
  const NarrowLayer copy = layer;
  CHECK(copy.q_proj.weight.packed() == weight.packed());
  CHECK((weight.packed() != nullptr) == diffattn::simd::kUsesPairs);
  CHECK((weight.memory_bytes() >= 2 * bytes) == diffattn::simd::kUsesPairs);
  weight.pack();  // a second time does nothing
  CHECK(copy.q_proj.weight.packed() == weight.packed());

  // Other values: what was packed of the old ones must not be read.
  weight = FrozenMatrix(Narrow(Narrow::Zero(weight.rows(), weight.cols())));
  CHECK(weight.packed() == nullptr);
  CHECK(arithmetic_difference(layer.forward(x), y) > 0.01);
  const Matrix<float> without = layer.forward(x);
  weight.pack();
  CHECK(layer.forward(x) == without);
  CHECK(copy.forward(x) == y);
  FrozenMatrix wide(Matrix<float>(Matrix<float>::Ones(2, 3)));
  wide.pack();
  CHECK(wide.packed() == nullptr);
  FrozenMatrix empty(2, 3);
  CHECK_THAT(thrown_by<std::invalid_argument>([&] { empty.pack(); }),
             Catch::Matchers::ContainsSubstring("has no values yet"));
}

TEST_CASE("Arithmetic::bfloat16 is refused where weights are not bfloat16, naming both types", "[layers][linear]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THAT((arithmetic_refused<float, float>()), ContainsSubstring("weights of float with activations of float"));
  CHECK_THAT((arithmetic_refused<float, Eigen::half>()),
             ContainsSubstring("weights of float16 with activations of float"));
  CHECK_THAT((arithmetic_refused<double, double>()), ContainsSubstring("weights of double with activations of double"));
  CHECK_THAT((arithmetic_refused<double, Eigen::bfloat16>()),
             ContainsSubstring("weights of bfloat16 with activations of double"));

  // What a FrozenMatrix holds is known when it is used: nothing has been written by then.
  Linear<float, FrozenMatrix> frozen(3, 2, false, Arithmetic::bfloat16);
  frozen.weight = FrozenMatrix(Matrix<float>(Matrix<float>::Ones(2, 3)));
  Matrix<float> y = Matrix<float>::Constant(5, 2, 7);
  diffattn::Workspace workspace;
  CHECK_THAT(thrown_by<std::invalid_argument>([&] { frozen.forward_into(y, Matrix<float>::Ones(5, 3), workspace); }),
             ContainsSubstring("weights of float with activations of float"));
  CHECK((y.array() == 7).all());
  CHECK_THAT(
      thrown_by<std::invalid_argument>([] {
        diffattn::MultiheadDiffAttention<float>({.embed_dim = 8, .num_heads = 2, .arithmetic = Arithmetic::bfloat16});
      }),
      ContainsSubstring("Arithmetic::bfloat16"));
}
