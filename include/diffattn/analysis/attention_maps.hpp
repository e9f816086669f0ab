#pragma once

// The attention maps of a layer, as numbers to look at: for every head the one or two softmaxes that it makes of x, and
// what it attends with.
//
//   for (const AttentionMaps<float>& head : attention_maps(layer, x)) effective_support(head.combined) …
//
// statistics.hpp says what is in them.
//
// Shapes   x (n x embed_dim), one sequence; every map (n x n), a query a row. A query that sees no key has zeros.
// Errors   those of layer.forward(x, mask), before any work. std::invalid_argument for a variant of your own with one λ
//          for all tokens that is hidden: lambda_value() must be public.
// Memory   maps are what a layer otherwise never holds: 3·n² values a head, n² where a head is one softmax.
// Cost     a forward pass and O(n²·head_dim) plain loops a map: to understand a layer with, not to run it.

#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/reference.hpp"
#include "diffattn/layers/attention_layer.hpp"

namespace diffattn::inline v0_1 {

/// What one head makes of a sequence of n tokens.
template <typename Scalar>
struct AttentionMaps {
  Matrix<Scalar> p1;        ///< n x n, the first softmax
  Matrix<Scalar> p2;        ///< n x n, the second; empty where a head is one softmax
  Matrix<Scalar> combined;  ///< n x n, what the values are added up with: p1 − λ·p2, or p1
  Vector<Scalar> lambda;    ///< n, one a query, all the same where the layer has one; empty where p2 is
};

namespace detail {

/// A mask as one head sees it, for code that knows of no heads.
template <typename Mask>
struct MaskOfHead {
  const Mask& mask;
  Index head;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const { return mask.visible_keys(query, n_q, n_k); }
  auto bias(Index /*head*/, Index query, Index key, Index n_q, Index n_k) const requires HasBias<Mask> {
    return mask.bias(head, query, key, n_q, n_k);
  }
};

/// λ of a head, one a query. A layer with one for all has it in public: lambda_value().
template <typename Layer>
Vector<typename Layer::Scalar> lambda_of_head(const Layer& layer, const typename Layer::Tape& tape, Index head) {
  if (tape.lambda.cols() != 0) return tape.lambda.col(head);
  if constexpr (requires { layer.lambda_value(); }) {
    return Vector<typename Layer::Scalar>::Constant(tape.q.rows(), layer.lambda_value());
  } else {
    throw_invalid({"attention_maps: the layer has two maps a head and no lambda_value() that can be called"});
  }
}

}  // namespace detail

/// The maps of every head of a layer on x, in the order of the heads.
template <typename Variant, typename X, AttentionMask Mask = CausalMask>
std::vector<AttentionMaps<typename Variant::Scalar>> attention_maps(const AttentionLayer<Variant>& layer,
                                                                    const Eigen::MatrixBase<X>& x,
                                                                    const Mask& mask = {}) {
  using Scalar = typename Variant::Scalar;
  typename AttentionLayer<Variant>::Tape tape;  // its q and k are those that the kernels were given
  layer.forward(x, mask, tape);
  const auto& config = layer.config();
  const Index d = config.head_dim, heads = config.num_heads, heads_per_kv = heads / config.num_kv_heads;
  const Index query_maps = tape.q.cols() / (heads * d), key_maps = tape.k.cols() / (config.num_kv_heads * d);

  std::vector<AttentionMaps<Scalar>> all;
  for (Index h = 0; h < heads; ++h) {
    const detail::MaskOfHead<Mask> mask_of_head{mask, h};
    const auto map = [&](Index number) {
      const Index key_map = h / heads_per_kv * key_maps + (key_maps == 1 ? 0 : number);
      return reference::attention_map(tape.q.middleCols((h * query_maps + number) * d, d),
                                      tape.k.middleCols(key_map * d, d), mask_of_head);
    };
    AttentionMaps<Scalar> maps;
    maps.p1 = map(0);
    maps.combined = maps.p1;
    if (query_maps == 2) {
      maps.p2 = map(1);
      maps.lambda = detail::lambda_of_head(layer, tape, h);
      maps.combined -= maps.lambda.asDiagonal() * maps.p2;
    }
    all.push_back(std::move(maps));
  }
  return all;
}

}  // namespace diffattn::inline v0_1
