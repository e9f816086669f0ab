#pragma once

// The operands of one call. operands_of() checks their shapes and gathers them, for one head and many, standard and
// differential; what it returns answers the drivers with views of one head. Nothing else knows where heads and maps lie
// in the columns.
//
//   auto call = operands_of<Result>(where, q, k, v, operand("out", out), heads, mask, options);
//   call.in.out = writable_view_of(out);
//   run_heads<StandardBlock<Element, Result>>(call.in, mask, workspace, executor);
// A block of rows takes the call's operands and the rows (RowRange, which knows its head), and asks for what it needs:
//   in.queries(map, rows.head).middle_rows(rows.first, rows.count)

#include <algorithm>
#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/kernels/detail/arithmetic.hpp"
#include "diffattn/kernels/detail/lambda_view.hpp"
#include "diffattn/kernels/detail/operand_checks.hpp"
#include "diffattn/kernels/detail/row_statistics.hpp"
#include "diffattn/kernels/detail/scalar_checks.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1::detail {

/// How heads lie in the columns: head h of keys and their gradients in columns [h·k_step, h·k_step + d), of values and
/// results in columns [h·dv, (h + 1)·dv). Heads that share a second map, noise_sharers of them, are a group of q_step
/// columns of queries.
struct HeadLayout {
  Heads heads{1, 1, 1};
  Index noise_sharers = 1;
  Index d = 0;
  Index dv = 0;
  Index q_step = 0;
  Index k_step = 0;

  /// Query heads that share a key and value head.
  Index heads_per_kv_head() const { return heads.num_heads / heads.num_kv_heads; }
  /// The key and value head that a query head reads.
  Index kv_head(Index head) const { return head / heads_per_kv_head(); }

 protected:
  /// all[map] begins with the queries of head 0.
  template <typename T, Index kMaps>
  StridedView<T> query_head(const StridedView<T> (&all)[kMaps], Index map, Index head) const {
    if (noise_sharers == 1) return all[map].middle_cols(head * q_step, d);
    const Index column = head / noise_sharers * q_step + (map == 0 ? head % noise_sharers * d : 0);
    return all[map].middle_cols(column, d);
  }
  template <typename T>
  StridedView<T> key_head(const StridedView<T>& all, Index kv_head) const {
    return all.middle_cols(kv_head * k_step, d);
  }
  template <typename T>
  StridedView<T> value_head(const StridedView<T>& all, Index head) const {
    return all.middle_cols(head * dv, dv);
  }
};

/// The operands of all heads and maps, shapes already checked: a view for each map, from its first head on.
/// Element: what q, k and v hold, whose products are added up in Scalar; Result: what is written.
template <typename ElementType, Index kNumMaps, typename ResultType = ElementType>
struct HeadOperands : HeadLayout {
  using Element = ElementType;
  using Result = ResultType;
  using Scalar = ArithmeticOf<Element>;
  static constexpr Index kMaps = kNumMaps;

  StridedView<Result> out;                  // n_q rows
  StridedView<const Element> q[kMaps];      // n_q rows
  StridedView<const Element> k[kMaps];      // n_k rows
  StridedView<const Element> v;             // n_k rows
  LambdaView<Scalar> lambda;                // lambda(row, head), n_q x num_heads
  RowStatistics<Scalar> statistics[kMaps];  // n_q x num_heads
  Scalar scale = 1;

  Index n_q() const { return q[0].rows; }
  /// 0 where keys and values are in pages.
  Index n_k() const { return k[0].rows; }

  /// n_q x d, of a query head.
  StridedView<const Element> queries(Index map, Index head) const { return query_head(q, map, head); }
  /// n_k x d, of a key head.
  StridedView<const Element> keys(Index map, Index kv_head) const { return key_head(k[map], kv_head); }
  /// n_k x dv, of a value head.
  StridedView<const Element> values(Index kv_head) const { return value_head(v, kv_head); }
  /// n_q x dv, of a query head.
  StridedView<Result> result(Index head) const { return value_head(out, head); }

  /// Whether all maps read the same keys, which are then packed and streamed once.
  bool shared_keys() const {
    const auto &a = k[0], &b = k[kMaps - 1];
    return a.data == b.data && a.row_stride == b.row_stride && a.col_stride == b.col_stride;
  }
};

