#pragma once

// A variant is what makes one attention layer another than the next. AttentionLayer (attention_layer.hpp) does whatever
// they have in common; a variant says the rest, and becomes the base of the layer, so that its parameters are the
// layer's. A variant of your own needs nothing of the library changed: examples/09_own_variant.cpp.
//
// A variant V is a class with
//
//   Scalar, Config, WeightMatrix      types: float or double; its configuration; that of the projections' weights
//                                     (linear.hpp)
//   kName                             const char*: what messages call the layer
//   kQueryMaps, kKeyMaps              1 and 1: one softmax a head. 2 and 2: the difference of two. 2 and 1: of two that
//                                     share their keys. A head's queries are kQueryMaps · head_dim columns wide.
//   value_dim(config)                 static: how many columns the values of a head have, and so its result
//   V(config)                         its own parameters; fields that were left to their default have been filled in
//   initialize(random)                initial values of its own parameters, in this order behind q_proj, k_proj, v_proj
//   visit(self, visitor)              static: names them, in the order of the state dict, behind the same three
//   kOutput                           pointer to the member that makes y of all heads' results: a Linear of
//                                     embed_dim x num_heads · value_dim (declare the member before)
//
// Its Config has the fields embed_dim, num_heads, num_kv_heads, head_dim, rotary, bias and seed, and what else it
// wants. With a field `arithmetic` (arithmetic.hpp) the projections q, k, v and kOutput multiply in it. A differential
// one whose heads may share their second map has num_noise_heads too (Heads, options.hpp).
//
// How λ comes about: kLambda
//
//   LambdaSource::none       kQueryMaps is 1
//   LambdaSource::layer      lambda_value() gives the λ of all heads, backward_lambda(dlambda, grad) adds to the
//                            gradients of what it was made of, in grad, a V
//   LambdaSource::token      lambda_proj, a Linear of num_heads x embed_dim, gives a number for every token and head;
//                            static lambda_of(number) makes λ of it, lambda_slope(λ) is the derivative
//
// What happens to a head's result before kOutput: kFinishesHeads; if it is true (one head of one token a row),
//
//   finish_heads(y, x, workspace, executor)                       y from x; y may be x
//   backward_heads(dx, dy, x, grad, workspace, executor)          dx from dy, dx may be dy; adds to gradients in grad

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/kernels/options.hpp"
// What variants are made of.
#include "diffattn/layers/arithmetic.hpp"
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rotary.hpp"

namespace diffattn::inline v0_1 {

/// Where the λ of a head comes from.
enum class LambdaSource {
  none,   ///< a head is one softmax
  layer,  ///< one number for all heads and tokens
  token,  ///< one for each token and head, from a projection of x
};

namespace detail {

/// The heads of a layer as the kernels are told of them. Without num_noise_heads in its configuration, every head has a
/// second map of its own.
template <typename Config>
Heads configured_heads(const Config& config) {
  Heads heads{config.num_heads, config.num_kv_heads, 0};
  if constexpr (requires { config.num_noise_heads; }) heads.num_noise_heads = config.num_noise_heads;
  return heads;
}

/// Fills in num_kv_heads, num_noise_heads and head_dim where they are 0. Throws std::invalid_argument for a
/// configuration that cannot be, naming the field.
template <typename Config>
Config checked_attention_config(const char* where, Index query_maps, Config config) {
  check_positive(where, "num_heads", config.num_heads);
  check_positive(where, "embed_dim", config.embed_dim);
  const bool pairs = query_maps == 2;
  if (config.head_dim == 0) {
    const char* const maps_name = pairs ? "2·num_heads" : "num_heads";
    const Index maps = checked_product(where, maps_name, {query_maps, config.num_heads});
    if (config.embed_dim % maps != 0) {
      throw_invalid({where, ": ", maps_name, " = ", maps, " must divide embed_dim = ", config.embed_dim});
    }
    config.head_dim = config.embed_dim / maps;
  }
  check_positive(where, "head_dim", config.head_dim);
  checked_product(where,
                  pairs ? "2·num_heads·head_dim·embed_dim, the size of a weight,"
                        : "num_heads·head_dim·embed_dim, the size of a weight,",
                  {query_maps, config.num_heads, config.head_dim, config.embed_dim});
  const Heads heads = checked_heads(where, configured_heads(config), query_maps);
  config.num_kv_heads = heads.num_kv_heads;
  if constexpr (requires { config.num_noise_heads; }) config.num_noise_heads = heads.num_noise_heads;
  return config;
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
