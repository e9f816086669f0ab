#pragma once

// Attention for a few query rows: decoding, and small problems. Packing would cost more than it saves, so keys and
// values are read where they are, each of them once and in the order of memory, all heads of a key together: reading is
// all the time there is. Scores of all keys are kept, both softmaxes are finished, and V meets the combined weights in
// a single pass, where two standard calls would read it twice.
//
// Keys are taken in pieces of a fixed size, each a task with its own partial sums of values, which are added up in
// order: any number of threads gives the same bits.

#include <algorithm>
#include <cmath>
#include <numbers>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/exp2.hpp"
#include "diffattn/kernels/detail/head_operands.hpp"
#include "diffattn/kernels/detail/row_softmax.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar, Index kMaps, typename Mask>
class FewRows {
  static constexpr Index kLanes = simd::kLanes<Scalar>;
  static constexpr Index kPiece = 512;    // keys in a task
  static constexpr Index kValueKeys = 8;  // keys whose values are added while the sums are in registers

 public:
  /// Whether the rows that share a key head are few enough, and keys and values contiguous.
  static bool suits(const HeadOperands<Scalar, kMaps>& in) {
    constexpr Index kMostRows = 4;
    return in.q[0].rows * (in.heads.num_heads / in.heads.num_kv_heads) <= kMostRows && in.k[0].col_stride == 1 &&
           in.k[kMaps - 1].col_stride == 1 && in.v.col_stride == 1;
  }

  template <Executor E>
  static void run(const HeadOperands<Scalar, kMaps>& in, const Mask& mask, Workspace& workspace, E& executor) {
    const auto frame = workspace.frame();
    FewRows rows(in, mask, workspace);
    for (Index row = 0; row < rows.rows_; ++row) rows.pack_query(row);
    executor.run(rows.pieces_, [&](Index piece, Index /*worker*/) { rows.score_piece(piece); });
    executor.run(rows.rows_, [&](Index row, Index /*worker*/) { rows.finish_softmax(row); });
    executor.run(rows.pieces_, [&](Index piece, Index /*worker*/) { rows.add_values(piece); });
    for (Index row = 0; row < rows.rows_; ++row) rows.write(row);
  }

 private:
  FewRows(const HeadOperands<Scalar, kMaps>& in, const Mask& mask, Workspace& workspace)
      : in_(in),
        mask_(mask),
        n_q_(in.q[0].rows),
        n_k_(in.k[0].rows),
        rows_(n_q_ * in.heads.num_heads),
        rows_per_key_head_(rows_ / in.heads.num_kv_heads) {
    const KeyRange first = mask.visible_keys(0, n_q_, n_k_), last = mask.visible_keys(n_q_ - 1, n_q_, n_k_);
    keys_ = {first.begin, std::max(first.begin, last.end)};
    width_ = round_up(keys_.end - keys_.begin, kLanes);
    pieces_ = divide_up(keys_.end - keys_.begin, kPiece);
    q_ = workspace.take<Scalar>(kMaps * rows_ * in.d);
    weights_ = workspace.take<Scalar>(kMaps * rows_ * width_);
    partial_ = workspace.take<Scalar>(pieces_ * rows_ * in.dv);
  }

  // A row is a query of one query head, numbered head by head.
  Index query(Index row) const { return row % n_q_; }
  Index query_head(Index row) const { return row / n_q_; }
  Scalar* q(Index map, Index row) const { return q_ + (map * rows_ + row) * in_.d; }
  Scalar* weights(Index map, Index row) const { return weights_ + (map * rows_ + row) * width_; }
  Scalar* partial(Index piece, Index row) const { return partial_ + (piece * rows_ + row) * in_.dv; }

  KeyRange piece_keys(Index piece) const {
    const Index begin = keys_.begin + piece * kPiece;
    return {begin, std::min(begin + kPiece, keys_.end)};
  }
  /// The keys among `keys` that a row sees, but for its bias.
  KeyRange visible(Index row, const KeyRange& keys) const {
    const KeyRange seen = mask_.visible_keys(query(row), n_q_, n_k_);
    const Index begin = std::clamp(seen.begin, keys.begin, keys.end);
    return {begin, std::clamp(seen.end, begin, keys.end)};
  }

  void pack_query(Index row) {
    const Scalar factor = in_.scale * std::numbers::log2e_v<Scalar>;
    for (Index map = 0; map < kMaps; ++map) {
      const Index step = in_.q[map].col_stride;
      const Scalar* const from = &in_.q[map](query(row), query_head(row) * in_.q_step);
      Scalar* const to = q(map, row);
      if (step == 1) {
        for (Index c = 0; c < in_.d; ++c) to[c] = from[c] * factor;
      } else {
        for (Index c = 0; c < in_.d; ++c) to[c] = from[c * step] * factor;
      }
    }
  }

