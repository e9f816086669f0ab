#pragma once

// Arithmetic: what a layer multiplies in.
//
//   MultiheadDiffAttention<float, FrozenMatrix> layer({…, .arithmetic = Arithmetic::bfloat16});
//   DiffLlama<float>::load(directory, {.arithmetic = Arithmetic::bfloat16});
//   pack_weights(layer);                        once its weights are there: products of many rows need not pack them
//
// scalar    the layer's own type, float or double, whatever the weights are stored as.
// bfloat16  weights of bfloat16 alone, activations of float: each is rounded to bfloat16 once before it is multiplied,
//           products are added up in float, and results are float. So are x of the linear layers, and q, k and v where
//           more than 4 queries attend together: at once, as the first chunk of a text, or to a KvCache<Eigen::bfloat16>.
//           Other attention is float: of fewer queries, which takes the same time; behind tokens in a cache of another
//           type; and of ranks that share a sequence. Norms, softmax, λ and residual sums stay float, and so
//           does P₁ − λ·P₂, which is rounded once before it meets v.
// Cost      a CPU with AVX512_BF16 does up to twice the work; others multiply the same values in float, up to the order
//           of additions. Activations keep 8 bits of their fraction: logits of the examples' checkpoint move by 0.27 %
//           of their size. Infinities and NaN keep their rules; the instruction takes subnormal numbers for 0.
// Memory    pack_weights() keeps a second copy of weights that are a FrozenMatrix of bfloat16, 2 bytes a number.
// Gradients there are none: 16-bit weights are not trained. A tape keeps q, k and v as they were before rounding.
// Errors    std::invalid_argument for bfloat16 asked of other weights or of double, naming both types: when a layer is
//           made, or by its first call where a FrozenMatrix alone knows its type.

#include <string_view>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/layers/frozen_matrix.hpp"
#include "diffattn/layers/parameters.hpp"

namespace diffattn::inline v0_1 {

/// What a layer multiplies in.
enum class Arithmetic {
  scalar,    ///< its own scalar: float or double
  bfloat16,  ///< bfloat16, added up in float
};

/// Packs every weight of a layer or model that is a FrozenMatrix of bfloat16 (FrozenMatrix::pack), so that no call does.
/// Results are the same, bit for bit. Weights that are assigned later are packed by each call, as all others are. Not to
/// be called while other threads use the layer. Throws std::invalid_argument for weights that have no values yet,
/// std::bad_alloc.
template <typename Layer>
void pack_weights(Layer& layer) {
  visit_parameters(layer, [](std::string_view /*name*/, auto& parameter) {
    if constexpr (std::is_same_v<std::remove_reference_t<decltype(parameter)>, FrozenMatrix>) parameter.pack();
  });
}

namespace detail {

/// What messages call a type of weights or activations.
template <typename T>
constexpr const char* type_name() {
  if constexpr (std::is_same_v<T, Eigen::bfloat16>) return "bfloat16";
  if constexpr (std::is_same_v<T, Eigen::half>) return "float16";
  if constexpr (std::is_same_v<T, float>) return "float";
  return "double";
}

/// Whether weights of Stored and activations of Scalar can be multiplied in bfloat16.
template <typename Scalar, typename Stored>
inline constexpr bool kMultipliesBfloat16 = std::is_same_v<Scalar, float>&& std::is_same_v<Stored, Eigen::bfloat16>;

/// Whether weights of this matrix type may be such.
template <typename Scalar, typename Weight>
inline constexpr bool may_multiply_bfloat16 = std::is_same_v<Scalar, float> &&
                                              (std::is_same_v<Weight, Matrix<Eigen::bfloat16>> ||
                                               std::is_same_v<Weight, FrozenMatrix>);

/// Throws std::invalid_argument if bfloat16 is asked of weights and activations that it is not for.
template <typename Scalar, typename Stored>
void check_arithmetic(const char* where, Arithmetic arithmetic) {
  if (arithmetic == Arithmetic::scalar || kMultipliesBfloat16<Scalar, Stored>) return;
  throw_invalid({where,
                 ": Arithmetic::bfloat16 multiplies weights of bfloat16 with activations of float, not weights of ",
                 type_name<Stored>(), " with activations of ", type_name<Scalar>(),
                 ": convert the weights once, or leave arithmetic at Arithmetic::scalar"});
}

/// What a configuration that may not have the field asks for.
template <typename Config>
Arithmetic arithmetic_of(const Config& config) {
  if constexpr (requires { config.arithmetic; }) {
    return config.arithmetic;
  } else {
    return Arithmetic::scalar;
  }
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
