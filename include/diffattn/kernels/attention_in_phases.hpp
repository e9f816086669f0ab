#pragma once

// Differential attention to keys of which others hold the rest, in two phases: what it takes to combine the maps of all
// keys is exchanged first, and what comes out are shares that need only be added up.
//
//   1. every holder computes (m1, l1, m2, l2) of its own keys; `exchange` makes those of all keys of them, merge()
//   2. every holder computes (P1 − λ·P2) V over its own keys, with the sums of all:  Σ over holders = diff_attention()
//
// That is dv + 4 numbers a row and head to exchange, where merging the maps' results (partial_attention.hpp) takes
// 2·dv + 4, and values meet one map instead of two.
//
//   multihead_diff_attention_in_phases_into(out, statistics, q, k, v, lambda, heads, exchange, mask, options, workspace, executor)
//   decode_diff_attention_in_phases_into(out, statistics, q, pages, lambda, heads, exchange, mask, options, workspace, executor)
//   decode_partial_attention_into(part, q, pages, heads, mask, options, workspace, executor)      standard: one phase
//
// exchange   called once, as exchange(statistics), between the phases on the calling thread: `statistics` are those of
//            the keys of this call, n_q x H for each map, and it replaces them by those of all keys. If it leaves them
//            alone the result is diff_attention(), to rounding, with its statistics. What it throws reaches the caller.
// Shapes, operands, masks, λ, errors, threads: diff_attention.hpp, decode.hpp. `statistics` is resized where it has
//            another shape. A row that sees no key here has a share of exactly 0.
// Cost       up to 4 queries: that of the calls without phases, plus two passes over rows. More: the scores are computed
//            twice, 2·n_q·n_k·(4d + dv) FLOP a head.

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/detail/forward/cached_heads.hpp"
#include "diffattn/kernels/detail/forward/differential_block.hpp"
#include "diffattn/kernels/detail/forward/head_schedule.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/detail/paged_operands.hpp"
#include "diffattn/kernels/detail/shifted_mask.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/kernels/partial_attention.hpp"
#include "diffattn/kernels/softmax_statistics.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// Where `in` hands out the statistics of its maps, resized for it.
template <typename Scalar>
void hand_out(HeadOperands<Scalar, 2>& in, DiffSoftmaxStatistics<Scalar>& to) {
  SoftmaxStatistics<Scalar>* const maps[] = {&to.first, &to.second};
  for (Index map = 0; map < 2; ++map) {
    maps[map]->resize(in.n_q(), in.heads.num_heads);
    in.statistics[map] = {writable_view_of(maps[map]->m), writable_view_of(maps[map]->l)};
  }
}

/// The scores of `in` alone: a call whose values have no columns.
template <typename Scalar>
HeadOperands<Scalar, 2> without_values(HeadOperands<Scalar, 2> in) {
  in.dv = 0;
  in.v.cols = in.out.cols = 0;
  return in;
}

/// exchange(statistics); from here on they are given. Throws ShapeError if they have lost their shape.
template <typename Scalar, typename Exchange>
void exchange_statistics(const char* where, HeadOperands<Scalar, 2>& in, DiffSoftmaxStatistics<Scalar>& statistics,
                         Exchange& exchange) {
  exchange(statistics);
  SoftmaxStatistics<Scalar>* const maps[] = {&statistics.first, &statistics.second};
  for (Index map = 0; map < 2; ++map) {
    check_shape(where, "m, as exchange left it,", maps[map]->m, in.n_q(), in.heads.num_heads);
    check_shape(where, "l, as exchange left it,", maps[map]->l, in.n_q(), in.heads.num_heads);
    in.statistics[map] = {writable_view_of(maps[map]->m), writable_view_of(maps[map]->l), true};
  }
}

}  // namespace detail

/// This call's share of differential attention over all keys, into `out`, n_q x H·dv; operands as
/// multihead_diff_attention() has them. Throws ShapeError, and std::invalid_argument for heads that cannot be grouped.
template <typename Out, typename Scalar, typename Q, typename K, typename V, typename Lambda, typename Exchange,
          AttentionMask Mask, Executor E = Serial>
