// What comes through a layer's door, and a variant that is not the library's: gradients, caches, threads, files.

#include <diffattn/io/parameters.hpp>
#include <diffattn/layers/attention_layer.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <diffattn/layers/rms_norm.hpp>

#include <array>

#include "layers/layer_checks.hpp"
#include "layers/own_variant.hpp"
#include "support/numerical_gradient.hpp"

namespace {

using diffattn::CausalMask;
using diffattn::Index;
using diffattn::KvCache;
using diffattn::Matrix;
using diffattn::MultiheadAttention;
using diffattn::MultiheadDiffAttention;
using diffattn::MultiheadDiffAttentionV2;
using diffattn::Workspace;
using layer_checks::kOwnConfig;
using layer_checks::OwnAttention;
using layer_checks::OwnConfig;

template <typename Layer>
void check_hint(const std::string& name, const typename Layer::Config& config) {
  const Layer layer(config);
  const Matrix<float> x = Matrix<float>::Ones(5, 24);
  const auto refused = [&](const auto& of) { return thrown_by<diffattn::ShapeError>([&] { layer.forward(of); }); };
  const std::string must = name + ": x must have embed_dim = 24 columns, one token a row, got ";
  CHECK(refused(x.transpose()) == must + "24 x 5: did you mean x.transpose()?");
  CHECK(refused(Eigen::VectorXf(Eigen::VectorXf::Ones(24))) == must + "24 x 1: did you mean x.transpose()?");
  CHECK(refused(x.leftCols(23)) == name + ": x must be 5 x 24, got 5 x 23");
  CHECK(layer.forward(Eigen::VectorXf::Ones(24).transpose()).rows() == 1);
  KvCache<float> cache;
  CHECK(thrown_by<diffattn::ShapeError>([&] { layer.forward(x.transpose(), cache); }) ==
        must + "24 x 5: did you mean x.transpose()?");
  CHECK(cache.empty());
}

}  // namespace

TEST_CASE("A transposed x is told what it is", "[layers][attention_layer]") {
  check_hint<MultiheadAttention<float>>("MultiheadAttention", {.embed_dim = 24, .num_heads = 2});
  check_hint<MultiheadDiffAttention<float>>("MultiheadDiffAttention", {.embed_dim = 24, .num_heads = 2});
  check_hint<MultiheadDiffAttentionV2<float>>("MultiheadDiffAttentionV2", {.embed_dim = 24, .num_heads = 2});
}

TEST_CASE("Lengths are any integers", "[layers][attention_layer]") {
  auto rng = make_rng();
  const MultiheadDiffAttention<float> layer({.embed_dim = 24, .num_heads = 2});
  const Matrix<float> x = random_matrix<float>(9, 24, rng);
  const Matrix<float> expected = layer.forward(x, CausalMask{}, std::vector<Index>{2, 7});
  const std::vector<int> ints{2, 7};
  const std::array<std::size_t, 2> sizes{2, 7};
  const short shorts[] = {2, 7};
  CHECK(identical(layer.forward(x, CausalMask{}, {2, 7}), expected));
  CHECK(identical(layer.forward(x, CausalMask{}, ints), expected));
  CHECK(identical(layer.forward(x, CausalMask{}, sizes), expected));
  CHECK(identical(layer.forward(x, CausalMask{}, shorts), expected));
  CHECK(identical(layer.forward(x, CausalMask{}, std::span<const int>(ints)), expected));
  MultiheadDiffAttention<float>::Tape tape;
  Workspace workspace;
  Matrix<float> y(9, 24);
  CHECK(identical(layer.forward(x, CausalMask{}, {2, 7}, tape), expected));
  layer.forward_into(y, x, CausalMask{}, {2, 7}, workspace);
  CHECK(identical(y, expected));
  y.setZero();
  layer.forward_into(y, x, CausalMask{}, ints, tape, workspace);
  CHECK(identical(y, expected));

  const std::vector<std::uint64_t> huge{std::numeric_limits<std::uint64_t>::max(), 10};  // 9, modulo 2^64
  CHECK_THROWS_AS(layer.forward(x, CausalMask{}, huge), diffattn::ShapeError);
  CHECK(thrown_by<std::invalid_argument>([&] {
          layer.forward(x, CausalMask{}, {10, -1});
        }) == "MultiheadDiffAttention: a sequence cannot have -1 tokens");
}

