// A layer with a slope for every head (ALiBi), as recorded in float64 with autograd: values, gradients, decoding.

#include <diffattn/io/parameters.hpp>
#include <diffattn/io/safetensors.hpp>
#include <diffattn/kernels/bias.hpp>
#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/parameters.hpp>
#include <string_view>
#include <vector>

#include "support/catch.hpp"

namespace {

using namespace diffattn;

template <typename Scalar>
MultiheadDiffAttention<Scalar> alibi_layer(const Safetensors& file) {
  MultiheadDiffAttention<Scalar> layer({.embed_dim = 32, .num_heads = 4, .num_kv_heads = 4, .head_dim = 4, .depth = 0});
  load_parameters(layer, file, "weight.");
  return layer;
}

double relative_error(const Matrix<double>& got, const Matrix<double>& expected) {
  return (got - expected).cwiseAbs().maxCoeff() / expected.cwiseAbs().maxCoeff();
}

}  // namespace

TEST_CASE("a layer with ALiBi gives what was recorded, forward, back and from a cache", "[layers][golden]") {
  const Safetensors file(DIFFATTN_TEST_DATA "/golden/wide_alibi_0.safetensors");
  const Matrix<double> x = file.matrix<double>("x"), y = file.matrix<double>("y");
  const Vector<double> slopes = file.vector<double>("slopes");
  const auto mask = with_bias(CausalMask{}, AlibiBias({slopes.begin(), slopes.end()}));

  const auto layer = alibi_layer<double>(file);
  MultiheadDiffAttention<double>::Tape tape;
  CHECK(relative_error(layer.forward(x, mask, tape), y) <= 1e-12);
  auto grad = zeros_like(layer), expected = zeros_like(layer);
  CHECK(relative_error(layer.backward(file.matrix<double>("dy"), tape, grad), file.matrix<double>("dx")) <= 1e-9);
  load_parameters(expected, file, "grad.");
  std::vector<Matrix<double>> recorded;
  visit_parameters(expected, [&](std::string_view, const auto& parameter) { recorded.push_back(parameter); });
  std::size_t i = 0;
  visit_parameters(grad, [&](std::string_view name, const auto& parameter) {
    INFO(name);
    CHECK(relative_error(parameter, recorded[i++]) <= 1e-9);
  });
  CHECK(i == recorded.size());

  KvCache<double> cache({.page_size = 32});
  for (Index row = 0; row < x.rows(); ++row) {
    CHECK(relative_error(layer.forward(x.row(row), cache, mask), y.row(row)) <= 1e-11);
  }

  const auto in_float = alibi_layer<float>(file);
  const Matrix<float> x_float = x.cast<float>();
  const Matrix<float> y_float = in_float.forward(x_float, mask);
  CHECK(relative_error(y_float.cast<double>(), y) <= 1e-5);
}