  void score_piece(Index piece) {
    const KeyRange keys = piece_keys(piece);
    for (Index key = keys.begin; key < keys.end; key += kLanes) {
      const Index present = std::min(kLanes, keys.end - key);
      for (Index head = 0; head < in_.heads.num_kv_heads; ++head) {
        for (Index map = 0; map < kMaps; ++map) {
          const Index stride = in_.k[map].row_stride;
          const Scalar* const k = &in_.k[map](key, head * in_.k_step);
          if (key + 2 * kLanes <= keys.end) prefetch_rows(k + kLanes * stride, stride);
          for (Index r = 0; r < rows_per_key_head_; ++r) {
            const Index row = head * rows_per_key_head_ + r;
            Scalar* const scores = weights(map, row) + (key - keys_.begin);
            if (present == kLanes) {
              score_packet(scores, q(map, row), k, stride);
            } else {
              for (Index i = 0; i < present; ++i) scores[i] = dot(q(map, row), k + i * stride);
            }
          }
        }
      }
    }
    for (Index map = 0; map < kMaps; ++map) {
      for (Index row = 0; row < rows_; ++row) mask_scores(weights(map, row) - keys_.begin, row, keys);
    }
  }

  /// The next packet of keys: heads that lie side by side make short runs, which the hardware does not foresee.
  void prefetch_rows(const Scalar* rows, Index stride) const {
    constexpr Index kLine = 64 / sizeof(Scalar);
    for (Index i = 0; i < kLanes; ++i, rows += stride) {
      for (Index c = 0; c < in_.d; c += kLine) simd::prefetch_far(rows + c);
    }
  }

  /// scores[i] = q · k_i for a packet of keys: sums across lanes are made for all of them at once, by a transposition.
  void score_packet(Scalar* scores, const Scalar* q, const Scalar* k, Index stride) const {
    constexpr Index kGroup = std::min<Index>(4, kLanes);  // keys with a sum in flight
    simd::Packet<Scalar> sums[kLanes];
    const Index whole = in_.d / kLanes * kLanes;
    for (Index first = 0; first < kLanes; first += kGroup) {
      simd::Packet<Scalar> group[kGroup];
      for (auto& sum : group) sum = simd::broadcast(Scalar(0));
      for (Index c = 0; c < whole; c += kLanes) {
        const auto right = simd::loadu(q + c);
#pragma GCC unroll 4
        for (Index i = 0; i < kGroup; ++i) {
          group[i] = simd::fma(simd::loadu(k + (first + i) * stride + c), right, group[i]);
        }
      }
      for (Index i = 0; i < kGroup; ++i) sums[first + i] = group[i];
    }
    simd::transpose<Scalar>(sums);
#pragma GCC unroll 4
    for (Index half = kLanes / 2; half > 0; half /= 2) {
      for (Index i = 0; i < half; ++i) sums[i] = simd::add(sums[i], sums[i + half]);
    }
    simd::store(scores, sums[0]);
    for (Index i = 0; i < kLanes && whole < in_.d; ++i) scores[i] += tail_dot(q, k + i * stride, whole);
  }

  Scalar dot(const Scalar* q, const Scalar* k) const {
    auto sum = simd::broadcast(Scalar(0));
    const Index whole = in_.d / kLanes * kLanes;
    for (Index c = 0; c < whole; c += kLanes) sum = simd::fma(simd::loadu(k + c), simd::loadu(q + c), sum);
    return (whole == 0 ? Scalar(0) : simd::reduce_add(sum)) + tail_dot(q, k, whole);
  }

  Scalar tail_dot(const Scalar* q, const Scalar* k, Index whole) const {
    Scalar sum = 0;
    for (Index c = whole; c < in_.d; ++c) sum += q[c] * k[c];
    return sum;
  }

  /// scores: indexed by key.
  void mask_scores(Scalar* scores, Index row, const KeyRange& keys) const {
    const KeyRange seen = visible(row, keys);
    std::fill(scores + keys.begin, scores + seen.begin, kMinusInfinity<Scalar>);
    std::fill(scores + seen.end, scores + keys.end, kMinusInfinity<Scalar>);
    if constexpr (HasBias<Mask>) {
      for (Index key = seen.begin; key < seen.end; ++key) {
        const auto bias = static_cast<Scalar>(mask_.bias(query(row), key, n_q_, n_k_));
        scores[key] = bias == kMinusInfinity<Scalar> ? bias : scores[key] + bias * std::numbers::log2e_v<Scalar>;
      }
    }
  }

