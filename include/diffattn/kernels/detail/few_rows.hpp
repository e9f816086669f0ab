#pragma once

// Attention for a few query rows: decoding, and small problems. Packing would cost more than it saves, so keys and
// values are read where they are, each of them once; reading is all the time there is. Scores of all keys are kept,
// both softmaxes are finished, and V meets the combined weights in a single pass, where two standard calls would read
// it twice.
//
// Keys are taken in pieces of a fixed size, each with its own partial sum of values, added up in order. With heads
// enough for the threads a head is one task; with fewer, its pieces are. The arithmetic is the same, and so is every
// bit.

#include <algorithm>
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
  static constexpr Index kPiece = 512;  // keys

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
    const Index kv_heads = in.heads.num_kv_heads, workers = executor.concurrency();
    if (kv_heads >= 2 * workers || workers == 1) {
      FewRows* const tasks = workspace.take<FewRows>(workers);
      for (Index worker = 0; worker < workers; ++worker) new (tasks + worker) FewRows(in, mask, workspace);
      executor.run(kv_heads, [&](Index head, Index worker) {
        Serial serial;
        tasks[worker].run_head(head, serial);
      });
    } else {
      FewRows task(in, mask, workspace);
      for (Index head = 0; head < kv_heads; ++head) task.run_head(head, executor);
    }
  }

 private:
  FewRows(const HeadOperands<Scalar, kMaps>& in, const Mask& mask, Workspace& workspace)
      : in_(in),
        mask_(mask),
        n_q_(in.q[0].rows),
        n_k_(in.k[0].rows),
        rows_(n_q_ * (in.heads.num_heads / in.heads.num_kv_heads)) {
    const KeyRange first = mask.visible_keys(0, n_q_, n_k_), last = mask.visible_keys(n_q_ - 1, n_q_, n_k_);
    keys_ = {first.begin, std::max(first.begin, last.end)};
    width_ = round_up(keys_.end - keys_.begin, kLanes);
    pieces_ = divide_up(keys_.end - keys_.begin, kPiece);
    q_ = workspace.take<Scalar>(kMaps * rows_ * in.d);
    weights_ = workspace.take<Scalar>(kMaps * rows_ * width_);
    partial_ = workspace.take<Scalar>(pieces_ * rows_ * in.dv);
  }

  template <Executor E>
  void run_head(Index head, E& executor) {
    for (Index row = 0; row < rows_; ++row) pack_query(head, row);
    executor.run(pieces_, [&](Index piece, Index /*worker*/) { score_piece(head, piece); });
    executor.run(rows_, [&](Index row, Index /*worker*/) { finish_softmax(head, row); });
    executor.run(pieces_, [&](Index piece, Index /*worker*/) { add_values(head, piece); });
    for (Index row = 0; row < rows_; ++row) write(head, row);
  }

  Index query(Index row) const { return row % n_q_; }
  Index query_head(Index head, Index row) const { return head * (rows_ / n_q_) + row / n_q_; }
  Scalar* q(Index map, Index row) const { return q_ + (map * rows_ + row) * in_.d; }
  Scalar* weights(Index map, Index row) const { return weights_ + (map * rows_ + row) * width_; }
  Scalar* partial(Index piece, Index row) const { return partial_ + (piece * rows_ + row) * in_.dv; }

  KeyRange piece_keys(Index piece) const {
    const Index begin = keys_.begin + piece * kPiece;
    return {begin, std::min(begin + kPiece, keys_.end)};
  }
  /// The keys of a piece that a row sees, but for its bias.
  KeyRange visible(Index row, const KeyRange& piece) const {
    const KeyRange keys = mask_.visible_keys(query(row), n_q_, n_k_);
    const Index begin = std::clamp(keys.begin, piece.begin, piece.end);
    return {begin, std::clamp(keys.end, begin, piece.end)};
  }

  void pack_query(Index head, Index row) {
    const Scalar factor = in_.scale * std::numbers::log2e_v<Scalar>;
    for (Index map = 0; map < kMaps; ++map) {
      const Scalar* const from = &in_.q[map](query(row), query_head(head, row) * in_.q_step);
      for (Index c = 0; c < in_.d; ++c) q(map, row)[c] = from[c * in_.q[map].col_stride] * factor;
    }
  }

  void score_piece(Index head, Index piece) {
    const KeyRange keys = piece_keys(piece);
    for (Index map = 0; map < kMaps; ++map) {
      for (Index row = 0; row < rows_; ++row) {
        const KeyRange seen = visible(row, keys);
        Scalar* const to = weights(map, row) - keys_.begin;
        std::fill(to + keys.begin, to + seen.begin, kMinusInfinity<Scalar>);
        std::fill(to + seen.end, to + keys.end, kMinusInfinity<Scalar>);
        score_keys(to, q(map, row), in_.k[map].middle_cols(head * in_.k_step, in_.d), seen);
        if constexpr (HasBias<Mask>) {
          for (Index key = seen.begin; key < seen.end; ++key) {
            const auto bias = static_cast<Scalar>(mask_.bias(query(row), key, n_q_, n_k_));
            to[key] = bias == kMinusInfinity<Scalar> ? bias : to[key] + bias * std::numbers::log2e_v<Scalar>;
          }
        }
      }
    }
  }

  /// to[key] = q · k_key. Four keys at a time keep four sums in flight.
  static void score_keys(Scalar* to, const Scalar* q, const StridedView<const Scalar>& k, const KeyRange& keys) {
    constexpr Index kKeys = 4;
    for (Index key = keys.begin; key < keys.end; key += kKeys) {
      const Index present = std::min(kKeys, keys.end - key);
      const Scalar* rows[kKeys];
      for (Index i = 0; i < kKeys; ++i) rows[i] = &k(key + std::min(i, present - 1), 0);
      simd::Packet<Scalar> sums[kKeys];
      for (auto& sum : sums) sum = simd::broadcast(Scalar(0));
      Index c = 0;
      for (; c + kLanes <= k.cols; c += kLanes) {
        const auto right = simd::loadu(q + c);
#pragma GCC unroll 4
        for (Index i = 0; i < kKeys; ++i) sums[i] = simd::fma(simd::loadu(rows[i] + c), right, sums[i]);
      }
      for (Index i = 0; i < present; ++i) {
        Scalar dot = simd::reduce_add(sums[i]);
        for (Index tail = c; tail < k.cols; ++tail) dot += rows[i][tail] * q[tail];
        to[key + i] = dot;
      }
    }
  }

  /// Scores of one row become the weights that V is summed with: P, or P1 − λ·P2.
  void finish_softmax(Index head, Index row) {
    Scalar factors[kMaps];
    for (Index map = 0; map < kMaps; ++map) {
      Scalar* const scores = weights(map, row);
      std::fill(scores + (keys_.end - keys_.begin), scores + width_, kMinusInfinity<Scalar>);
      const Scalar sum = exponentiate(scores);
      factors[map] = sum == Scalar(0) ? Scalar(0) : Scalar(1) / sum;
    }
    if constexpr (kMaps == 1) {
      const auto f = simd::broadcast(factors[0]);
      for (Index c = 0; c < width_; c += kLanes) {
        simd::store(weights(0, row) + c, simd::mul(simd::load(weights(0, row) + c), f));
      }
    } else {
      const auto f1 = simd::broadcast(factors[0]);
      const auto f2 = simd::broadcast(-in_.lambda(query(row), query_head(head, row)) * factors[1]);
      for (Index c = 0; c < width_; c += kLanes) {
        const auto p1 = simd::load(weights(0, row) + c), p2 = simd::load(weights(1, row) + c);
        simd::store(weights(0, row) + c, simd::fma(p1, f1, simd::mul(p2, f2)));
      }
    }
  }

  /// exp2(score − max) in place; returns the sum.
  Scalar exponentiate(Scalar* scores) const {
    if (width_ == 0) return Scalar(0);
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
    return simd::reduce_add(sum);
  }

  void add_values(Index head, Index piece) {
    const KeyRange keys = piece_keys(piece);
    const StridedView<const Scalar> v = in_.v.middle_cols(head * in_.dv, in_.dv);
    for (Index row = 0; row < rows_; ++row) {
      const KeyRange seen = visible(row, keys);
      const Scalar* const w = weights(0, row) - keys_.begin;
      Scalar* const to = partial(piece, row);
      Index c = 0;
      for (; c + 8 * kLanes <= in_.dv; c += 8 * kLanes) add_columns<8>(to + c, w, v, c, row, seen);
      for (; c + kLanes <= in_.dv; c += kLanes) add_columns<1>(to + c, w, v, c, row, seen);
      for (; c < in_.dv; ++c) {
        to[c] = Scalar(0);
        for (Index key = seen.begin; key < seen.end; ++key) {
          if (bias_shows(mask_, query(row), key, n_q_, n_k_)) to[c] += w[key] * v(key, c);
        }
      }
    }
  }

  /// to = Σ w_key · v_key over kPackets packets of columns from `c` on.
  template <Index kPackets>
  void add_columns(Scalar* to, const Scalar* w, const StridedView<const Scalar>& v, Index c, Index row,
                   const KeyRange& keys) const {
    simd::Packet<Scalar> sums[kPackets];
    for (auto& sum : sums) sum = simd::broadcast(Scalar(0));
    for (Index key = keys.begin; key < keys.end; ++key) {
      if (!bias_shows(mask_, query(row), key, n_q_, n_k_)) continue;
      const auto weight = simd::broadcast(w[key]);
      const Scalar* const from = &v(key, c);
#pragma GCC unroll 8
      for (Index p = 0; p < kPackets; ++p) sums[p] = simd::fma(weight, simd::loadu(from + p * kLanes), sums[p]);
    }
    for (Index p = 0; p < kPackets; ++p) simd::storeu(to + p * kLanes, sums[p]);
  }

  void write(Index head, Index row) {
    Scalar* const out = &in_.out(query(row), query_head(head, row) * in_.dv);
    for (Index c = 0; c < in_.dv; ++c) {
      Scalar sum = 0;
      for (Index piece = 0; piece < pieces_; ++piece) sum += partial(piece, row)[c];
      out[c * in_.out.col_stride] = sum;
    }
  }

  const HeadOperands<Scalar, kMaps>& in_;
  const Mask& mask_;
  Index n_q_;
  Index n_k_;
  Index rows_;     // query rows that share a key head: of every query head in its group
  KeyRange keys_;  // what any row sees
  Index width_;    // of a row of weights, whole packets
  Index pieces_;
  Scalar* q_;        // [map][row][d], scaled by s·log2(e)
  Scalar* weights_;  // [map][row][width]
  Scalar* partial_;  // [piece][row][dv]
};

}  // namespace diffattn::inline v0_1::detail
