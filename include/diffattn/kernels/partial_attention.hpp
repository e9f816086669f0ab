#pragma once

// Attention over some of the keys, with what it takes to put the results of disjoint sets of keys together: where the
// keys are on several machines, or come a piece at a time.
//
//   partial_attention(q, k, v, mask, options)                      → {out, statistics}: attention() and its (m, l)
//   partial_diff_attention(q1, k1, q2, k2, v, mask, options)       → {first, second}, such a part for each map
//   multihead_partial_attention(q, k, v, heads, mask, options), multihead_partial_diff_attention(…)
//   …_into(part, …, mask, options, workspace, executor)            into a part of yours
//   merge(parts), merge(a, b)                                      the part of all keys
//   part.difference(lambda)                                        what diff_attention() makes of both maps
//
//   const auto whole = merge(partial_attention(q, k.topRows(n), v.topRows(n)),
//                            partial_attention(q, k.bottomRows(m), v.bottomRows(m)));      // whole.out = attention(q, k, v)
//
// The difference of two maps cannot be merged, its maps can; λ comes in at the end. That costs two standard calls with
// values of width dv, 2·n_q·n_k·(2d + 2dv) FLOP a head, and 2·dv + 4 numbers a row for who exchanges parts; in
// attention_in_phases.hpp is what costs less of both.
//
// A part's mask says what its queries see of its own keys: its n_k are those of the part, so that CausalMask means
// something else for a part than for the whole. Operands, shapes, options, errors and threads: attention.hpp and
// diff_attention.hpp. (m, l): softmax_statistics.hpp. A row that sees no key of a part has out = 0, l = 0, m = −inf, and
// counts for nothing in merge(). Under a mask with a bias `head` is the query head, as everywhere.

#include <cmath>
#include <span>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/detail/head_mask.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/kernels/softmax_statistics.hpp"

namespace diffattn::inline v0_1 {

/// Attention over some of the keys: out n_q x H·dv, divided by the sums of these keys alone, and its (m, l).
template <typename Scalar>
struct PartialAttention {
  Matrix<Scalar> out;
  SoftmaxStatistics<Scalar> statistics;
};

/// Both maps of differential attention over some of the keys: P1 V and P2 V.
template <typename Scalar>
struct PartialDiffAttention {
  PartialAttention<Scalar> first;
  PartialAttention<Scalar> second;

