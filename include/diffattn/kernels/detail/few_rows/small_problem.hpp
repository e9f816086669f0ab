#pragma once

// Attention for a handful of queries and keys, where anything prepared ahead costs more than it saves: in place, a few
// rows or keys at a time, with no scratch but the stack; head by head, the smallest on the calling thread.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "diffattn/core/parallel.hpp"
#include "diffattn/kernels/detail/exp2.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/detail/row_softmax.hpp"
#include "diffattn/kernels/detail/score_scale.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/product/dot.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar, Index kMaps, typename Mask>
class SmallProblem {
  static constexpr Index kLanes = simd::kLanes<Scalar>;
  static constexpr Index kKeys = 4;           // scored side by side
  static constexpr Index kRows = 4;           // given values side by side
  static constexpr Index kTinyPairs = 6 * 6;  // of a query and a key, too few to be worth a task
  static constexpr Index kMostWeights = 640;  // of a map, rows padded to whole packets
  static_assert(kTinyPairs * kLanes <= kMostWeights);
  static_assert(kMostWeights % kLanes == 0, "the weights of the second map must begin at a packet");

 public:
  /// The wider contiguous rows are, the more packing would cost: up to 6, 8 or 17 queries and as many keys.
  static bool suits(const HeadOperands<Scalar, kMaps>& in) {
    const Index n_q = in.q[0].rows, n_k = in.k[0].rows;
    if (n_q * n_k <= kTinyPairs) return true;
    for (Index map = 0; map < kMaps; ++map) {
      if (in.q[map].col_stride != 1 || in.k[map].col_stride != 1) return false;
    }
    const Index most_pairs = in.d < kLanes ? kTinyPairs : in.d < 8 * kLanes ? 8 * 8 : 17 * 17;
    // Fewer queries than kRows have a path of their own (few_rows.hpp).
    return n_q > kRows && n_q * n_k <= most_pairs && n_q * round_up(n_k, kLanes) <= kMostWeights;
  }

  template <Executor E>
  static void run(const HeadOperands<Scalar, kMaps>& in, const Mask& mask, E& executor) {
    if (in.q[0].rows * in.k[0].rows > kTinyPairs) {
      return executor.run(in.heads.num_heads, [&](Index head, Index /*worker*/) { run_head(in, mask, head); });
    }
    for (Index head = 0; head < in.heads.num_heads; ++head) run_head(in, mask, head);
  }

 private:
  static void run_head(const HeadOperands<Scalar, kMaps>& in, const Mask& mask, Index head) {
    const Index n_q = in.q[0].rows, n_k = in.k[0].rows, group = in.heads.num_heads / in.heads.num_kv_heads;
    const Index width = round_up(n_k, kLanes);
    const ScoreScale<Scalar> scale = split_scale<Mask>(in.scale);
    const ScaledExp2<Scalar> exp2(scale.of_exponent);
    alignas(simd::kMostAlignment) Scalar weights[kMaps][kMostWeights];
    // Step by step for all rows, so that none waits for what it has just stored.
    for (Index map = 0; map < kMaps; ++map) {
      const auto q = in.q[map].middle_cols(head * in.q_step, in.d);
      const auto k = in.k[map].middle_cols(head / group * in.k_step, in.d);
      Index row = 0;
      for (; row + 2 <= n_q; row += 2) set_scores<2>(weights[map] + row * width, width, q, k, mask, row);
      for (; row < n_q; ++row) set_scores<1>(weights[map] + row * width, width, q, k, mask, row);
      for (row = 0; row < n_q; ++row) {
        finish_scores(weights[map] + row * width, width, scale, mask, head, row, n_q, n_k);
      }
    }
    for (Index map = 0; map < kMaps; ++map) {
      for (Index row = 0; row < n_q; ++row) {
        set_weights(weights[map] + row * width, width, scale, exp2, in.lse[map], row, head);
      }
    }
    if constexpr (kMaps == 2) {
      for (Index row = 0; row < n_q; ++row) {
        const auto lambda = simd::broadcast(-in.lambda(row, head));
        for (Index c = row * width; c < (row + 1) * width; c += kLanes) {
          const auto p1 = simd::load(weights[0] + c), p2 = simd::load(weights[1] + c);
          simd::store(weights[0] + c, simd::fma(lambda, p2, p1));
        }
      }
    }
    Index row = 0;
    for (; row + kRows <= n_q; row += kRows) {
      add_values<kRows>(in, mask, weights[0] + row * width, width, row, head, group);
    }
    for (; row < n_q; ++row) add_values<1>(in, mask, weights[0] + row * width, width, row, head, group);
  }