TEST_CASE("The baseline's heads may have any width", "[layers][attention_layer]") {
  const MultiheadAttention<double> layer({.embed_dim = 10, .num_heads = 3, .num_kv_heads = 1, .head_dim = 4});
  CHECK(layer_checks::parameter_list(layer) == std::vector<std::string>{"q_proj.weight 12x10", "k_proj.weight 4x10",
                                                                        "v_proj.weight 4x10", "out_proj.weight 10x12"});
  // The width that divides embed_dim is the one that is left out.
  const MultiheadAttention<double> said({.embed_dim = 12, .num_heads = 3, .head_dim = 4, .seed = 3});
  const MultiheadAttention<double> left_out({.embed_dim = 12, .num_heads = 3, .seed = 3});
  CHECK(layer_checks::same_parameters(said, left_out));
  CHECK(left_out.config().head_dim == 4);
  CHECK(layer_checks::config_error<MultiheadAttention>({.embed_dim = 12, .num_heads = 3, .head_dim = -4}) ==
        "MultiheadAttention: head_dim must be at least 1, got -4");
}

TEST_CASE("A variant of one's own has the gradients that differences say", "[layers][attention_layer][gradients]") {
  auto rng = make_rng();
  OwnAttention<double> layer(kOwnConfig), grad = zeros_like(layer);
  layer_checks::randomize(layer, rng);
  Matrix<double> x = random_matrix<double>(9, 10, rng);
  const Matrix<double> dy = random_matrix<double>(9, 10, rng);
  const auto mask = with_bias(CausalMask{}, diffattn::AlibiBias(diffattn::alibi_slopes(4)));
  const auto loss = [&] { return layer.forward(x, mask, {5, 1, 3}).cwiseProduct(dy).sum(); };
  OwnAttention<double>::Tape tape;
  CHECK(identical(layer.forward(x, mask, {5, 1, 3}, tape), layer.forward(x, mask, {5, 1, 3})));
  const Matrix<double> dx = layer.backward(dy, tape, grad);
  CHECK(support::excess(dx, support::numerical_gradient(x, loss)) <= 0);
  visit_parameters(layer, [&](std::string_view name, auto& parameter) {
    INFO(std::string(name));
    const Matrix<double> numeric = support::numerical_gradient(parameter, loss);
    CHECK_FALSE(numeric.isZero(1e-6));
    visit_parameters(grad, [&](std::string_view other, const auto& gradient) {
      if (name == other) CHECK(support::excess(gradient, numeric) <= 0);
    });
  });
}

TEST_CASE("A variant of one's own is called, cached, run on threads and refused like the library's",
          "[layers][attention_layer]") {
  auto rng = make_rng();
  OwnAttention<float> layer(kOwnConfig);
  layer_checks::randomize(layer, rng);
  layer_checks::stacked_sequences<float>(layer, rng);
  layer_checks::causal_prefix<float>(layer, rng);
  layer_checks::threads_and_workspace<float>(layer, rng);
  layer_checks::strides<float>(layer, rng);
  layer_checks::refusals<float>(layer, "OwnAttention");
  CHECK(layer_checks::parameter_list(layer) ==
        std::vector<std::string>{"q_proj.weight 32x10", "q_proj.bias 32x1", "k_proj.weight 8x10", "k_proj.bias 8x1",
                                 "v_proj.weight 6x10", "v_proj.bias 6x1", "mix.weight 10x12", "mix.bias 10x1",
                                 "lambda 1x1", "gain 3x1"});
  const Matrix<float> x = random_matrix<float>(40, 10, rng), expected = layer.forward(x);
  KvCache<float> cache;
  for (Index i = 0; i < x.rows(); ++i) {
    CHECK(layer.forward(x.row(i), cache).isApprox(expected.row(i), 1e-5F));
  }
  KvCache<float> wrong;
  MultiheadAttention<float>({.embed_dim = 10, .num_heads = 2}).forward(x, wrong);
  CHECK(thrown_by<diffattn::ShapeError>([&] {
          layer.forward(x, wrong);
        }).find("OwnAttention: the cache must hold 2 heads of 1 x 4 key and 3 value columns") == 0);
  OwnConfig other = kOwnConfig;
  other.num_heads = 2;
  OwnAttention<float> small(other);
  OwnAttention<float>::Tape tape;
  layer.forward(x, CausalMask{}, tape);
  CHECK(thrown_by<std::invalid_argument>([&] { layer.backward(x, tape, small); }) ==
        "OwnAttention: grad must be a layer of the same configuration");
}