/// How many heads that follow each other a map of noise is computed for: those that share its queries, unless a bias
/// makes other scores of them for every head.
template <typename Mask>
Index heads_with_one_noise_map(const HeadLayout& layout, const Mask& mask, Index n_q) {
  return layout.noise_sharers > 1 && same_for_all_heads(mask, n_q) ? layout.noise_sharers : 1;
}

/// Queries of all maps that lie side by side, as the views of each map.
template <typename T, Index kMaps>
void spread_queries(StridedView<T> (&to)[kMaps], const StridedView<T>& side_by_side, const CallSizes& sizes) {
  for (Index map = 0; map < kMaps; ++map) {
    const Index col = sizes.heads.query_head(0, map, sizes.query_maps) * sizes.d;
    to[map] = side_by_side.middle_cols(col, side_by_side.cols - col);
  }
}

/// `maps` maps of each head of keys that lie side by side, as the views of each map; the last one for all that are
/// left.
template <typename T, Index kMaps>
void spread_maps(StridedView<T> (&to)[kMaps], const StridedView<T>& side_by_side, Index maps, Index d) {
  for (Index map = 0; map < kMaps; ++map) {
    const Index col = std::min(map, maps - 1) * d;
    to[map] = side_by_side.middle_cols(col, side_by_side.cols - col);
  }
}

/// Everything of HeadOperands that sizes and options say.
template <typename Operands>
Operands sized_operands(const CallSizes& sizes, const AttentionOptions& options) {
  Operands in;
  in.heads = sizes.heads;
  in.d = sizes.d;
  in.dv = sizes.dv;
  in.noise_sharers = sizes.heads.noise_sharers();
  in.q_step = (in.noise_sharers + sizes.query_maps - 1) * sizes.d;
  in.k_step = sizes.key_maps * sizes.d;
  in.scale = scale_of<typename Operands::Scalar>(options, sizes.d);
  return in;
}

/// Operands with all heads and maps side by side. Holds the values of those that have no memory of their own, which
/// `in` looks at: it stays where it was made.
template <Index kMaps, typename Result, typename Q, typename K, typename V, typename Lambda>
class SideBySideOperands {
  using Operands = HeadOperands<typename Q::Scalar, kMaps, Result>;

 public:
  SideBySideOperands(const CallSizes& call, const Q& q, const K& k, const V& v, const Lambda& lambda,
                     const AttentionOptions& options)
      : sizes(call), in(sized_operands<Operands>(call, options)), q_(q), k_(k), v_(v), lambda_(lambda) {
    spread_queries(in.q, view_of(q_), sizes);
    spread_maps(in.k, view_of(k_), sizes.key_maps, sizes.d);
    in.v = view_of(v_);
    in.lambda = lambda_view<typename Operands::Scalar>(lambda_);
  }
  SideBySideOperands(const SideBySideOperands&) = delete;
  SideBySideOperands& operator=(const SideBySideOperands&) = delete;

  CallSizes sizes;
  Operands in;

 private:
  Readable<Q> q_;
  Readable<K> k_;
  Readable<V> v_;
  ReadableLambda<Lambda> lambda_;
};

/// Operands of one differential head, each map by itself; otherwise the same.
template <typename Result, typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda>
class MapByMapOperands {
  using Operands = HeadOperands<typename Q1::Scalar, 2, Result>;

 public:
  MapByMapOperands(const CallSizes& call, const Q1& q1, const K1& k1, const Q2& q2, const K2& k2, const V& v,
                   const Lambda& lambda, const AttentionOptions& options)
      : sizes(call),
        in(sized_operands<Operands>(call, options)),
        q1_(q1),
        k1_(k1),
        q2_(q2),
        k2_(k2),
        v_(v),
        lambda_(lambda) {
    in.q[0] = view_of(q1_);
    in.q[1] = view_of(q2_);
    in.k[0] = view_of(k1_);
    in.k[1] = view_of(k2_);
    in.v = view_of(v_);
    in.lambda = lambda_view<typename Operands::Scalar>(lambda_);
  }
  MapByMapOperands(const MapByMapOperands&) = delete;
  MapByMapOperands& operator=(const MapByMapOperands&) = delete;