  /// q · k for kCount rows, which read what any of them sees of the keys together.
  template <Index kCount>
  static void set_scores(Scalar* scores, Index width, const StridedView<const Scalar>& q,
                         const StridedView<const Scalar>& k, const Mask& mask, Index row) {
    Index key = mask.visible_keys(row, q.rows, k.rows).begin;
    const Index end = mask.visible_keys(row + kCount - 1, q.rows, k.rows).end;
    if (q.col_stride == 1 && k.col_stride == 1) {
      for (; key + kKeys <= end; key += kKeys) {
        dot_products<kCount>(scores + key, width, &q(row, 0), q.row_stride, &k(key, 0), k.row_stride, q.cols);
      }
      for (; key < end; ++key) {
        for (Index r = 0; r < kCount; ++r) scores[r * width + key] = dot(&q(row + r, 0), &k(key, 0), q.cols);
      }
    }
    for (; key < end; ++key) {
      for (Index r = 0; r < kCount; ++r) {
        Scalar sum = 0;
        for (Index c = 0; c < q.cols; ++c) sum += q(row + r, c) * k(key, c);
        scores[r * width + key] = sum;
      }
    }
  }

  /// to(r, i) = (row r of q) · (row i of k), for kCount and kKeys rows.
  template <Index kCount>
  static EIGEN_DONT_INLINE void dot_products(Scalar* to, Index to_stride, const Scalar* q, Index q_stride,
                                             const Scalar* k, Index k_stride, Index depth) {
    simd::Packet<Scalar> sums[kCount][kKeys];
    for (auto& row : sums) {
      for (auto& sum : row) sum = simd::broadcast(Scalar(0));
    }
    Index c = 0;
    for (; c + kLanes <= depth; c += kLanes) {
      simd::Packet<Scalar> left[kCount];
      for (Index r = 0; r < kCount; ++r) left[r] = simd::loadu(q + r * q_stride + c);
#pragma GCC unroll 4
      for (Index i = 0; i < kKeys; ++i) {
        const auto right = simd::loadu(k + i * k_stride + c);
#pragma GCC unroll 2
        for (Index r = 0; r < kCount; ++r) sums[r][i] = simd::fma(left[r], right, sums[r][i]);
      }
    }
    for (Index r = 0; r < kCount; ++r) {
      for (Index i = 0; i < kKeys; ++i) {
        Scalar sum = c == 0 ? Scalar(0) : simd::reduce_add(sums[r][i]);
        for (Index rest = c; rest < depth; ++rest) sum += q[r * q_stride + rest] * k[i * k_stride + rest];
        to[r * to_stride + i] = sum;
      }
    }
  }

  /// Products become scores, -inf for what the row does not see.
  static void finish_scores(Scalar* scores, Index width, const ScoreScale<Scalar>& scale, const Mask& mask, Index head,
                            Index row, Index n_q, Index n_k) {
    const KeyRange keys = mask.visible_keys(row, n_q, n_k);
    std::fill(scores, scores + keys.begin, kMinusInfinity<Scalar>);
    std::fill(scores + keys.end, scores + width, kMinusInfinity<Scalar>);
    for (Index key = keys.begin; key < keys.end; ++key) {
      if constexpr (HasBias<Mask>) {
        scores[key] = biased_score(scores[key], scale, bias_of<Scalar>(mask, head, row, key, n_q, n_k));
      } else {
        scores[key] *= scale.of_queries;  // as if the query had been
      }
    }
  }

  /// Scores become probabilities, in place; all 0 when there is no key.
  static void set_weights(Scalar* scores, Index width, const ScoreScale<Scalar>& scale, const ScaledExp2<Scalar>& exp2,
                          const StridedView<Scalar>& lse, Index row, Index head) {
    auto packet_max = simd::broadcast(RowSoftmax<Scalar>::kNoBase);
    for (Index j = 0; j < width; j += kLanes) packet_max = simd::max(packet_max, simd::load(scores + j));
    const Scalar max = simd::reduce_max(packet_max);
    auto sums = simd::broadcast(Scalar(0));
    for (Index j = 0; j < width; j += kLanes) {
      const auto weight = exp2(simd::sub(simd::load(scores + j), simd::broadcast(max)));
      simd::store(scores + j, weight);
      sums = simd::add(sums, weight);
    }
    const Scalar sum = simd::reduce_add(sums);
    if (lse.data != nullptr) lse(row, head) = scale.of_exponent * max + std::log2(sum);
    const auto inverse = simd::broadcast(sum == Scalar(0) ? Scalar(0) : Scalar(1) / sum);
    for (Index j = 0; j < width; j += kLanes) simd::store(scores + j, simd::mul(simd::load(scores + j), inverse));
  }

