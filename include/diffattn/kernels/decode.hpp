#pragma once

// Attention against a cache: the queries of the newest tokens against keys and values that are already packed. One
// query, a few, or a whole prompt; what attention.hpp and diff_attention.hpp compute, without packing anything.
//
//   decode_attention_into(out, q, pages, heads, mask, options, workspace, executor)
//   decode_diff_attention_into(out, q, pages, lambda, heads, mask, options, workspace, executor)
//
// The queries are those of the last n_q tokens. Under CausalMask each sees the tokens up to its own; any mask and bias
// will do (mask.hpp), as if all keys ever fed, pages.first_key + pages.n_k of them, stood in one piece: those that have
// been dropped are not seen. KvCache (layers/kv_cache.hpp) makes the pages and says `cache.packed()`.
//
// Shapes     q (n_q x H·d) → out (n_q x H·dv), differential: q (n_q x 2H·d), packed head 2h is Q1_h and 2h+1 is Q2_h.
//            The pages hold G = num_kv_heads heads of keys (d wide; for a differential head two of them, or one that
//            both maps share: DIFF V2) and values (dv wide). n_q may exceed what the cache holds: a query that sees no
//            key gives exactly 0.
// Storage    the cache's may be narrower than the scalar of q (bfloat16, half): values are widened as they are read.
// λ          a number, or one for every query and head, n_q x H.
// Errors     ShapeError, std::invalid_argument; before any work, and nothing has been written.
// Memory     a few queries: the weights of all visible keys, from `workspace`. More: the scratch of attention.hpp and,
//            where the storage is narrower, a widened copy of one head.
// Threads    as many as the executor has, pages of keys shared out besides heads; the result is bitwise the same for
//            any number.
// Cost       up to 4 queries: every visible key and value is read once, 2·d + dv values a token and key head; with
//            dv = 2d that is what two standard heads read. More: that of attention.hpp and diff_attention.hpp.

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/forward/cached_heads.hpp"
#include "diffattn/kernels/detail/forward/differential_block.hpp"
#include "diffattn/kernels/detail/forward/standard_block.hpp"
#include "diffattn/kernels/detail/shifted_mask.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// Every check that both entry points share.
template <typename Scalar, typename Storage, typename Mask>
void check_decode(const char* where, const KeyValuePages<Storage>& cache, const Heads& heads, Index n_q, Index d,
                  const Mask& mask) {
  const PageShape& shape = cache.shape;
  if (shape.heads != heads.num_kv_heads || shape.d != d || shape.strip != Tile<Scalar>::kCols) {
    throw_shape({where, ": the cache must hold ", heads.num_kv_heads, " heads of width ", d, " in strips of ",
                 Tile<Scalar>::kCols, ", got ", shape.heads, " of width ", shape.d, " in strips of ", shape.strip});
  }
  check_mask(where, mask, heads.num_heads, n_q, cache.first_key + cache.n_k);
}

}  // namespace detail

template <typename Out, typename Q, typename Storage, AttentionMask Mask, Executor E = Serial>
void decode_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                           const KeyValuePages<Storage>& cache, Heads heads, const Mask& mask,
                           const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  detail::check_scalars<Scalar, Out>();
  constexpr const char* where = "decode_attention";
  heads = detail::checked_heads(where, heads);
  const Index d = detail::checked_width(where, "q", q.cols(), heads.num_heads), dv = cache.shape.dv;
  detail::check_decode<Scalar>(where, cache, heads, q.rows(), d, mask);
  if (cache.shape.key_maps != 1) detail::throw_shape({where, ": the cache must hold one map of keys, got two"});
  detail::check_operand_sizes(where, q, q, q, heads.num_heads, dv);
  detail::check_shape(where, "out", out, q.rows(), heads.num_heads * dv);

  const detail::Readable<Q> q_read(q.derived());
  detail::HeadOperands<Scalar, 1> in;
  in.out = detail::writable_view_of(out);
  in.q[0] = detail::view_of(q_read);
  in.heads = heads;
  in.d = in.q_step = d;
  in.dv = dv;
  in.scale = detail::scale_of<Scalar>(options, d);
  detail::run_cached_heads<detail::StandardBlock<Scalar>>(in, cache, detail::ShiftedMask<Mask>{mask, cache.first_key},
                                                          workspace, executor);
}

template <typename Out, typename Q, typename Storage, typename Lambda, AttentionMask Mask, Executor E = Serial>
void decode_diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                                const KeyValuePages<Storage>& cache, const Lambda& lambda, Heads heads,
                                const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  detail::check_scalars<Scalar, Out>();
  constexpr const char* where = "decode_diff_attention";
  heads = detail::checked_heads(where, heads);
  const Index d = detail::checked_width(where, "q", q.cols(), 2 * heads.num_heads), dv = cache.shape.dv;
  detail::check_decode<Scalar>(where, cache, heads, q.rows(), d, mask);
  detail::check_operand_sizes(where, q, q, q, heads.num_heads, dv);
  detail::check_shape(where, "out", out, q.rows(), heads.num_heads * dv);

  const detail::Readable<Q> q_read(q.derived());
  const detail::ReadableLambda<Lambda> lambda_read(lambda);
  detail::HeadOperands<Scalar, 2> in;
  in.out = detail::writable_view_of(out);
  for (Index map = 0; map < 2; ++map) {
    in.q[map] = detail::view_of(q_read).middle_cols(map * d, q.cols() - map * d);
  }
  in.lambda = detail::lambda_view<Scalar>(where, lambda_read, q.rows(), heads.num_heads);
  in.heads = heads;
  in.d = d;
  in.dv = dv;
  in.q_step = 2 * d;
  in.scale = detail::scale_of<Scalar>(options, d);
  detail::run_cached_heads<detail::DifferentialBlock<Scalar>>(
      in, cache, detail::ShiftedMask<Mask>{mask, cache.first_key}, workspace, executor);
}

}  // namespace diffattn::inline v0_1
