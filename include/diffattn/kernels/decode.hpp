#pragma once

// Attention against a cache: the queries of the newest tokens against keys and values that are already packed. One
// query, a few, or a whole prompt; what attention.hpp and diff_attention.hpp compute, without packing anything.
//
//   decode_attention_into(out, q, cache, heads, window, options, workspace, executor)
//   decode_diff_attention_into(out, q, cache, lambda, heads, window, options, workspace, executor)
//
// The queries are those of the last n_q tokens of the cache, and each sees the tokens up to its own, or the last
// `window` of them (0: all). KvCache (layers/kv_cache.hpp) makes the cache and says `cache.packed()`.
//
// Shapes     q (n_q x H·d) → out (n_q x H·dv), differential: q (n_q x 2H·d), packed head 2h is Q1_h and 2h+1 is Q2_h.
//            The cache holds G = num_kv_heads heads of keys (d wide; for a differential head two of them, or one that
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

#include <limits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/forward/cached_heads.hpp"
#include "diffattn/kernels/detail/forward/differential_block.hpp"
#include "diffattn/kernels/detail/forward/standard_block.hpp"
#include "diffattn/kernels/detail/paged_operands.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

inline void check_window(const char* where, Index window) {
  if (window < 0) throw_invalid({where, ": the window must be 0 or more, got ", window});
}

/// One mask for both cases, so that the kernels are compiled once.
inline SlidingWindowMask decode_mask(Index window) {
  return {window == 0 ? std::numeric_limits<Index>::max() : window};
}

}  // namespace detail

template <typename Out, typename Q, typename Storage, Executor E = Serial>
void decode_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                           const KeyValuePages<Storage>& cache, Heads heads, Index window,
                           const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  constexpr const char* where = "decode_attention";
  detail::check_result_scalar<Scalar, Out>();
  detail::check_window(where, window);
  const SlidingWindowMask mask = detail::decode_mask(window);
  auto operands = detail::operands_of(where, q, cache, detail::operand("out", out), heads, mask, options);
  operands.in.out = detail::writable_view_of(out);
  detail::run_cached_heads<detail::StandardBlock<Scalar>>(operands.in, cache, mask, workspace, executor);
}

template <typename Out, typename Q, typename Storage, typename Lambda, Executor E = Serial>
void decode_diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                                const KeyValuePages<Storage>& cache, const Lambda& lambda, Heads heads, Index window,
                                const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  constexpr const char* where = "decode_diff_attention";
  detail::check_result_scalar<Scalar, Out>();
  detail::check_window(where, window);
  const SlidingWindowMask mask = detail::decode_mask(window);
  auto operands = detail::operands_of(where, q, cache, lambda, detail::operand("out", out), heads, mask, options);
  operands.in.out = detail::writable_view_of(out);
  detail::run_cached_heads<detail::DifferentialBlock<Scalar>>(operands.in, cache, mask, workspace, executor);
}

}  // namespace diffattn::inline v0_1