  /// kPresent rows of the result, from `row` on. A weight of 0 does not keep a NaN or Inf out: only what a row sees is
  /// touched.
  template <Index kPresent>
  static void add_values(const HeadOperands<Scalar, kMaps>& in, const Mask& mask, const Scalar* weights, Index width,
                         Index row, Index head, Index group) {
    const Index n_q = in.q[0].rows, n_k = in.v.rows;
    KeyRange seen[kPresent], all{0, n_k};  // by each row; by all of them, with no key that a bias hides
    for (Index r = 0; r < kPresent; ++r) {
      seen[r] = mask.visible_keys(row + r, n_q, n_k);
      all = {std::max(all.begin, seen[r].begin), std::min(all.end, seen[r].end)};
    }
    if (HasBias<Mask> || all.end < all.begin) all.end = all.begin;
    const auto for_each_seen = [&](Index r, Index begin, Index end, const auto& add) {
      for (Index key = std::max(begin, seen[r].begin); key < std::min(end, seen[r].end); ++key) {
        if (bias_shows(mask, head, row + r, key, n_q, n_k)) add(weights[r * width + key], key);
      }
    };

    const StridedView<const Scalar> v = in.v.middle_cols(head / group * in.dv, in.dv);
    const StridedView<Scalar> out = in.out.block(row, head * in.dv, kPresent, in.dv);
    // `whole`: packets lie in the rows of v and out as they are. Else they are gathered, so that the arithmetic is the
    // same whatever the strides.
    const auto add_columns = [&](auto packets, auto whole, Index c) {
      constexpr Index kPackets = decltype(packets)::value;
      const auto values = [&](Index key, Index first) {
        if constexpr (decltype(whole)::value) return simd::loadu(&v(key, first));
        alignas(simd::kMostAlignment) Scalar gathered[kLanes];
        for (Index i = 0; i < kLanes; ++i) gathered[i] = v(key, std::min(first + i, in.dv - 1));
        return simd::load(gathered);
      };
      simd::Packet<Scalar> sums[kPresent][kPackets];
      const auto add = [&](Index r, Scalar weight, Index key) {
        for (Index p = 0; p < kPackets; ++p) {
          sums[r][p] = simd::fma(simd::broadcast(weight), values(key, c + p * kLanes), sums[r][p]);
        }
      };
      for (Index r = 0; r < kPresent; ++r) {
        for (auto& sum : sums[r]) sum = simd::broadcast(Scalar(0));
        for_each_seen(r, 0, all.begin, [&](Scalar weight, Index key) { add(r, weight, key); });
      }
      for (Index key = all.begin; key < all.end; ++key) {
#pragma GCC unroll 4
        for (Index r = 0; r < kPresent; ++r) add(r, weights[r * width + key], key);
      }
      for (Index r = 0; r < kPresent; ++r) {
        for_each_seen(r, all.end, n_k, [&](Scalar weight, Index key) { add(r, weight, key); });
        if constexpr (decltype(whole)::value) {
          for (Index p = 0; p < kPackets; ++p) simd::storeu(&out(r, c + p * kLanes), sums[r][p]);
        } else {
          alignas(simd::kMostAlignment) Scalar gathered[kLanes];
          simd::store(gathered, sums[r][0]);
          for (Index i = 0; i < std::min(kLanes, in.dv - c); ++i) out(r, c + i) = gathered[i];
        }
      }
    };
    constexpr std::integral_constant<Index, 1> one;
    constexpr std::integral_constant<Index, 2> two;
    Index c = 0;
    if (v.col_stride == 1 && out.col_stride == 1) {
      for (; c + 2 * kLanes <= in.dv; c += 2 * kLanes) add_columns(two, std::true_type{}, c);
      for (; c + kLanes <= in.dv; c += kLanes) add_columns(one, std::true_type{}, c);
    }
    for (; c < in.dv; c += kLanes) add_columns(one, std::false_type{}, c);
  }
};

}  // namespace diffattn::inline v0_1::detail
