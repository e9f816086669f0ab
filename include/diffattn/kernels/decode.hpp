#pragma once

// Attention against a cache: the queries of the newest tokens against keys and values that are already packed. One
// query, a few, or a whole prompt; what attention.hpp and diff_attention.hpp compute, without packing anything.
//
//   decode_attention(q, pages, heads, mask, options)                → n_q x H·dv
//   decode_diff_attention(q, pages, lambda, heads, mask, options)   → n_q x H·dv
//   decode_attention_into(out, q, pages, heads, mask, options, workspace, executor)
//   decode_diff_attention_into(out, q, pages, lambda, heads, mask, options, workspace, executor)
//
//   decode_attention_into(out, q, caches, heads, masks, …)          row i of q against caches[i], under masks[i]:
//   decode_diff_attention_into(out, q, caches, lambda, …)           many sequences, a token each
//
// mask, options, workspace and executor can be left out, from the right: CausalMask{}, {}, the thread's, Serial.
// The queries are those of the last n_q tokens. Under CausalMask each sees the tokens up to its own; any mask and bias
// will do (mask.hpp), as if all keys ever fed, pages.first_key + pages.n_k of them, stood in one piece: those that have
// been dropped are not seen. KvCache (layers/kv_cache.hpp) makes the pages and says `cache.packed()`.
//
// Shapes     q (n_q x H·d) → out (n_q x H·dv), differential: q (n_q x 2H·d), packed head 2h is Q1_h and 2h+1 is Q2_h,
//            or (n_q x (H + N)·d) with N = num_noise_heads that are shared, as diff_attention.hpp has it.
//            The pages hold G = num_kv_heads heads of keys (d wide; for a differential head two of them, or one that
//            both maps share: DIFF V2) and values (dv wide). n_q may exceed what the cache holds: a query that sees no
//            key gives exactly 0.
// Storage    the cache's may be narrower than the scalar of q (bfloat16, half): values are widened as they are read.
//            Queries of bfloat16 take a cache of bfloat16, as it lies where the CPU multiplies it; attention.hpp.
// λ          a number, or one for every query and head, n_q x H.
// Errors     ShapeError, std::invalid_argument; before any work, and nothing has been written.
// Memory     a few queries: the weights of all visible keys, from `workspace`. More: the scratch of attention.hpp and,
//            where the storage is narrower or a page has fewer than 256 tokens, a copy of one head.
// Threads    as many as the executor has, pages of keys shared out besides heads and sequences; the result is bitwise
//            the same for any number, and for a sequence alone or among others.
// Cost       up to 4 queries: every visible key and value is read once, 2·d + dv values a token and key head; with
//            dv = 2d that is what two standard heads read. More: that of attention.hpp and diff_attention.hpp.

#include <cstddef>
#include <span>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/forward/cached_heads.hpp"
#include "diffattn/kernels/detail/forward/differential_block.hpp"
#include "diffattn/kernels/detail/forward/standard_block.hpp"
#include "diffattn/kernels/detail/paged_operands.hpp"
#include "diffattn/kernels/detail/shifted_mask.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// Throws ShapeError unless there are a cache and a mask for each of `rows` queries, the caches of one shape, and what
/// a mask says of itself.
template <typename Storage, typename Mask>
void check_cached_rows(const char* where, Index rows, std::span<const KeyValuePages<Storage>> caches,
                       std::span<const Mask> masks, const Heads& heads) {
  if (static_cast<Index>(caches.size()) != rows || static_cast<Index>(masks.size()) != rows) {
    throw_shape({where, ": there must be a cache and a mask for each of the ", rows, " rows of q, got ",
                 static_cast<Index>(caches.size()), " and ", static_cast<Index>(masks.size())});
  }
  check_sequences(where, rows, [&](const char* name, Index i) {
    const auto at = static_cast<std::size_t>(i);
    PageShape shape = caches[at].shape;
    shape.page_size = caches[0].shape.page_size;  // which may differ
    if (shape != caches[0].shape) throw_shape({name, ": the cache is not of the shape of the first one"});
    check_mask(name, masks[at], heads.num_heads, 1, caches[at].first_key + caches[at].n_k);
  });
}

}  // namespace detail

/// Standard attention of H = heads.num_heads heads: q (n_q x H·d), pages of heads.num_kv_heads heads → n_q x H·dv.
/// Throws ShapeError, and std::invalid_argument for heads that cannot be grouped.
template <typename Q, typename Storage, AttentionMask Mask = CausalMask>
Matrix<typename Q::Scalar> decode_attention(const Eigen::MatrixBase<Q>& q, const KeyValuePages<Storage>& pages,
                                            Heads heads, const Mask& mask = {}, const AttentionOptions& options = {}) {
  Matrix<typename Q::Scalar> out(q.rows(), detail::paged_output_cols("decode_attention", heads, pages.shape));
  decode_attention_into(out, q, pages, heads, mask, options);
  return out;
}