TEST_CASE("A gradient without the biases or the norm weight of the layer is refused", "[layers][attention_layer]") {
  using BiasedLayer = MultiheadDiffAttention<float>;
  const BiasedLayer layer({.embed_dim = 24, .num_heads = 2, .bias = true});
  const Matrix<float> x = Matrix<float>::Ones(4, 24);
  BiasedLayer::Tape tape;
  layer.forward(x, CausalMask{}, tape);
  BiasedLayer unbiased({.embed_dim = 24, .num_heads = 2}),
      unnormed({.embed_dim = 24, .num_heads = 2, .norm_weight = false, .bias = true});
  for (BiasedLayer* grad : {&unbiased, &unnormed}) {
    CHECK(thrown_by<std::invalid_argument>([&] { layer.backward(x, tape, *grad); }) ==
          "MultiheadDiffAttention: grad must be a layer of the same configuration");
  }
  // Another λ_init or seed changes no shape.
  BiasedLayer reseeded({.embed_dim = 24, .num_heads = 2, .depth = 4, .bias = true, .seed = 9});
  CHECK_NOTHROW(layer.backward(x, tape, reseeded));
}

TEST_CASE("RmsNorm writes matrices of any strides, and takes gradients through them", "[layers][rms_norm]") {
  auto rng = make_rng();
  diffattn::RmsNorm<double> norm(5), grad = zeros_like(norm), strided_grad = zeros_like(norm);
  layer_checks::randomize(norm, rng);
  const Matrix<double> wide = random_matrix<double>(70, 9, rng), x = wide.middleCols(2, 5), expected = norm.forward(x);
  const Matrix<double> dy = random_matrix<double>(70, 5, rng);
  Workspace workspace;
  Matrix<double> y(70, 5), frame = Matrix<double>::Constant(70, 8, 7), dx(70, 5);
  Eigen::MatrixXd by_columns(70, 5);
  norm.forward_into(y, x, workspace);
  CHECK(identical(y, expected));
  norm.forward_into(frame.middleCols(1, 5), wide.middleCols(2, 5), workspace);
  CHECK(identical(frame.middleCols(1, 5), expected));
  CHECK((frame.leftCols(1).array() == 7).all());
  CHECK((frame.rightCols(2).array() == 7).all());
  norm.forward_into(by_columns, x + Matrix<double>::Zero(70, 5), workspace);
  CHECK(identical(by_columns, expected));
  y = x;
  norm.forward_into(y, y, workspace, diffattn::Serial{}, 0.5);
  CHECK(y.isApprox(0.5 * expected, 1e-14));

  norm.backward_into(dx, dy, x, grad, workspace);
  by_columns = dy;
  norm.backward_into(frame.middleCols(1, 5), by_columns, wide.middleCols(2, 5), strided_grad, workspace);
  CHECK(identical(frame.middleCols(1, 5), dx));
  CHECK(identical(strided_grad.weight, grad.weight));
  CHECK(thrown_by<diffattn::ShapeError>([&] { norm.forward_into(y.leftCols(4), x, workspace); }) ==
        "RmsNorm: y must be 70 x 5, got 70 x 4");
  CHECK(thrown_by<diffattn::ShapeError>([&] { norm.backward_into(dx, dy.topRows(3), x, grad, workspace); }) ==
        "RmsNorm: dy must be 70 x 5, got 3 x 5");
}

TEST_CASE("Rotary turns a matrix whose rows are contiguous, and refuses another", "[layers][rotary]") {
  auto rng = make_rng();
  const diffattn::Rotary<double> rotary({}, 4);
  Matrix<double> x = random_matrix<double>(3, 10, rng), turned = x;
  rotary.apply(turned.middleCols(1, 8), 2, 5);
  Matrix<double> inner = x.middleCols(1, 8);
  rotary.apply({inner.data(), 3, 8, 8}, 2, 5);
  CHECK(identical(turned.middleCols(1, 8), inner));
  CHECK(identical(turned.leftCols(1), x.leftCols(1)));
  Eigen::MatrixXd by_columns = x;
  CHECK(thrown_by<diffattn::ShapeError>([&] {
          rotary.apply(by_columns, 2);
        }).find("Rotary: the columns of a row of x must lie one after another") == 0);
  CHECK(thrown_by<diffattn::ShapeError>([&] { rotary.apply(x, 3); }) ==
        "Rotary: x must have 3 heads of 4 columns, got 10");
}
