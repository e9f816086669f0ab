#pragma once

// Attention for a handful of queries and keys, where anything prepared ahead costs more than it saves: in place, a few
// rows or keys at a time, with no scratch but the stack; head by head, the smallest on the calling thread.

#include <algorithm>
#include <type_traits>

#include "diffattn/core/parallel.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/detail/exp2.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/detail/scores.hpp"
#include "diffattn/kernels/detail/softmax.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/product/dot.hpp"

namespace diffattn::inline v0_1::detail {

/// One query head of such a problem, or all that share their second map.
template <typename Operands, typename Mask>
class SmallProblem {
  using Scalar = typename Operands::Scalar;
  using Element = typename Operands::Element;
  using Result = typename Operands::Result;
  static constexpr Index kMaps = Operands::kMaps;
  static constexpr Index kLanes = simd::kLanes<Scalar>;
  static constexpr Index kKeys = 4;  // scored side by side
  static constexpr Index kRows = 4;  // given values side by side
  static_assert(kTinyPairs * kLanes <= kMostSmallWeights);
  static_assert(kMostSmallWeights % kLanes == 0, "the weights of the second map must begin at a packet");

 public:
  /// The wider contiguous rows are, the more packing would cost: up to 6, 8 or 17 queries and as many keys.
  static bool suits(const Operands& in) {
    const Index n_q = in.n_q(), n_k = in.n_k();
    if (n_q * n_k <= kTinyPairs) return true;
    for (Index map = 0; map < kMaps; ++map) {
      if (in.q[map].col_stride != 1 || in.k[map].col_stride != 1) return false;
    }
    const Index most_pairs = in.d < kLanes ? kTinyPairs : in.d < 8 * kLanes ? 8 * 8 : 17 * 17;
    // Up to kFewRows queries have a path of their own (few_rows.hpp).
    return n_q > kFewRows && n_q * n_k <= most_pairs && n_q * round_up(n_k, kLanes) <= kMostSmallWeights;
  }

  template <Executor E>
  static void run(const Operands& in, const Mask& mask, E& executor) {
    const Index together = heads_with_one_noise_map(in, mask, in.n_q());
    const auto run_heads = [&](Index head) {
      SmallProblem problem(in, mask, head);
      for (Index i = 0; i < together; ++i) {
        problem.rows_.head = head + i;
        problem.run(i == 0 ? kMaps : 1);
        if (i > 0) in.statistics[kMaps - 1].copy_head(head, head + i);
      }
    };
    if (in.n_q() * in.n_k() > kTinyPairs) {
      return executor.run(in.heads.num_heads / together,
                          [&](Index task, Index /*worker*/) { run_heads(task * together); });
    }
    for (Index head = 0; head < in.heads.num_heads; head += together) run_heads(head);
  }

 private:
  SmallProblem(const Operands& in, const Mask& mask, Index head)
      : in_(in),
        rows_{mask, head, 0, in.n_q(), in.n_q(), in.n_k()},
        width_(round_up(in.n_k(), kLanes)),
        scale_(split_scale<Mask>(in.scale)),
        exp2_(scale_.of_exponent) {}

  Scalar* weights(Index map, Index row) { return weights_[map] + row * width_; }

  /// Step by step for all rows, so that none waits for what it has just stored. maps: 1 where the weights of the second
  /// are there already.
  void run(Index maps) {
    for (Index map = 0; map < maps; ++map) set_scores(map);
    for (Index map = 0; map < maps; ++map) set_weights(map);
    if constexpr (kMaps == 2) {
      const Index width = width_;
      for (Index row = 0; row < rows_.count; ++row) {
        Scalar* const p1 = weights(0, row);
        combine_maps(p1, weights(1, row), -in_.lambda(row, rows_.head), p1, Scalar(1), 0, width);
      }
    }
    Index row = 0;
    if constexpr (is_narrow<Element>) {
      for (; row < rows_.count; ++row) round_weights(weights(0, row), weights(0, row), 0, width_);
      row = 0;
    }
    for (; row + kRows <= rows_.count; row += kRows) add_values<kRows>(row);
    for (; row < rows_.count; ++row) add_values<1>(row);
  }

  void set_scores(Index map) {
    const auto q = in_.queries(map, rows_.head), k = in_.keys(map, in_.kv_head(rows_.head));
    Index row = 0;
    for (; row + 2 <= rows_.count; row += 2) set_products<2>(weights(map, row), q, k, row);
    for (; row < rows_.count; ++row) set_products<1>(weights(map, row), q, k, row);
    if constexpr (!HasBias<Mask>) {
      // As if the queries had been multiplied. What lies between the keys of two rows is overwritten next.
      const Scalar factor = scale_.of_queries;
      for (row = 0; row < rows_.count; ++row) {
        Scalar* const products = weights(map, row);
        const KeyRange keys = rows_.keys_of(row);
        for (Index key = keys.begin; key < keys.end; ++key) products[key] *= factor;
      }
    }
    finish_scores(weights_[map], width_, rows_, 0, {0, width_}, scale_);
  }

