#pragma once

// The operands of a call whose keys and values are packed in the pages of a cache: operands_of(), with pages in the
// place of k and v.

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/key_value_pages.hpp"
#include "diffattn/product/register_tile.hpp"

namespace diffattn::inline v0_1::detail {

/// Queries and λ; no keys and values. Holds what `in` looks at, as SideBySideOperands does.
template <Index kMaps, typename Result, typename Q, typename Lambda>
class PagedOperands {
  using Operands = HeadOperands<typename Q::Scalar, kMaps, Result>;

 public:
  PagedOperands(const CallSizes& call, const Q& q, const Lambda& lambda, const AttentionOptions& options)
      : sizes(call), in(sized_operands<Operands>(call, options)), q_(q), lambda_(lambda) {
    spread_queries(in.q, view_of(q_), sizes);
    in.lambda = lambda_view<typename Operands::Scalar>(lambda_);
  }
  PagedOperands(const PagedOperands&) = delete;
  PagedOperands& operator=(const PagedOperands&) = delete;

  CallSizes sizes;
  Operands in;

 private:
  Readable<Q> q_;
  ReadableLambda<Lambda> lambda_;
};

/// The columns of the output, for those that make it. Throws std::invalid_argument.
inline Index paged_output_cols(const char* where, const Heads& heads, const PageShape& shape) {
  return checked_product(where, "the columns of the output", {checked_heads(where, heads).num_heads, shape.dv});
}

/// The sizes of a call against pages of `shape`, packed for strips of `strip` keys. n_k counts all keys ever fed, of
/// which the pages hold the last. Throws ShapeError and std::invalid_argument.
inline CallSizes checked_paged_sizes(const char* where, Heads heads, Index query_maps, const Operand& q,
                                     const PageShape& shape, Index n_k, Index strip) {
  CallSizes sizes;
  sizes.heads = heads = checked_heads(where, heads, query_maps);
  sizes.n_q = q.rows;
  sizes.n_k = n_k;
  sizes.d = checked_width(where, q, heads.query_heads(query_maps));
  sizes.dv = shape.dv;
  sizes.query_maps = query_maps;
  sizes.key_maps = shape.key_maps;
  if (shape.heads != heads.num_kv_heads || shape.d != sizes.d || shape.strip != strip) {
    const bool column = q.cols == 1 && q.rows == heads.query_heads(query_maps) * shape.d;
    throw_shape({where, ": the cache must hold ", heads.num_kv_heads, " heads of width ", sizes.d, " in strips of ",
                 strip, ", got ", shape.heads, " of width ", shape.d, " in strips of ", shape.strip,
                 column ? "; q is a column: a single query is a row, did you mean q.transpose()?" : ""});
  }
  if (shape.page_size < kLeastPageKeys || (shape.page_size & (shape.page_size - 1)) != 0) {
    throw_invalid({where, ": the pages must be of a power of two of tokens, at least ", kLeastPageKeys, ", got ",
                   shape.page_size});
  }
  if (shape.key_maps > query_maps) throw_shape({where, ": the cache must hold one map of keys, got two"});
  check_operand_sizes(where, q, q, q, heads.num_heads, sizes.dv);
  return sizes;
}

/// Standard attention. Throws ShapeError and std::invalid_argument, before anything is evaluated.
template <typename Result, typename Q, typename Storage, typename Mask>
PagedOperands<1, Result, Q, double> operands_of(const char* where, const Eigen::MatrixBase<Q>& q,
                                                const KeyValuePages<Storage>& pages, const Operand& result,
                                                const Heads& heads, const Mask& mask, const AttentionOptions& options) {
  using Scalar = ArithmeticOf<typename Q::Scalar>;
  check_scalars<Q, Q, Q>();
  check_storage<typename Q::Scalar, Storage>();
  const CallSizes sizes = checked_paged_sizes(where, heads, 1, operand("q", q), pages.shape,
                                              pages.first_key + pages.n_k, Tile<Scalar>::kCols);
  check_rest(where, sizes, result, mask);
  constexpr double kNoLambda = 0;
  return {sizes, q.derived(), kNoLambda, options};
}

/// Differential attention.
template <typename Result, typename Q, typename Storage, typename Lambda, typename Mask>
PagedOperands<2, Result, Q, Lambda> operands_of(const char* where, const Eigen::MatrixBase<Q>& q,
                                                const KeyValuePages<Storage>& pages, const Lambda& lambda,
                                                const Operand& result, const Heads& heads, const Mask& mask,
                                                const AttentionOptions& options) {
  using Scalar = ArithmeticOf<typename Q::Scalar>;
  check_scalars<Q, Q, Q>();
  check_storage<typename Q::Scalar, Storage>();
  check_lambda_scalar<typename Q::Scalar, Lambda>();
  const CallSizes sizes = checked_paged_sizes(where, heads, 2, operand("q", q), pages.shape,
                                              pages.first_key + pages.n_k, Tile<Scalar>::kCols);
  check_lambda(where, lambda, sizes);
  check_rest(where, sizes, result, mask);
  return {sizes, q.derived(), lambda, options};
}

}  // namespace diffattn::inline v0_1::detail