  /// Scores of one row become the weights that V is summed with: P, or P1 − λ·P2.
  void finish_softmax(Index row) {
    Scalar factors[kMaps];
    for (Index map = 0; map < kMaps; ++map) {
      Scalar* const scores = weights(map, row);
      std::fill(scores + (keys_.end - keys_.begin), scores + width_, kMinusInfinity<Scalar>);
      const auto [sum, max] = exponentiate(scores);
      if (in_.lse[map].data != nullptr) in_.lse[map](query(row), query_head(row)) = max + std::log2(sum);
      factors[map] = sum == Scalar(0) ? Scalar(0) : Scalar(1) / sum;
    }
    if constexpr (kMaps == 1) {
      const auto f = simd::broadcast(factors[0]);
      for (Index c = 0; c < width_; c += kLanes) {
        simd::store(weights(0, row) + c, simd::mul(simd::load(weights(0, row) + c), f));
      }
    } else {
      const auto f1 = simd::broadcast(factors[0]);
      const auto f2 = simd::broadcast(-in_.lambda(query(row), query_head(row)) * factors[1]);
      for (Index c = 0; c < width_; c += kLanes) {
        const auto p1 = simd::load(weights(0, row) + c), p2 = simd::load(weights(1, row) + c);
        simd::store(weights(0, row) + c, simd::fma(p1, f1, simd::mul(p2, f2)));
      }
    }
  }

  struct Sum {
    Scalar value;
    Scalar max;
  };

  /// exp2(score − max) in place; returns the sum and what it is relative to.
  Sum exponentiate(Scalar* scores) const {
    if (width_ == 0) return {Scalar(0), kMinusInfinity<Scalar>};
    auto packet_max = simd::load(scores);
    for (Index c = kLanes; c < width_; c += kLanes) packet_max = simd::max(packet_max, simd::load(scores + c));
    const Scalar max = simd::reduce_max(packet_max);
    const auto base = simd::broadcast(finite_or_zero(max));
    auto sum = simd::broadcast(Scalar(0));
    for (Index c = 0; c < width_; c += kLanes) {
      const auto weight = exp2_nonpositive<Scalar>(simd::sub(simd::load(scores + c), base));
      simd::store(scores + c, weight);
      sum = simd::add(sum, weight);
    }
    return {simd::reduce_add(sum), max};
  }

  void add_values(Index piece) {
    const KeyRange keys = piece_keys(piece);
    std::fill(partial(piece, 0), partial(piece, 0) + rows_ * in_.dv, Scalar(0));
    for (Index key = keys.begin; key < keys.end; key += kValueKeys) {
      for (Index row = 0; row < rows_; ++row) {
        const KeyRange seen = visible(row, {key, std::min(key + kValueKeys, keys.end)});
        const Index first_col = row / rows_per_key_head_ * in_.dv;
        const Scalar* const w = weights(0, row) - keys_.begin;
        Scalar* const to = partial(piece, row);
        Index c = 0;
        for (; c + 8 * kLanes <= in_.dv; c += 8 * kLanes) add_packets<8>(to + c, w, first_col + c, row, seen);
        for (; c + kLanes <= in_.dv; c += kLanes) add_packets<1>(to + c, w, first_col + c, row, seen);
        for (Index j = seen.begin; c < in_.dv && j < seen.end; ++j) {
          if (!bias_shows(mask_, query(row), j, n_q_, n_k_)) continue;
          for (Index tail = c; tail < in_.dv; ++tail) to[tail] += w[j] * in_.v(j, first_col + tail);
        }
      }
    }
  }

  /// to += Σ w_key · v_key over kPackets packets of columns from `col` on.
  template <Index kPackets>
  void add_packets(Scalar* to, const Scalar* w, Index col, Index row, const KeyRange& keys) const {
    simd::Packet<Scalar> sums[kPackets];
#pragma GCC unroll 8
    for (Index p = 0; p < kPackets; ++p) sums[p] = simd::loadu(to + p * kLanes);
    for (Index key = keys.begin; key < keys.end; ++key) {
      if (!bias_shows(mask_, query(row), key, n_q_, n_k_)) continue;
      const auto weight = simd::broadcast(w[key]);
      const Scalar* const from = &in_.v(key, col);
#pragma GCC unroll 8
      for (Index p = 0; p < kPackets; ++p) sums[p] = simd::fma(weight, simd::loadu(from + p * kLanes), sums[p]);
    }
#pragma GCC unroll 8
    for (Index p = 0; p < kPackets; ++p) simd::storeu(to + p * kLanes, sums[p]);
  }

  void write(Index row) {
    Scalar* const out = &in_.out(query(row), query_head(row) * in_.dv);
    const Index step = in_.out.col_stride;
    for (Index c = 0; c < in_.dv; ++c) out[c * step] = pieces_ == 0 ? Scalar(0) : partial(0, row)[c];
    for (Index piece = 1; piece < pieces_; ++piece) {
      const Scalar* const from = partial(piece, row);
      for (Index c = 0; c < in_.dv; ++c) out[c * step] += from[c];
    }
  }

  const HeadOperands<Scalar, kMaps>& in_;
  const Mask& mask_;
  Index n_q_;
  Index n_k_;
  Index rows_;
  Index rows_per_key_head_;
  KeyRange keys_;  // what any row sees
  Index width_;    // of a row of weights, whole packets
  Index pieces_;
  Scalar* q_;        // [map][row][d], scaled by s·log2(e)
  Scalar* weights_;  // [map][row][width]
  Scalar* partial_;  // [piece][row][dv]
};

}  // namespace diffattn::inline v0_1::detail