  /// q · k for kCount rows, which read what any of them sees of the keys together.
  template <Index kCount>
  EIGEN_ALWAYS_INLINE void set_products(Scalar* products, const StridedView<const Element>& q,
                                        const StridedView<const Element>& k, Index row) const {
    Index key = rows_.keys_of(row).begin;
    const Index end = rows_.keys_of(row + kCount - 1).end;
    if (q.col_stride == 1 && k.col_stride == 1) {
      for (; key + kKeys <= end; key += kKeys) {
        dot_products<kCount>(products + key, width_, &q(row, 0), q.row_stride, &k(key, 0), k.row_stride, q.cols);
      }
      for (; key < end; ++key) {
        for (Index r = 0; r < kCount; ++r) products[r * width_ + key] = dot<Scalar>(&q(row + r, 0), &k(key, 0), q.cols);
      }
    }
    for (; key < end; ++key) {
      for (Index r = 0; r < kCount; ++r) {
        Scalar sum = 0;
        for (Index c = 0; c < q.cols; ++c) sum += static_cast<Scalar>(q(row + r, c)) * static_cast<Scalar>(k(key, c));
        products[r * width_ + key] = sum;
      }
    }
  }

  /// to(r, i) = (row r of q) · (row i of k), for kCount and kKeys rows.
  template <Index kCount>
  static EIGEN_DONT_INLINE void dot_products(Scalar* to, Index to_stride, const Element* q, Index q_stride,
                                             const Element* k, Index k_stride, Index depth) {
    simd::Packet<Scalar> sums[kCount][kKeys];
    for (auto& row : sums) {
      for (auto& sum : row) sum = simd::broadcast(Scalar(0));
    }
    Index c = 0;
    for (; c + kLanes <= depth; c += kLanes) {
      simd::Packet<Scalar> left[kCount];
      for (Index r = 0; r < kCount; ++r) left[r] = simd::load_as<Scalar>(q + r * q_stride + c);
#pragma GCC unroll 4
      for (Index i = 0; i < kKeys; ++i) {
        const auto right = simd::load_as<Scalar>(k + i * k_stride + c);
#pragma GCC unroll 2
        for (Index r = 0; r < kCount; ++r) sums[r][i] = simd::fma(left[r], right, sums[r][i]);
      }
    }
    for (Index r = 0; r < kCount; ++r) {
      for (Index i = 0; i < kKeys; ++i) {
        Scalar sum = c == 0 ? Scalar(0) : simd::reduce_add(sums[r][i]);
        for (Index rest = c; rest < depth; ++rest) {
          sum += static_cast<Scalar>(q[r * q_stride + rest]) * static_cast<Scalar>(k[i * k_stride + rest]);
        }
        to[r * to_stride + i] = sum;
      }
    }
  }

  /// Scores become probabilities, in place; all 0 for a row that sees no key.
  void set_weights(Index map) {
    const Index width = width_;
    const ScaledExp2<Scalar> exp2 = exp2_;  // a copy, for which stores to weights need no reload
    for (Index row = 0; row < rows_.count; ++row) {
      const auto base_and_sum = exponentiate_row(weights(map, row), 0, width, exp2);
      const Scalar total = in_.statistics[map].total(row, rows_.head, base_and_sum, scale_);
      scale_row(weights(map, row), 0, width, normaliser(total));
    }
  }

  /// The keys that kPresent rows see: those that all of them do and no bias hides, and what each sees before and after.
  template <Index kPresent>
  struct SeenKeys {
    KeyRange before[kPresent];
    KeyRange by_all;
    KeyRange after[kPresent];
  };

  template <Index kPresent>
  SeenKeys<kPresent> seen_from(Index row) const {
    SeenKeys<kPresent> seen;
    seen.by_all = {0, rows_.n_k};
    for (Index r = 0; r < kPresent; ++r) {
      const KeyRange keys = rows_.keys_of(row + r);
      seen.by_all = {std::max(seen.by_all.begin, keys.begin), std::min(seen.by_all.end, keys.end)};
    }
    if (HasBias<Mask> || seen.by_all.end < seen.by_all.begin) seen.by_all.end = seen.by_all.begin;
    for (Index r = 0; r < kPresent; ++r) {
      const KeyRange keys = rows_.keys_of(row + r);
      seen.before[r] = {keys.begin, std::min(seen.by_all.begin, keys.end)};
      seen.after[r] = {std::max(seen.by_all.end, keys.begin), keys.end};
    }
    return seen;
  }

