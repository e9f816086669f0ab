#pragma once

// The scalar types of a call's operands, checked when it is compiled. Each check is consteval, so that it is
// instantiated where it is called: GCC 16 drops what is pending once a later line has failed, and its message with it.

#include <Eigen/Core>

#include <type_traits>

#include "diffattn/core/parallel.hpp"
#include "diffattn/kernels/detail/arithmetic.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1::detail {

/// Keys and values of another type than the queries, one of them bfloat16, which the arithmetic widens by itself: who
/// mixes them expects that it does so here, too.
template <typename Q, typename K, typename V>
consteval void check_narrow_scalars() {
  static_assert(!is_narrow<Q> || !std::is_same_v<K, float>,
                "diffattn: q is of bfloat16 and k of float; convert one of them with .template cast<>()");
  static_assert(!is_narrow<K> || !std::is_same_v<Q, float>,
                "diffattn: q is of float and k of bfloat16; convert one of them with .template cast<>()");
  static_assert(!is_narrow<Q> || !std::is_same_v<V, float>,
                "diffattn: q is of bfloat16 and v of float; convert one of them with .template cast<>()");
  static_assert(!is_narrow<V> || !std::is_same_v<Q, float>,
                "diffattn: q is of float and v of bfloat16; convert one of them with .template cast<>()");
}

/// One scalar type for all operands, and one that the production kernels know.
template <typename Q, typename K, typename V>
consteval void check_scalars() {
  using Scalar = typename Q::Scalar;
  static_assert(std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double> || is_narrow<Scalar>,
                "diffattn: the kernels take float or double (diffattn::reference takes long double too), or "
                "Eigen::bfloat16");
  check_narrow_scalars<Scalar, typename K::Scalar, typename V::Scalar>();
  static_assert(std::is_same_v<Scalar, typename K::Scalar>,
                "diffattn: the keys must have the scalar type of the queries; convert with .template cast<>()");
  static_assert(std::is_same_v<Scalar, typename V::Scalar>,
                "diffattn: the values must have the scalar type of the queries; convert with .template cast<>()");
}

template <typename Q1, typename K1, typename Q2, typename K2>
consteval void check_second_scalars() {
  static_assert(std::is_same_v<typename Q1::Scalar, typename Q2::Scalar>,
                "diffattn: q2 must have the scalar type of q1; convert with .template cast<>()");
  static_assert(std::is_same_v<typename K1::Scalar, typename K2::Scalar>,
                "diffattn: k2 must have the scalar type of k1; convert with .template cast<>()");
}

/// Queries of bfloat16 against a cache.
template <typename Scalar, typename Storage>
consteval void check_storage() {
  static_assert(!is_narrow<Scalar> || std::is_same_v<Scalar, Storage>,
                "diffattn: q is of bfloat16 and the cache is not; it must be a KvCache<Eigen::bfloat16>");
}

/// The output of a forward pass: of the queries' type, or float where they are bfloat16.
template <typename Scalar, typename Out>
consteval void check_output_scalar() {
  using Written = typename Out::Scalar;
  static_assert(!is_narrow<Scalar> || std::is_same_v<Written, Scalar> || std::is_same_v<Written, float>,
                "diffattn: the output of bfloat16 queries must be of float or of bfloat16");
  static_assert(is_narrow<Scalar> || std::is_same_v<Scalar, Written>,
                "diffattn: the output and all gradients must have the scalar type of the queries");
}

/// The gradient of a result, or a part of attention.
template <typename Scalar, typename Result>
consteval void check_result_scalar() {
  static_assert(
      !is_narrow<Scalar>,
      "diffattn: gradients and parts of attention take float or double, not bfloat16; convert with .template cast<>()");
  static_assert(std::is_same_v<Scalar, typename Result::Scalar>,
                "diffattn: the output and all gradients must have the scalar type of the queries");
}

template <typename Scalar, typename Q>
consteval void check_gradient_scalar() {
  check_result_scalar<typename Q::Scalar, Q>();
  static_assert(std::is_same_v<Scalar, typename Q::Scalar>,
                "diffattn: the gradients must have the scalar type of the queries");
}

template <typename Scalar, typename Lambda>
consteval void check_lambda_scalar() {
  if constexpr (!is_scalar_lambda<Lambda>) {
    static_assert(
        !is_narrow<Scalar> || std::is_same_v<typename Lambda::Scalar, float>,
        "diffattn: lambda of bfloat16 queries must be a number or a matrix of float, in which it is computed");
    static_assert(is_narrow<Scalar> || std::is_same_v<typename Lambda::Scalar, Scalar>,
                  "diffattn: lambda must be a number or a matrix of the scalar type of the queries");
  }
}

/// Keys of other ranks would be left out without a word.
template <typename E>
consteval void check_keys_are_here() {
  static_assert(!spreads_sequences<E>,
                "diffattn: this call cannot spread a sequence over ranks; distributed/sequence_parallel.hpp says which "
                "can, and has to be included");
}

}  // namespace diffattn::inline v0_1::detail