void multihead_diff_attention_in_phases_into(const Eigen::MatrixBase<Out>& out,
                                             DiffSoftmaxStatistics<Scalar>& statistics, const Eigen::MatrixBase<Q>& q,
                                             const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
                                             const Lambda& lambda, Heads heads, Exchange&& exchange, const Mask& mask,
                                             const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  constexpr const char* kName = "multihead_diff_attention_in_phases";
  using Block = detail::DifferentialBlock<Scalar>;
  using InPlace = detail::InPlaceSource<typename Block::Operands>;
  detail::check_result_scalar<typename Q::Scalar, Out>();
  detail::check_result_scalar<typename Q::Scalar, Matrix<Scalar>>();
  auto operands =
      detail::operands_of<Scalar>(kName, q, k, v, lambda, detail::operand("out", out), heads, mask, options);
  auto& in = operands.in;
  in.out = detail::writable_view_of(out);
  detail::hand_out(in, statistics);
  const auto between = [&] { detail::exchange_statistics(kName, in, statistics, exchange); };
  if (in.n_q() > 0 && in.n_k() > 0 && InPlace::suits(in)) {  // weights are kept from one phase to the next
    const detail::ViewedMask<Scalar, Mask> seen(mask);
    using Call = detail::FewRows<typename Block::Operands, std::remove_cvref_t<decltype(seen)>, InPlace>;
    return Call::run(in, {}, in.n_k(), seen, workspace, executor, between);
  }
  detail::run_heads<Block>(detail::without_values(in), mask, workspace, executor);
  between();
  detail::run_heads<Block>(in, mask, workspace, executor);
}

/// This call's share of differential attention of new queries to all keys, of which `pages` hold some; operands as
/// decode_diff_attention() has them. Throws ShapeError, and std::invalid_argument for heads that cannot be grouped.
template <typename Out, typename Scalar, typename Q, typename Storage, typename Lambda, typename Exchange,
          AttentionMask Mask, Executor E = Serial>
void decode_diff_attention_in_phases_into(const Eigen::MatrixBase<Out>& out, DiffSoftmaxStatistics<Scalar>& statistics,
                                          const Eigen::MatrixBase<Q>& q, const KeyValuePages<Storage>& pages,
                                          const Lambda& lambda, Heads heads, Exchange&& exchange, const Mask& mask,
                                          const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  constexpr const char* kName = "decode_diff_attention_in_phases";
  using Block = detail::DifferentialBlock<Scalar>;
  detail::check_result_scalar<typename Q::Scalar, Out>();
  detail::check_result_scalar<typename Q::Scalar, Matrix<Scalar>>();
  auto operands =
      detail::operands_of<Scalar>(kName, q, pages, lambda, detail::operand("out", out), heads, mask, options);
  auto& in = operands.in;
  in.out = detail::writable_view_of(out);
  detail::hand_out(in, statistics);
  const detail::ShiftedMask<Mask> shifted{mask, pages.origin(), pages.lead()};
  const auto between = [&] { detail::exchange_statistics(kName, in, statistics, exchange); };
  if (in.n_q() > 0 && (in.n_q() <= detail::kFewRows || pages.n_k == 0)) {
    return detail::run_cached_heads<Block>(in, pages, shifted, workspace, executor, between);
  }
  detail::run_cached_heads<Block>(detail::without_values(in), pages, shifted, workspace, executor);
  between();
  detail::run_cached_heads<Block>(in, pages, shifted, workspace, executor);
}

/// decode_attention_into() and its (m, l): standard heads need no second phase, since merge() puts their parts
/// together. part.out n_q x H·dv and part.statistics n_q x H are resized where they have another shape. Throws
/// ShapeError, and std::invalid_argument for heads that cannot be grouped.
template <typename Scalar, typename Q, typename Storage, AttentionMask Mask, Executor E = Serial>
void decode_partial_attention_into(PartialAttention<Scalar>& part, const Eigen::MatrixBase<Q>& q,
                                   const KeyValuePages<Storage>& pages, Heads heads, const Mask& mask,
                                   const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  constexpr const char* kName = "decode_partial_attention";
  detail::check_result_scalar<typename Q::Scalar, Matrix<Scalar>>();
  const Index cols = detail::paged_output_cols(kName, heads, pages.shape);
  auto operands = detail::operands_of<Scalar>(kName, q, pages, {"out", q.rows(), cols}, heads, mask, options);
  part.out.resize(q.rows(), cols);
  part.statistics.resize(q.rows(), operands.sizes.heads.num_heads);
  operands.in.out = detail::writable_view_of(part.out);
  operands.in.statistics[0] = {detail::writable_view_of(part.statistics.m),
                               detail::writable_view_of(part.statistics.l)};
  const detail::ShiftedMask<Mask> shifted{mask, pages.origin(), pages.lead()};
  detail::run_cached_heads<detail::StandardBlock<Scalar>>(operands.in, pages, shifted, workspace, executor);
}

}  // namespace diffattn::inline v0_1