  /// kPresent rows of the result, from `row` on.
  template <Index kPresent>
  void add_values(Index row) {
    const SeenKeys<kPresent> seen = seen_from<kPresent>(row);
    const StridedView<const Element> v = in_.values(in_.kv_head(rows_.head));
    const StridedView<Result> out = in_.result(rows_.head).middle_rows(row, kPresent);
    Index c = 0;
    if (v.col_stride == 1 && out.col_stride == 1) {
      for (; c + 2 * kLanes <= in_.dv; c += 2 * kLanes) add_columns<2, true>(out, v, seen, row, c);
      for (; c + kLanes <= in_.dv; c += kLanes) add_columns<1, true>(out, v, seen, row, c);
    }
    for (; c < in_.dv; c += kLanes) add_columns<1, false>(out, v, seen, row, c);
  }

  /// kPackets packets of columns of kPresent rows of the result. A weight of 0 does not keep a NaN or Inf out: only
  /// what a row sees is touched. kWhole: packets lie in the rows of v and out as they are; else they are gathered, so
  /// that the arithmetic is the same whatever the strides.
  template <Index kPackets, bool kWhole, Index kPresent>
  EIGEN_ALWAYS_INLINE void add_columns(const StridedView<Result>& out, const StridedView<const Element>& v,
                                       const SeenKeys<kPresent>& seen, Index row, Index c) {
    simd::Packet<Scalar> sums[kPresent][kPackets];
    const Scalar* const weights = this->weights(0, row);
    const Index width = width_;
    const auto add = [&](Index r, Index key) {
      const auto weight = simd::broadcast(weights[r * width + key]);
      for (Index p = 0; p < kPackets; ++p) {
        sums[r][p] = simd::fma(weight, values_at<kWhole>(v, key, c + p * kLanes), sums[r][p]);
      }
    };
    const auto add_seen = [&](Index r, const KeyRange& keys) {
      for (Index key = keys.begin; key < keys.end; ++key) {
        if (bias_shows(rows_.mask, rows_.head, row + r, key, rows_.n_q, rows_.n_k)) add(r, key);
      }
    };
    for (Index r = 0; r < kPresent; ++r) {
      for (auto& sum : sums[r]) sum = simd::broadcast(Scalar(0));
      add_seen(r, seen.before[r]);
    }
    for (Index key = seen.by_all.begin; key < seen.by_all.end; ++key) {
#pragma GCC unroll 4
      for (Index r = 0; r < kPresent; ++r) add(r, key);
    }
    for (Index r = 0; r < kPresent; ++r) {
      add_seen(r, seen.after[r]);
      for (Index p = 0; p < kPackets; ++p) store_at<kWhole>(out, r, c + p * kLanes, sums[r][p]);
    }
  }

  /// Columns [col, col + kLanes) of a row; past the end of a row that is gathered, its last value.
  template <bool kWhole>
  static EIGEN_ALWAYS_INLINE simd::Packet<Scalar> values_at(const StridedView<const Element>& v, Index row, Index col) {
    if constexpr (kWhole) {
      return simd::load_as<Scalar>(&v(row, col));
    } else {
      alignas(simd::kMostAlignment) Scalar gathered[kLanes];
      for (Index i = 0; i < kLanes; ++i) gathered[i] = static_cast<Scalar>(v(row, std::min(col + i, v.cols - 1)));
      return simd::load(gathered);
    }
  }
  template <bool kWhole>
  static EIGEN_ALWAYS_INLINE void store_at(const StridedView<Result>& out, Index row, Index col,
                                           const simd::Packet<Scalar>& values) {
    if constexpr (kWhole) {
      simd::store_as(&out(row, col), values);
    } else {
      alignas(simd::kMostAlignment) Scalar gathered[kLanes];
      simd::store(gathered, values);
      for (Index i = 0; i < std::min(kLanes, out.cols - col); ++i) out(row, col + i) = static_cast<Result>(gathered[i]);
    }
  }

  const Operands& in_;
  RowRange<Mask> rows_;  // all queries of the head
  Index width_;          // of a row of weights, whole packets
  ScoreScale<Scalar> scale_;
  ScaledExp2<Scalar> exp2_;
  alignas(simd::kMostAlignment) Scalar weights_[kMaps][kMostSmallWeights];  // [map][row][width_]
};

}  // namespace diffattn::inline v0_1::detail