  CallSizes sizes;
  Operands in;

 private:
  Readable<Q1> q1_;
  Readable<K1> k1_;
  Readable<Q2> q2_;
  Readable<K2> k2_;
  Readable<V> v_;
  ReadableLambda<Lambda> lambda_;
};

/// Keys of other ranks would be left out without a word.
template <typename E>
consteval void check_keys_are_here() {
  static_assert(!spreads_sequences<E>,
                "diffattn: this call cannot spread a sequence over ranks; distributed/sequence_parallel.hpp says which "
                "can, and has to be included");
}

/// The checks of what every call has besides q, k and v. `result`: the output, or its gradient.
template <typename Mask>
void check_rest(const char* where, const CallSizes& sizes, const Operand& result, const Mask& mask) {
  check_operand(where, result, sizes.n_q, sizes.heads.num_heads * sizes.dv);
  check_mask(where, mask, sizes.heads.num_heads, sizes.n_q, sizes.n_k);
}

template <typename Lambda>
void check_lambda(const char* where, const Lambda& lambda, const CallSizes& sizes) {
  if constexpr (!is_scalar_lambda<Lambda>) {
    check_operand(where, operand("lambda", lambda), sizes.n_q, sizes.heads.num_heads);
  }
}

/// Standard attention. Throws ShapeError and std::invalid_argument, before anything is evaluated.
template <typename Result, typename Q, typename K, typename V, typename Mask>
SideBySideOperands<1, Result, Q, K, V, double> operands_of(const char* where, const Eigen::MatrixBase<Q>& q,
                                                           const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
                                                           const Operand& result, const Heads& heads, const Mask& mask,
                                                           const AttentionOptions& options) {
  check_scalars<Q, K, V>();
  const CallSizes sizes = checked_sizes(where, heads, 1, operand("q", q), operand("k", k), operand("v", v));
  check_rest(where, sizes, result, mask);
  constexpr double kNoLambda = 0;
  return {sizes, q.derived(), k.derived(), v.derived(), kNoLambda, options};
}

/// Differential attention, both maps of each head side by side, or with one map of keys for both.
template <typename Result, typename Q, typename K, typename V, typename Lambda, typename Mask>
SideBySideOperands<2, Result, Q, K, V, Lambda> operands_of(const char* where, const Eigen::MatrixBase<Q>& q,
                                                           const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v,
                                                           const Lambda& lambda, const Operand& result,
                                                           const Heads& heads, const Mask& mask,
                                                           const AttentionOptions& options) {
  check_scalars<Q, K, V>();
  check_lambda_scalar<typename Q::Scalar, Lambda>();
  const CallSizes sizes = checked_sizes(where, heads, 2, operand("q", q), operand("k", k), operand("v", v));
  check_lambda(where, lambda, sizes);
  check_rest(where, sizes, result, mask);
  return {sizes, q.derived(), k.derived(), v.derived(), lambda, options};
}

/// One differential head, each map by itself.
template <typename Result, typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda,
          typename Mask>
MapByMapOperands<Result, Q1, K1, Q2, K2, V, Lambda> operands_of(
    const char* where, const Eigen::MatrixBase<Q1>& q1, const Eigen::MatrixBase<K1>& k1,
    const Eigen::MatrixBase<Q2>& q2, const Eigen::MatrixBase<K2>& k2, const Eigen::MatrixBase<V>& v,
    const Lambda& lambda, const Operand& result, const Mask& mask, const AttentionOptions& options) {
  check_scalars<Q1, K1, V>();
  check_second_scalars<Q1, K1, Q2, K2>();
  check_lambda_scalar<typename Q1::Scalar, Lambda>();
  const CallSizes sizes = checked_sizes(where, {1, 1}, 1, operand("q1", q1), operand("k1", k1), operand("v", v));
  check_operand(where, operand("q2", q2), sizes.n_q, sizes.d);
  check_operand(where, operand("k2", k2), sizes.n_k, sizes.d);
  check_lambda(where, lambda, sizes);
  check_rest(where, sizes, result, mask);
  return {sizes, q1.derived(), k1.derived(), q2.derived(), k2.derived(), v.derived(), lambda, options};
}

}  // namespace diffattn::inline v0_1::detail
