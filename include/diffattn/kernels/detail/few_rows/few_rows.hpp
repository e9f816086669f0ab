#pragma once

// Attention for a few query rows: decoding, and small problems. Reading keys and values is all the time there is, so
// each of them is read once and in the order of memory, wherever it is: in place (few_rows_in_place.hpp) or packed in
// the pages of a cache (few_rows_packed.hpp). Scores of all keys are kept, both softmaxes are finished, and V meets the
// combined weights in a single pass, where two standard calls would read it twice.
//
// Keys are taken in pieces of a fixed size. A piece turns its scores into weights relative to its own maximum; once all
// are done, maxima and sums of the pieces give each its factor. Pieces have sums of values of their own, which are
// added up in order: any number of threads gives the same bits.

#include <algorithm>
#include <cmath>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/exp2.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/detail/row_softmax.hpp"
#include "diffattn/kernels/detail/score_scale.hpp"
#include "diffattn/kernels/detail/visible_pairs.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

/// The rows of one call: queries, weights and sums, and what each row sees. A row is a query of one of the query heads
/// that share a key head, numbered head by head.
template <typename Scalar, Index kMaps, typename Mask>
struct FewRowsState {
  static constexpr Index kPiece = 256;  // keys in a piece
  // Rows of weights a power of two apart would fall on the same few lines of the nearest cache.
  static constexpr Index kWeightStride = kPiece + 16;
  static constexpr Index kCols = Tile<Scalar>::kCols;

  const HeadOperands<Scalar, kMaps>& in;
  const Mask& mask;
  Index n_q;
  Index n_k;
  Index rows;    // that share a key head
  Index width;   // of a row of sums, whole strips
  Index first;   // the first piece that some row sees
  Index pieces;  // from there on
  Scalar* queries;
  Scalar* all_weights;
  Scalar* all_sums;

  Index query(Index row) const { return row % n_q; }
  Index query_head(Index head, Index row) const { return head * (rows / n_q) + row / n_q; }
  Index slot(Index piece, Index head) const { return piece * in.heads.num_kv_heads + head; }
  Index index(Index piece, Index head, Index map, Index row) const {
    return (slot(piece, head) * kMaps + map) * rows + row;
  }

  /// [head][map][row][d], multiplied by scale.of_queries.
  Scalar* q(Index head, Index map) const { return queries + (head * kMaps + map) * rows * in.d; }
  /// [piece][head][map][row][kWeightStride].
  Scalar* weights(Index piece, Index head, Index map, Index row) const {
    return all_weights + index(piece, head, map, row) * kWeightStride;
  }
  /// [piece][head][row][width].
  Scalar* sums(Index piece, Index head, Index row) const { return all_sums + (slot(piece, head) * rows + row) * width; }

  /// The first key of a piece, to which its columns are relative.
  Index first_key(Index piece) const { return (first + piece) * kPiece; }
  /// Columns of a piece that a query sees.
  KeyRange columns_of(Index piece, Index query) const {
    const KeyRange keys = mask.visible_keys(query, n_q, n_k);
    const Index begin = std::clamp<Index>(keys.begin - first_key(piece), 0, kPiece);
    return {begin, std::clamp(keys.end - first_key(piece), begin, kPiece)};
  }
  /// Columns that some query sees: neither end of a mask's ranges decreases from query to query.
  KeyRange columns_of_any(Index piece) const {
    const Index begin = columns_of(piece, 0).begin;
    return {begin, std::max(begin, columns_of(piece, n_q - 1).end)};
  }
  /// The same, widened to whole strips.
  KeyRange strips_of_any(Index piece) const {
    const KeyRange columns = columns_of_any(piece);
    return {columns.begin / kCols * kCols, round_up(columns.end, kCols)};
  }
};

/// `Source` knows where keys and values are:
///   heads_of_task(heads, maps)           how many of the heads make a task
///   score(state, piece, heads)           weights(…, map, row)[c] = q · k for the columns that some row sees
///   add_values(state, piece, heads)      sums(…, row) = Σ_c weights(…, 0, row)[c] · v over what each row sees
template <typename Scalar, Index kMaps, typename Mask, typename Source>
class FewRows {
  using State = FewRowsState<Scalar, kMaps, Mask>;
  static constexpr Index kLanes = simd::kLanes<Scalar>;