  /// P1 V − λ·P2 V, n_q x H·dv, which is diff_attention() if this is the part of all keys. lambda: a number, or n_q x H.
  /// Throws ShapeError.
  template <typename Lambda>
  Matrix<Scalar> difference(const Lambda& lambda) const {
    const Index heads = first.statistics.m.cols(), dv = heads == 0 ? 0 : first.out.cols() / heads;
    detail::check_shape("difference", "second.out", second.out, first.out.rows(), first.out.cols());
    if constexpr (detail::is_scalar_lambda<Lambda>) {
      return first.out - static_cast<Scalar>(lambda) * second.out;
    } else {
      detail::check_shape("difference", "lambda", lambda, first.out.rows(), heads);
      Matrix<Scalar> result = first.out;
      for (Index head = 0; head < heads; ++head) {
        result.middleCols(head * dv, dv) -=
            Vector<Scalar>(lambda.col(head)).asDiagonal() * second.out.middleCols(head * dv, dv);
      }
      return result;
    }
  }
};

/// The part of all keys from those of disjoint sets of them: out = Σ (their share of l)·out_i. In the order of the
/// parts: the same parts give the same bits. Throws std::invalid_argument without parts, ShapeError for parts of
/// several shapes.
template <typename Scalar>
PartialAttention<Scalar> merge(std::span<const PartialAttention<Scalar>> parts) {
  using Part = PartialAttention<Scalar>;
  using Statistics = SoftmaxStatistics<Scalar>;
  detail::check_parts<Scalar>("merge", parts, [](const Part& part) -> const Statistics& { return part.statistics; });
  const Index rows = parts[0].statistics.m.rows(), heads = parts[0].statistics.m.cols();
  for (const Part& part : parts) detail::check_shape("merge", "out", part.out, rows, parts[0].out.cols());
  Part all;
  all.statistics.resize(rows, heads);
  all.out.setZero(rows, parts[0].out.cols());
  const Index dv = heads == 0 ? 0 : all.out.cols() / heads;
  for (Index row = 0; row < rows; ++row) {
    for (Index head = 0; head < heads; ++head) {
      Scalar &m = all.statistics.m(row, head), &l = all.statistics.l(row, head);
      const auto of = [&](Index i) {
        const Statistics& part = parts[static_cast<std::size_t>(i)].statistics;
        return detail::RowOfStatistics<Scalar>{part.m(row, head), part.l(row, head)};
      };
      detail::merge_row(m, l, static_cast<Index>(parts.size()), of);
      for (const Part& part : parts) {
        const Scalar part_l = part.statistics.l(row, head);
        if (part_l == Scalar(0)) continue;
        const Scalar share = part_l * std::exp(part.statistics.m(row, head) - m) / l;
        all.out.row(row).segment(head * dv, dv) += share * part.out.row(row).segment(head * dv, dv);
      }
    }
  }
  return all;
}

/// The part of two disjoint sets of keys together. Throws ShapeError.
template <typename Scalar>
PartialAttention<Scalar> merge(const PartialAttention<Scalar>& a, const PartialAttention<Scalar>& b) {
  const PartialAttention<Scalar> parts[] = {a, b};
  return merge(std::span<const PartialAttention<Scalar>>(parts));
}

/// The same for differential heads, map by map.
template <typename Scalar>
PartialDiffAttention<Scalar> merge(const PartialDiffAttention<Scalar>& a, const PartialDiffAttention<Scalar>& b) {
  return {merge(a.first, b.first), merge(a.second, b.second)};
}

/// attention() with its (m, l): q (n_q x d), k (n_k x d), v (n_k x dv) → out n_q x dv, statistics n_q x 1. Throws
/// ShapeError.
template <typename Q, typename K, typename V, AttentionMask Mask = FullMask>
PartialAttention<typename Q::Scalar> partial_attention(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                                       const Eigen::MatrixBase<V>& v, const Mask& mask = {},
                                                       const AttentionOptions& options = {}) {
  return multihead_partial_attention(q, k, v, Heads{1, 1}, mask, options);
}

/// multihead_attention() with its (m, l): q (n_q x H·d), k (n_k x G·d), v (n_k x G·dv) → out n_q x H·dv, statistics
/// n_q x H. Throws ShapeError, and std::invalid_argument for heads that cannot be grouped.
template <typename Q, typename K, typename V, AttentionMask Mask = FullMask>
PartialAttention<typename Q::Scalar> multihead_partial_attention(const Eigen::MatrixBase<Q>& q,
                                                                 const Eigen::MatrixBase<K>& k,
                                                                 const Eigen::MatrixBase<V>& v, Heads heads,
                                                                 const Mask& mask = {},
                                                                 const AttentionOptions& options = {}) {
  PartialAttention<typename Q::Scalar> part;
  detail::ThreadWorkspace workspace;
  multihead_partial_attention_into(part, q, k, v, heads, mask, options, workspace);
  return part;
}

/// multihead_partial_attention() into `part`, which is resized where it has another shape; costs what
/// multihead_attention_into does.
template <typename Scalar, typename Q, typename K, typename V, AttentionMask Mask, Executor E = Serial>
void multihead_partial_attention_into(PartialAttention<Scalar>& part, const Eigen::MatrixBase<Q>& q,
                                      const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v, Heads heads,
                                      const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                      E&& executor = {}) {
  detail::check_result_scalar<typename Q::Scalar, Matrix<Scalar>>();
  constexpr const char* kName = "multihead_partial_attention";
  const Index cols = detail::output_cols(kName, heads, detail::operand("v", v));
  auto operands = detail::operands_of<Scalar>(kName, q, k, v, {"out", q.rows(), cols}, heads, mask, options);
  part.out.resize(q.rows(), cols);
  part.statistics.resize(q.rows(), operands.sizes.heads.num_heads);
  operands.in.out = detail::writable_view_of(part.out);
  operands.in.statistics[0] = {detail::writable_view_of(part.statistics.m),
                               detail::writable_view_of(part.statistics.l)};
  detail::run_heads<detail::StandardBlock<Scalar>>(operands.in, mask, workspace, executor);
}

/// Both maps of diff_attention(): q1, q2 (n_q x d), k1, k2 (n_k x d), v (n_k x dv) → a part of n_q x dv for each. Throws
/// ShapeError.
template <typename Q1, typename K1, typename Q2, typename K2, typename V, AttentionMask Mask = FullMask>
PartialDiffAttention<typename Q1::Scalar> partial_diff_attention(const Eigen::MatrixBase<Q1>& q1,
                                                                 const Eigen::MatrixBase<K1>& k1,
                                                                 const Eigen::MatrixBase<Q2>& q2,
                                                                 const Eigen::MatrixBase<K2>& k2,
                                                                 const Eigen::MatrixBase<V>& v, const Mask& mask = {},
                                                                 const AttentionOptions& options = {}) {
  detail::check_shape("partial_diff_attention", "q2", q2, q1.rows(), q1.cols());
  detail::check_shape("partial_diff_attention", "k2", k2, k1.rows(), q1.cols());
  return {partial_attention(q1, k1, v, mask, options), partial_attention(q2, k2, v, mask, options)};
}

/// Both maps of multihead_diff_attention(), operands and layouts as there → a part of n_q x H·dv for each. Throws
/// ShapeError, and std::invalid_argument for heads that cannot be grouped.
template <typename Q, typename K, typename V, AttentionMask Mask = FullMask>
PartialDiffAttention<typename Q::Scalar> multihead_partial_diff_attention(const Eigen::MatrixBase<Q>& q,
                                                                          const Eigen::MatrixBase<K>& k,
                                                                          const Eigen::MatrixBase<V>& v, Heads heads,
                                                                          const Mask& mask = {},
                                                                          const AttentionOptions& options = {}) {
  PartialDiffAttention<typename Q::Scalar> part;
  detail::ThreadWorkspace workspace;
  multihead_partial_diff_attention_into(part, q, k, v, heads, mask, options, workspace);
  return part;
}

/// multihead_partial_diff_attention() into `part`, which is resized where it has another shape. Head by head and map by
/// map: heads that share keys, or a map of noise, save nothing by it.
template <typename Scalar, typename Q, typename K, typename V, AttentionMask Mask, Executor E = Serial>
void multihead_partial_diff_attention_into(PartialDiffAttention<Scalar>& part, const Eigen::MatrixBase<Q>& q,
                                           const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v, Heads heads,
                                           const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                           E&& executor = {}) {
  detail::check_result_scalar<typename Q::Scalar, Matrix<Scalar>>();
  constexpr const char* kName = "multihead_partial_diff_attention";
  const Index cols = detail::output_cols(kName, heads, detail::operand("v", v));
  const auto operands =
      detail::operands_of<Scalar>(kName, q, k, v, Scalar(1), {"out", q.rows(), cols}, heads, mask, options);
  const auto& in = operands.in;
  for (Index map = 0; map < 2; ++map) {
    PartialAttention<Scalar>& one = map == 0 ? part.first : part.second;
    one.out.resize(in.n_q(), cols);
    one.statistics.resize(in.n_q(), in.heads.num_heads);
    const auto out = detail::writable_view_of(one.out), m = detail::writable_view_of(one.statistics.m),
               l = detail::writable_view_of(one.statistics.l);
    for (Index head = 0; head < in.heads.num_heads; ++head) {
      detail::HeadOperands<Scalar, 1> alone;
      static_cast<detail::HeadLayout&>(alone) = {{1, 1, 1}, 1, in.d, in.dv, in.d, in.d};
      alone.scale = in.scale;
      alone.q[0] = in.queries(map, head);
      alone.k[0] = in.keys(map, in.kv_head(head));
      alone.v = in.values(in.kv_head(head));
      alone.out = out.middle_cols(head * in.dv, in.dv);
      alone.statistics[0] = {m.middle_cols(head, 1), l.middle_cols(head, 1)};
      detail::run_heads<detail::StandardBlock<Scalar>>(alone, detail::HeadMask<Mask>{mask, head}, workspace, executor);
    }
  }
}

}  // namespace diffattn::inline v0_1