/// Differential attention, eq. (1), of H = heads.num_heads heads: q (n_q x 2H·d), lambda a number or n_q x H → n_q x
/// H·dv. Throws ShapeError, and std::invalid_argument for heads that cannot be grouped.
template <typename Q, typename Storage, typename Lambda, AttentionMask Mask = CausalMask>
Matrix<typename Q::Scalar> decode_diff_attention(const Eigen::MatrixBase<Q>& q, const KeyValuePages<Storage>& pages,
                                                 const Lambda& lambda, Heads heads, const Mask& mask = {},
                                                 const AttentionOptions& options = {}) {
  Matrix<typename Q::Scalar> out(q.rows(), detail::paged_output_cols("decode_diff_attention", heads, pages.shape));
  decode_diff_attention_into(out, q, pages, lambda, heads, mask, options);
  return out;
}

/// decode_attention(), written to `out`, which must be n_q x H·dv.
template <typename Out, typename Q, typename Storage, AttentionMask Mask = CausalMask>
void decode_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                           const KeyValuePages<Storage>& pages, Heads heads, const Mask& mask = {},
                           const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  decode_attention_into(out, q, pages, heads, mask, options, workspace);
}

/// decode_attention(), with scratch from `workspace`, on the threads of `executor`.
template <typename Out, typename Q, typename Storage, AttentionMask Mask, Executor E = Serial>
void decode_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                           const KeyValuePages<Storage>& pages, Heads heads, const Mask& mask,
                           const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  using Result = typename Out::Scalar;
  detail::check_output_scalar<Scalar, Out>();
  auto operands = detail::operands_of<Result>("decode_attention", q, pages, detail::operand("out", out), heads, mask, options);
  operands.in.out = detail::writable_view_of(out);
  const detail::ShiftedMask<Mask> shifted{mask, pages.origin(), pages.lead()};
  detail::run_cached_heads<detail::StandardBlock<Scalar, Result>>(operands.in, pages, shifted, workspace, executor);
}

/// The same for the newest tokens of many sequences: row i of q attends to caches[i] under masks[i]. All caches have
/// one shape. Throws ShapeError, also for another number of caches or masks than rows.
template <typename Out, typename Q, typename Storage, typename Mask, Executor E = Serial>
void decode_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                           std::span<const KeyValuePages<Storage>> caches, Heads heads, std::span<const Mask> masks,
                           const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  constexpr const char* kName = "decode_attention";
  detail::check_output_scalar<typename Q::Scalar, Out>();
  detail::check_cached_rows(kName, q.rows(), caches, masks, heads);
  if (caches.empty()) return;
  auto operands = detail::operands_of<typename Out::Scalar>(kName, q, caches[0], detail::operand("out", out), heads, CausalMask{}, options);
  operands.in.out = detail::writable_view_of(out);
  detail::run_cached_rows(operands.in, caches, masks, workspace, executor);
}

/// decode_diff_attention(), written to `out`, which must be n_q x H·dv.
template <typename Out, typename Q, typename Storage, typename Lambda, AttentionMask Mask = CausalMask>
void decode_diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                                const KeyValuePages<Storage>& pages, const Lambda& lambda, Heads heads,
                                const Mask& mask = {}, const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  decode_diff_attention_into(out, q, pages, lambda, heads, mask, options, workspace);
}

/// decode_diff_attention(), with scratch from `workspace`, on the threads of `executor`.
template <typename Out, typename Q, typename Storage, typename Lambda, AttentionMask Mask, Executor E = Serial>
void decode_diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                                const KeyValuePages<Storage>& pages, const Lambda& lambda, Heads heads,
                                const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  using Result = typename Out::Scalar;
  detail::check_output_scalar<Scalar, Out>();
  auto operands =
      detail::operands_of<Result>("decode_diff_attention", q, pages, lambda, detail::operand("out", out), heads, mask, options);
  operands.in.out = detail::writable_view_of(out);
  const detail::ShiftedMask<Mask> shifted{mask, pages.origin(), pages.lead()};
  detail::run_cached_heads<detail::DifferentialBlock<Scalar, Result>>(operands.in, pages, shifted, workspace, executor);
}

/// The same for the newest tokens of many sequences, as decode_attention_into does it.
template <typename Out, typename Q, typename Storage, typename Lambda, typename Mask, Executor E = Serial>
void decode_diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                                std::span<const KeyValuePages<Storage>> caches, const Lambda& lambda, Heads heads,
                                std::span<const Mask> masks, const AttentionOptions& options, Workspace& workspace,
                                E&& executor = {}) {
  constexpr const char* kName = "decode_diff_attention";
  detail::check_output_scalar<typename Q::Scalar, Out>();
  detail::check_cached_rows(kName, q.rows(), caches, masks, heads);
  if (caches.empty()) return;
  auto operands =
      detail::operands_of<typename Out::Scalar>(kName, q, caches[0], lambda, detail::operand("out", out), heads, CausalMask{}, options);
  operands.in.out = detail::writable_view_of(out);
  detail::run_cached_rows(operands.in, caches, masks, workspace, executor);
}

}  // namespace diffattn::inline v0_1