 public:
  template <Executor E>
  static void run(const HeadOperands<Scalar, kMaps>& in, const Source& source, Index n_k, const Mask& mask,
                  Workspace& workspace, E& executor) {
    const auto frame = workspace.frame();
    FewRows few(in, source, n_k, mask, workspace);
    const Index heads = in.heads.num_kv_heads, rows = few.state_.rows;
    const Index together = std::min(heads, Source::heads_of_task(heads, kMaps)), splits = divide_up(heads, together);
    const auto for_each_part = [&](auto&& f) {
      executor.run(few.state_.pieces * splits, [&](Index task, Index /*worker*/) {
        const Index head = task % splits * together;
        f(task / splits, KeyRange{head, std::min(heads, head + together)});
      });
    };
    for (Index head = 0; head < heads; ++head) few.pack_queries(head);
    for_each_part([&](Index piece, const KeyRange& part) { few.score(piece, part); });
    executor.run(heads * rows, [&](Index task, Index /*worker*/) { few.set_factors(task / rows, task % rows); });
    for_each_part([&](Index piece, const KeyRange& part) { few.add_values(piece, part); });
    for (Index head = 0; head < heads; ++head) few.write(head);
  }

 private:
  FewRows(const HeadOperands<Scalar, kMaps>& in, const Source& source, Index n_k, const Mask& mask,
          Workspace& workspace)
      : source_(source),
        scale_(split_scale<Mask>(in.scale)),
        exp2_(scale_.of_exponent),
        state_{in, mask, in.q[0].rows, n_k, 0, 0, 0, 0, nullptr, nullptr, nullptr} {
    State& s = state_;
    s.rows = s.n_q * (in.heads.num_heads / in.heads.num_kv_heads);
    s.width = round_up(in.dv, State::kCols);
    s.first = mask.visible_keys(0, s.n_q, n_k).begin / State::kPiece;
    s.pieces = std::max<Index>(divide_up(mask.visible_keys(s.n_q - 1, s.n_q, n_k).end, State::kPiece) - s.first, 0);
    const Index heads = in.heads.num_kv_heads, slots = s.pieces * heads;
    s.queries = workspace.take<Scalar>(heads * kMaps * s.rows * in.d);
    s.all_weights = workspace.take<Scalar>(slots * kMaps * s.rows * State::kWeightStride);
    s.all_sums = workspace.take<Scalar>(slots * s.rows * s.width);
    max_ = workspace.take<Scalar>(slots * kMaps * s.rows);
    weight_sum_ = workspace.take<Scalar>(slots * kMaps * s.rows);
  }

  void pack_queries(Index head) {
    const State& s = state_;
    for (Index map = 0; map < kMaps; ++map) {
      const Index step = s.in.q[map].col_stride;
      for (Index row = 0; row < s.rows; ++row) {
        const Scalar* const from = &s.in.q[map](s.query(row), s.query_head(head, row) * s.in.q_step);
        Scalar* const to = s.q(head, map) + row * s.in.d;
        for (Index c = 0; c < s.in.d; ++c) to[c] = from[c * step] * scale_.of_queries;
      }
    }
  }

  void score(Index piece, const KeyRange& heads) {
    const State& s = state_;
    source_.score(s, piece, heads);
    const KeyRange columns = s.strips_of_any(piece);
    for (Index head = heads.begin; head < heads.end; ++head) {
      for (Index map = 0; map < kMaps; ++map) {
        for (Index row = 0; row < s.rows; ++row) {
          Scalar* const scores = s.weights(piece, head, map, row);
          mask_scores(scores, s.query_head(head, row), s.query(row), s.columns_of(piece, s.query(row)), columns,
                      s.first_key(piece));
          const Index at = s.index(piece, head, map, row);
          exponentiate(scores, columns, max_[at], weight_sum_[at]);
        }
      }
    }
  }

  void mask_scores(Scalar* scores, Index query_head, Index query, const KeyRange& seen, const KeyRange& columns,
                   Index first_key) const {
    const Index begin = std::clamp(seen.begin, columns.begin, columns.end);
    const Index end = std::clamp(seen.end, begin, columns.end);
    fill_unseen(scores, columns, {begin, end}, kMinusInfinity<Scalar>);
    if constexpr (HasBias<Mask>) {
      for (Index c = begin; c < end; ++c) {
        const auto bias = bias_of<Scalar>(state_.mask, query_head, query, first_key + c, state_.n_q, state_.n_k);
        scores[c] = biased_score(scores[c], scale_, bias);
      }
    }
  }

