#pragma once

// The operands of one call, as the drivers read them: views, and how heads and maps lie in their columns.

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1::detail {

/// The operands of all heads and maps, shapes already checked. Map m of head h stands in columns
/// [h·step, h·step + width) of its view. Query head h reads key and value head h / (num_heads / num_kv_heads).
template <typename Scalar, Index kMaps>
struct HeadOperands {
  StridedView<Scalar> out;             // n_q rows, step and width dv
  StridedView<const Scalar> q[kMaps];  // n_q rows, step q_step, width d
  StridedView<const Scalar> k[kMaps];  // n_k rows, step k_step, width d
  StridedView<const Scalar> v;         // n_k rows, step and width dv
  LambdaView<Scalar> lambda;           // n_q x num_heads
  /// Where to write the log-sum-exp of every row, n_q x num_heads for each map: log2 Σ 2^(score·log2(e)), which is what
  /// exp2(score·log2(e) − lse) turns back into probabilities; -inf for a row that sees no key. No data: not wanted.
  StridedView<Scalar> lse[kMaps];
  Heads heads{1, 1};
  Index d = 0;
  Index dv = 0;
  Index q_step = 0;
  Index k_step = 0;
  Scalar scale = 1;

  Index n_q() const { return q[0].rows; }
  /// 0 where keys and values are in pages.
  Index n_k() const { return k[0].rows; }
  /// Query heads that share a key and value head.
  Index heads_per_kv_head() const { return heads.num_heads / heads.num_kv_heads; }
  /// The key and value head that a query head reads.
  Index kv_head(Index head) const { return head / heads_per_kv_head(); }

  /// n_q x d, of a query head.
  StridedView<const Scalar> queries(Index map, Index head) const { return q[map].middle_cols(head * q_step, d); }
  /// n_k x d, of a key head.
  StridedView<const Scalar> keys(Index map, Index kv_head) const { return k[map].middle_cols(kv_head * k_step, d); }
  /// n_k x dv, of a value head.
  StridedView<const Scalar> values(Index kv_head) const { return v.middle_cols(kv_head * dv, dv); }
  /// n_q x dv, of a query head.
  StridedView<Scalar> result(Index head) const { return out.middle_cols(head * dv, dv); }

  /// Whether all maps read the same keys, which are then packed and streamed once.
  bool shared_keys() const {
    const auto &a = k[0], &b = k[kMaps - 1];
    return a.data == b.data && a.row_stride == b.row_stride && a.col_stride == b.col_stride;
  }
};

}  // namespace diffattn::inline v0_1::detail
