// A tape that is used again: what it remembers is of the last pass alone.

#include <diffattn/layers/multihead_attention.hpp>

#include "layers/layer_checks.hpp"

using diffattn::AlibiBias;
using diffattn::CausalMask;
using diffattn::Index;
using diffattn::Matrix;
using diffattn::MultiheadAttention;
using diffattn::SlidingWindowMask;

TEST_CASE("A tape remembers the mask of its last pass, of the same type or another", "[layers][gradients]") {
  auto rng = make_rng();
  MultiheadAttention<double> layer({.embed_dim = 12, .num_heads = 2});
  layer_checks::randomize(layer, rng);
  const Matrix<double> x = random_matrix<double>(20, 12, rng), dy = random_matrix<double>(20, 12, rng);
  const auto gradient = [&](const auto& mask, MultiheadAttention<double>::Tape& tape) {
    layer.forward(x, mask, tape);
    MultiheadAttention<double> grad = zeros_like(layer);
    return layer.backward(dy, tape, grad);
  };
  const auto check = [&](MultiheadAttention<double>::Tape& used, const auto& mask) {
    MultiheadAttention<double>::Tape fresh;
    CHECK(identical(gradient(mask, used), gradient(mask, fresh)));
  };
  MultiheadAttention<double>::Tape used;
  check(used, SlidingWindowMask{2});
  check(used, SlidingWindowMask{9});
  check(used, with_bias(CausalMask{}, AlibiBias{0.5}));
  check(used, with_bias(CausalMask{}, AlibiBias{-0.25}));
  check(used, CausalMask{});
}