  /// 2^(c·(score − max)) in place.
  void exponentiate(Scalar* scores, const KeyRange& columns, Scalar& max, Scalar& sum) const {
    auto packet_max = simd::broadcast(kMinusInfinity<Scalar>);
    for (Index c = columns.begin; c < columns.end; c += kLanes) {
      packet_max = simd::max(simd::load(scores + c), packet_max);
    }
    max = simd::reduce_max(packet_max);
    const auto base = simd::broadcast(finite_or_zero(max));
    auto packet_sum = simd::broadcast(Scalar(0));
    for (Index c = columns.begin; c < columns.end; c += kLanes) {
      const auto weight = exp2_(simd::sub(simd::load(scores + c), base));
      simd::store(scores + c, weight);
      packet_sum = simd::add(packet_sum, weight);
    }
    sum = simd::reduce_add(packet_sum);
  }

  /// What turns the weights of each piece into probabilities, 2^(c·(m_piece − m))/l, times −λ for the second map, takes
  /// the place of the piece's maximum.
  void set_factors(Index head, Index row) {
    const State& s = state_;
    const Index query = s.query(row), query_head = s.query_head(head, row);
    for (Index map = 0; map < kMaps; ++map) {
      Scalar max = kMinusInfinity<Scalar>, sum = 0;
      for (Index piece = 0; piece < s.pieces; ++piece) max = std::max(max, max_[s.index(piece, head, map, row)]);
      const Scalar base = finite_or_zero(max);
      for (Index piece = 0; piece < s.pieces; ++piece) {
        const Index at = s.index(piece, head, map, row);
        max_[at] = simd::first(exp2_(simd::broadcast(max_[at] - base)));
        sum += max_[at] * weight_sum_[at];
      }
      if (s.in.lse[map].data != nullptr) s.in.lse[map](query, query_head) = scale_.of_exponent * max + std::log2(sum);
      const Scalar sign = map == 0 ? Scalar(1) : -s.in.lambda(query, query_head);
      const Scalar factor = sum == Scalar(0) ? Scalar(0) : sign / sum;
      for (Index piece = 0; piece < s.pieces; ++piece) max_[s.index(piece, head, map, row)] *= factor;
    }
  }

  /// Combines the weights of both maps, in the place of the first, and multiplies by V.
  void add_values(Index piece, const KeyRange& heads) {
    const State& s = state_;
    const KeyRange columns = s.strips_of_any(piece);
    for (Index head = heads.begin; head < heads.end; ++head) {
      for (Index row = 0; row < s.rows; ++row) {
        Scalar* const p1 = s.weights(piece, head, 0, row);
        const Scalar* const p2 = s.weights(piece, head, kMaps - 1, row);
        const auto f1 = simd::broadcast(max_[s.index(piece, head, 0, row)]);
        const auto f2 = simd::broadcast(max_[s.index(piece, head, kMaps - 1, row)]);
        for (Index c = columns.begin; c < columns.end; c += kLanes) {
          auto weight = simd::mul(simd::load(p1 + c), f1);
          if constexpr (kMaps == 2) weight = simd::fma(simd::load(p2 + c), f2, weight);
          simd::store(p1 + c, weight);
        }
      }
    }
    source_.add_values(s, piece, heads);
  }

  void write(Index head) {
    const State& s = state_;
    for (Index row = 0; row < s.rows; ++row) {
      const auto out = s.in.out.block(s.query(row), s.query_head(head, row) * s.in.dv, 1, s.in.dv);
      for (Index c = 0; c < s.in.dv; ++c) out(0, c) = s.pieces == 0 ? Scalar(0) : s.sums(0, head, row)[c];
      for (Index piece = 1; piece < s.pieces; ++piece) {
        const Scalar* const sums = s.sums(piece, head, row);
        for (Index c = 0; c < s.in.dv; ++c) out(0, c) += sums[c];
      }
    }
  }

  const Source& source_;
  ScoreScale<Scalar> scale_;
  ScaledExp2<Scalar> exp2_;
  State state_;
  Scalar* max_;         // of every piece, head, map and row; then the factor of its weights
  Scalar* weight_sum_;  // likewise
};

}  // namespace diffattn::inline v0_1::detail
