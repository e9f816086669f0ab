#pragma once

// Attention for a handful of queries and keys, where anything prepared ahead costs more than it saves: score by score,
// in place, on the calling thread, with no scratch but the stack.

#include <algorithm>
#include <cmath>
#include <numbers>

#include "diffattn/kernels/detail/exp2.hpp"
#include "diffattn/kernels/detail/head_operands.hpp"
#include "diffattn/kernels/detail/row_softmax.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar, Index kMaps, typename Mask>
class SmallProblem {
  static constexpr Index kLanes = simd::kLanes<Scalar>;
  static constexpr Index kMostPairs = 36;  // of a query and a key

 public:
  static bool suits(const HeadOperands<Scalar, kMaps>& in) { return in.q[0].rows * in.k[0].rows <= kMostPairs; }

  static void run(const HeadOperands<Scalar, kMaps>& in, const Mask& mask) {
    const Index n_q = in.q[0].rows, n_k = in.k[0].rows, group = in.heads.num_heads / in.heads.num_kv_heads;
    const Index width = round_up(n_k, kLanes);  // at most n_k · kLanes
    alignas(64) Scalar weights[kMaps][kMostPairs * kLanes];
    for (Index head = 0; head < in.heads.num_heads; ++head) {
      // Step by step for all rows, so that none waits for what it has just stored.
      for (Index map = 0; map < kMaps; ++map) {
        for (Index row = 0; row < n_q; ++row) {
          set_scores(weights[map] + row * width, in, mask, map, row, head, group);
        }
      }
      for (Index map = 0; map < kMaps; ++map) {
        for (Index row = 0; row < n_q; ++row) {
          set_weights(weights[map] + row * width, width, in.lse[map], row, head);
        }
      }
      for (Index row = 0; row < n_q; ++row) {
        if constexpr (kMaps == 2) {
          const auto lambda = simd::broadcast(-in.lambda(row, head));
          for (Index c = row * width; c < (row + 1) * width; c += kLanes) {
            const auto p1 = simd::load(weights[0] + c), p2 = simd::load(weights[1] + c);
            simd::store(weights[0] + c, simd::fma(lambda, p2, p1));
          }
        }
        add_values(in, mask, weights[0] + row * width, row, head, group);
      }
    }
  }

 private:
  static void set_scores(Scalar* scores, const HeadOperands<Scalar, kMaps>& in, const Mask& mask, Index map, Index row,
                         Index head, Index group) {
    const StridedView<const Scalar>&q = in.q[map], &k = in.k[map];
    const Scalar* const query = &q(row, head * in.q_step);
    const KeyRange keys = mask.visible_keys(row, q.rows, k.rows);
    std::fill(scores, scores + round_up(k.rows, kLanes), kMinusInfinity<Scalar>);
    const Scalar factor = in.scale * std::numbers::log2e_v<Scalar>;
    for (Index key = keys.begin; key < keys.end; ++key) {
      const Scalar* const other = &k(key, head / group * in.k_step);
      Scalar dot = 0;
      Index c = 0;
      if (in.d >= kLanes && q.col_stride == 1 && k.col_stride == 1) {
        auto sums = simd::mul(simd::loadu(query), simd::loadu(other));
        for (c = kLanes; c + kLanes <= in.d; c += kLanes) {
          sums = simd::fma(simd::loadu(query + c), simd::loadu(other + c), sums);
        }
        dot = simd::reduce_add(sums);
      }
      for (; c < in.d; ++c) dot += query[c * q.col_stride] * other[c * k.col_stride];
      Scalar& score = scores[key];
      score = dot * factor;
      if constexpr (HasBias<Mask>) {
        const auto bias = static_cast<Scalar>(mask.bias(row, key, q.rows, k.rows));
        score = bias == kMinusInfinity<Scalar> ? bias : score + bias * std::numbers::log2e_v<Scalar>;
      }
    }
  }

  /// Scores become probabilities, in place; all 0 when there is no key.
  static void set_weights(Scalar* scores, Index width, const StridedView<Scalar>& lse, Index row, Index head) {
    auto packet_max = simd::broadcast(RowSoftmax<Scalar>::kNoBase);
    for (Index j = 0; j < width; j += kLanes) packet_max = simd::max(packet_max, simd::load(scores + j));
    const Scalar max = simd::reduce_max(packet_max);
    auto sums = simd::broadcast(Scalar(0));
    for (Index j = 0; j < width; j += kLanes) {
      const auto weight = packet_exp2<Scalar>(simd::sub(simd::load(scores + j), simd::broadcast(max)));
      simd::store(scores + j, weight);
      sums = simd::add(sums, weight);
    }
    const Scalar sum = simd::reduce_add(sums);
    if (lse.data != nullptr) lse(row, head) = max + std::log2(sum);
    const auto inverse = simd::broadcast(sum == Scalar(0) ? Scalar(0) : Scalar(1) / sum);
    for (Index j = 0; j < width; j += kLanes) simd::store(scores + j, simd::mul(simd::load(scores + j), inverse));
  }

  static void add_values(const HeadOperands<Scalar, kMaps>& in, const Mask& mask, const Scalar* weights, Index row,
                         Index head, Index group) {
    const StridedView<const Scalar>& v = in.v;
    const KeyRange keys = mask.visible_keys(row, in.q[0].rows, v.rows);
    const Index first = head / group * in.dv;
    Scalar* const out = &in.out(row, head * in.dv);
    Index c = 0;
    if (v.col_stride == 1 && in.out.col_stride == 1) {
      for (; c + kLanes <= in.dv; c += kLanes) {
        auto sums = simd::broadcast(Scalar(0));
        for (Index key = keys.begin; key < keys.end; ++key) {
          if (!bias_shows(mask, row, key, in.q[0].rows, v.rows)) continue;
          sums = simd::fma(simd::broadcast(weights[key]), simd::loadu(&v(key, first + c)), sums);
        }
        simd::storeu(out + c, sums);
      }
    }
    for (; c < in.dv; ++c) {
      Scalar sum = 0;
      for (Index key = keys.begin; key < keys.end; ++key) {
        if (bias_shows(mask, row, key, in.q[0].rows, v.rows)) sum += weights[key] * v(key, first + c);
      }
      out[c * in.out.col_stride] = sum;
    }
  }
};

}  // namespace diffattn::inline v0_1::detail
