#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/sizes.hpp"

namespace diffattn::inline v0_1 {

/// What every attention function can be told besides its operands and its mask.
struct AttentionOptions {
  /// What q·k is multiplied by; 1/sqrt(d) if left out.
  std::optional<double> scale = std::nullopt;
};

/// Heads that lie side by side in the columns. Query head h reads key and value head h / (num_heads / num_kv_heads),
/// the grouping of the official flash variants (grouped-query attention); num_kv_heads = 0 means num_heads.
struct Heads {
  Index num_heads = 1;
  Index num_kv_heads = 0;
};

namespace detail {

/// Fills in num_kv_heads. Throws std::invalid_argument unless it divides num_heads.
inline Heads checked_heads(const char* where, Heads heads) {
  if (heads.num_kv_heads == 0) heads.num_kv_heads = heads.num_heads;
  if (heads.num_heads > kMostValues) throw_invalid({where, ": num_heads = ", heads.num_heads, ", which cannot be"});
  if (heads.num_heads < 1 || heads.num_kv_heads < 1 || heads.num_heads % heads.num_kv_heads != 0) {
    throw_invalid({where, ": num_kv_heads must divide num_heads, got ", heads.num_kv_heads, " and ", heads.num_heads});
  }
  return heads;
}

/// Refuses operands whose sizes multiply to more than memory holds, before they do: a Map with a stride of 0 may be of
/// any size. `heads` and `dv` are those of the output.
template <typename Q, typename K, typename V>
void check_operand_sizes(const char* where, const Eigen::EigenBase<Q>& q, const Eigen::EigenBase<K>& k,
                         const Eigen::EigenBase<V>& v, Index heads, Index dv) {
  // Of what everybody calls with, no three sizes overflow: small calls take as long as a few divisions would.
  constexpr Index kAnybodys = Index{1} << 20;
  if ((q.rows() | q.cols() | k.rows() | k.cols() | v.rows() | v.cols() | heads | dv) < kAnybodys) return;
  check_operand_size(where, "q", q.rows(), q.cols());
  check_operand_size(where, "k", k.rows(), k.cols());
  check_operand_size(where, "v", v.rows(), v.cols());
  checked_product(where, "the size of the output", {std::max<Index>(q.rows(), 1), heads, dv});
}

/// `count` columns split evenly over `parts`. Throws ShapeError unless they can be.
inline Index checked_width(const char* where, const char* tensor, Index count, Index parts) {
  if (count == 0 || count % parts != 0) {
    throw_shape({where, ": the columns of ", tensor, " must be a positive multiple of ", parts, ", got ", count});
  }
  return count / parts;
}

/// One scalar type for all operands, and one that the production kernels know. consteval, so that it is instantiated
/// where it is called: GCC 16 drops what is pending once a later line has failed, and this message with it.
template <typename Scalar, typename... Matrices>
consteval void check_scalars() {
  static_assert(std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double>,
                "diffattn: the kernels take float or double (diffattn::reference takes long double too)");
  static_assert((std::is_same_v<Scalar, typename Matrices::Scalar> && ...),
                "diffattn: all operands must have the scalar type of the queries; convert with .template cast<>()");
}

template <typename Scalar>
Scalar scale_of(const AttentionOptions& options, Index d) {
  if (options.scale) return static_cast<Scalar>(*options.scale);
  return Scalar(1) / std::sqrt(static_cast<Scalar>(d));
}

/// λ for every query row and head: one value for all, or a matrix of them read in place.
template <typename Scalar>
struct LambdaView {
  Scalar constant = 0;
  StridedView<const Scalar> values{};  // rows x heads; no data when λ is constant

  Scalar operator()(Index row, Index head) const { return values.data == nullptr ? constant : values(row, head); }
  LambdaView middle_rows(Index row, Index num_rows) const {
    return values.data == nullptr ? *this : LambdaView{constant, values.middle_rows(row, num_rows)};
  }
};

template <typename Lambda>
inline constexpr bool is_scalar_lambda = std::is_arithmetic_v<Lambda>;

template <typename Lambda>
struct ReadableLambdaOf {
  using Type = Readable<Lambda>;
};
template <typename Lambda>
requires is_scalar_lambda<Lambda>
struct ReadableLambdaOf<Lambda> {
  using Type = const Lambda;
};
/// Readable, for a λ that may be a plain number.
template <typename Lambda>
using ReadableLambda = typename ReadableLambdaOf<Lambda>::Type;

template <typename Scalar, typename Lambda>
LambdaView<Scalar> lambda_view(const char* where, const Lambda& lambda, Index rows, Index heads) {
  if constexpr (is_scalar_lambda<Lambda>) {
    return {static_cast<Scalar>(lambda), {}};
  } else {
    static_assert(std::is_same_v<typename Lambda::Scalar, Scalar>,
                  "diffattn: lambda must be a number or a matrix of the scalar type of the queries");
    check_shape(where, "lambda", lambda, rows, heads);
    return {Scalar(0), view_of(lambda)};
  }
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
