#pragma once

// Attention for a few query rows: decoding, and small problems. Reading keys and values is all the time there is, so
// each of them is read once and in the order of memory, wherever it is: in place (few_rows_in_place.hpp) or packed in
// the pages of a cache (few_rows_packed.hpp). Scores of all keys are kept, both softmaxes are finished, and V meets the
// combined weights in a single pass, where two standard calls would read it twice.
//
// Keys are taken in chunks. A chunk turns its scores into weights relative to its own largest score; once all are done,
// largest scores and sums of the chunks give each its factor. Chunks have sums of values of their own, which are added
// up in order: any number of threads gives the same bits.

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <span>
#include <type_traits>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/detail/exp2.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/detail/scores.hpp"
#include "diffattn/kernels/detail/softmax.hpp"
#include "diffattn/kernels/detail/visible_pairs.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/product/packed.hpp"

namespace diffattn::inline v0_1::detail {

/// The rows of one call: queries, weights and sums, and what each row sees. A row is a query of one of the sharers of a
/// key head, numbered sharer by sharer. Heads that share their second map have one row of it together.
template <typename Operands, typename Mask>
struct FewRowsState {
  using Scalar = typename Operands::Scalar;
  static constexpr Index kMaps = Operands::kMaps;
  // Rows of weights a power of two apart would fall on the same few lines of the nearest cache.
  static constexpr Index kWeightStride = kChunk + 16;
  static constexpr Index kCols = Tile<Scalar>::kCols;

  const Operands& in;
  const Mask& mask;
  Index n_q;
  Index n_k;
  Index heads_of_noise;  // heads that have a row of the second map together
  Index rows;            // of each key head
  Index noise_rows;      // of the second map, likewise
  Index all_rows;        // of all maps: those of the first, then those of the second
  Index width;           // of a row of sums, whole strips
  Index first;           // the first chunk that some row sees
  Index chunks;          // from there on
  Index slots;           // of a chunk and a key head, as many as there is memory for
  Scalar* queries;
  Scalar* all_weights;
  Scalar* all_sums;

  /// room: keys that memory is taken for, where there are fewer.
  FewRowsState(const Operands& operands, Index num_keys, Index room, const Mask& visible, Workspace& workspace)
      : in(operands), mask(visible), n_q(in.n_q()), n_k(num_keys) {
    heads_of_noise = heads_with_one_noise_map(in, mask, n_q);
    rows = n_q * in.heads_per_kv_head();
    noise_rows = rows / heads_of_noise;
    all_rows = kMaps == 1 ? rows : rows + noise_rows;
    width = round_up(in.dv, kCols);
    first = mask.visible_keys(0, n_q, n_k).begin / kChunk;
    chunks = std::max<Index>(divide_up(mask.visible_keys(n_q - 1, n_q, n_k).end, kChunk) - first, 0);
    slots = std::max(chunks, divide_up(room, kChunk)) * in.heads.num_kv_heads;
    queries = workspace.take<Scalar>(in.heads.num_kv_heads * all_rows * in.d);
    all_weights = workspace.take<Scalar>(slots * all_rows * kWeightStride);
    all_sums = workspace.take<Scalar>(slots * rows * width);
  }

  Index rows_of(Index map) const { return map == 0 ? rows : noise_rows; }
  /// The row of a map that a row, one of the first map, goes with.
  Index row_of(Index map, Index row) const {
    return map == 0 || heads_of_noise == 1 ? row : row / (n_q * heads_of_noise) * n_q + query(row);
  }
  Index query(Index row) const { return row % n_q; }
  /// The query head of a row of a map, or the first of those that share it.
  Index query_head(Index head, Index row, Index map = 0) const {
    return head * in.heads_per_kv_head() + row / n_q * (map == 0 ? 1 : heads_of_noise);
  }
  /// All queries of a query head, with what they see.
  RowRange<Mask> queries_of(Index head) const { return {mask, head, 0, n_q, n_q, n_k}; }
  Index slot(Index chunk, Index head) const { return chunk * in.heads.num_kv_heads + head; }
  Index index(Index chunk, Index head, Index map, Index row) const {
    return slot(chunk, head) * all_rows + map * rows + row;
  }

  /// How many indices there is memory for.
  Index size() const { return slots * all_rows; }

  /// [head][map][row][d], multiplied by scale.of_queries.
  Scalar* q(Index head, Index map) const { return queries + (head * all_rows + map * rows) * in.d; }
  /// [chunk][head][map][row][kWeightStride].
  Scalar* weights(Index chunk, Index head, Index map, Index row) const {
    return all_weights + index(chunk, head, map, row) * kWeightStride;
  }
  /// [chunk][head][row][width].
  Scalar* sums(Index chunk, Index head, Index row) const { return all_sums + (slot(chunk, head) * rows + row) * width; }

  /// The first key of a chunk, to which its columns are relative.
  Index first_key(Index chunk) const { return (first + chunk) * kChunk; }
  /// Columns of a chunk that a query sees.
  KeyRange columns_of(Index chunk, Index query) const {
    const KeyRange keys = mask.visible_keys(query, n_q, n_k);
    const Index begin = std::clamp<Index>(keys.begin - first_key(chunk), 0, kChunk);
    return {begin, std::clamp(keys.end - first_key(chunk), begin, kChunk)};
  }
  /// Columns that some query sees: neither end of a mask's ranges decreases from query to query.
  KeyRange columns_of_any(Index chunk) const {
    const Index begin = columns_of(chunk, 0).begin;
    return {begin, std::max(begin, columns_of(chunk, n_q - 1).end)};
  }
  /// The same, widened to whole strips.
  KeyRange strips_of_any(Index chunk) const {
    const KeyRange columns = columns_of_any(chunk);
    return {columns.begin / kCols * kCols, round_up(columns.end, kCols)};
  }
};

/// `Source` knows where keys and values are:
///   heads_of_task(heads, maps)           how many of the heads make a task
///   room()                               keys to take memory for, where there are fewer
///   score(state, chunk, heads)           weights(…, map, row)[c] = q · k for the columns that some row sees
///   add_values(state, chunk, heads)      sums(…, row) = Σ_c weights(…, 0, row)[c] · v over what each row sees
template <typename Operands, typename Mask, typename Source>
class FewRows {
  using State = FewRowsState<Operands, Mask>;
  using Scalar = typename Operands::Scalar;
  static constexpr Index kMaps = Operands::kMaps;

 public:
  /// Keeps references to all but the workspace.
  FewRows(const Operands& in, const Source& source, Index n_k, const Mask& mask, Workspace& workspace)
      : source_(source),
        scale_(split_scale<Mask>(in.scale)),
        exp2_(scale_.of_exponent),
        state_(in, n_k, source.room(), mask, workspace),
        base_(workspace.take<Scalar>(state_.size())),
        weight_sum_(workspace.take<Scalar>(state_.size())),
        factor_(workspace.take<Scalar>(state_.slots * kMaps * state_.rows)) {}

  /// Attention of all heads; n_k is told apart from `in`, which has no keys when they are in pages. exchange, if it is
  /// no nullptr, is called once all statistics of `in` have been handed out, and gives it others.
  template <Executor E, typename Exchange = std::nullptr_t>
  static void run(const Operands& in, const Source& source, Index n_k, const Mask& mask, Workspace& workspace,
                  E& executor, const Exchange& exchange = nullptr) {
    const auto frame = workspace.frame();
    FewRows call(in, source, n_k, mask, workspace);
    run(std::span<FewRows>(&call, 1), executor, exchange);
  }

  /// Several calls, whose parts are shared out together.
  template <Executor E, typename Exchange = std::nullptr_t>
  static void run(std::span<FewRows> calls, E& executor, const Exchange& exchange = nullptr) {
    Index parts = 0, rows = 0;
    for (FewRows& call : calls) {
      call.first_part_ = parts;
      call.first_row_ = rows;
      parts += call.state_.chunks * call.splits();
      rows += call.heads() * call.state_.rows;
    }
    // Which of the calls a task belongs to: the last that begins with it or before.
    const auto call_of = [&](Index task, Index FewRows::*first) -> FewRows& {
      const auto begins_behind = [&](Index t, const FewRows& call) { return t < call.*first; };
      return *std::prev(std::upper_bound(calls.begin(), calls.end(), task, begins_behind));
    };
    const auto for_each_call = [&](auto&& f) {
      if (calls.size() == 1) return f(calls[0]);
      executor.run(static_cast<Index>(calls.size()),
                   [&](Index task, Index /*worker*/) { f(calls[static_cast<std::size_t>(task)]); });
    };
    const auto for_each_part = [&](auto&& f) {
      executor.run(parts, [&](Index task, Index /*worker*/) {
        FewRows& call = call_of(task, &FewRows::first_part_);
        const Index part = task - call.first_part_, head = part % call.splits() * call.together();
        f(call, part / call.splits(), KeyRange{head, std::min(call.heads(), head + call.together())});
      });
    };
    for_each_call([](FewRows& call) {
      for (Index head = 0; head < call.heads(); ++head) call.pack_queries(head);
    });
    for_each_part([](FewRows& call, Index chunk, const KeyRange& heads) { call.score(chunk, heads); });
    const auto set_all_factors = [&] {
      executor.run(rows, [&](Index task, Index /*worker*/) {
        FewRows& call = call_of(task, &FewRows::first_row_);
        call.set_factors((task - call.first_row_) / call.state_.rows, (task - call.first_row_) % call.state_.rows);
      });
    };
    set_all_factors();
    if constexpr (!std::is_null_pointer_v<Exchange>) {
      exchange();
      set_all_factors();
    }
    for_each_part([](FewRows& call, Index chunk, const KeyRange& heads) { call.add_values(chunk, heads); });
    for_each_call([](FewRows& call) {
      for (Index head = 0; head < call.heads(); ++head) call.write(head);
    });
  }

 private:
  Index heads() const { return state_.in.heads.num_kv_heads; }
  /// Heads that make a task, and how many tasks they are for each chunk.
  Index together() const { return std::min(heads(), Source::heads_of_task(heads(), kMaps)); }
  Index splits() const { return divide_up(heads(), together()); }

  void pack_queries(Index head) {
    const State& s = state_;
    for (Index map = 0; map < kMaps; ++map) {
      for (Index row = 0; row < s.rows_of(map); row += s.n_q) {
        copy_rows(s.q(head, map) + row * s.in.d, s.in.queries(map, s.query_head(head, row, map)), scale_.of_queries);
      }
    }
  }

  void score(Index chunk, const KeyRange& heads) {
    const State& s = state_;
    source_.score(s, chunk, heads);
    const KeyRange columns = s.strips_of_any(chunk);
    for (Index head = heads.begin; head < heads.end; ++head) {
      for (Index map = 0; map < kMaps; ++map) {
        for (Index row = 0; row < s.rows_of(map); row += s.n_q) {
          finish_scores(s.weights(chunk, head, map, row), s.kWeightStride, s.queries_of(s.query_head(head, row, map)),
                        s.first_key(chunk), columns, scale_);
        }
        for (Index row = 0; row < s.rows_of(map); ++row) {
          const Index at = s.index(chunk, head, map, row);
          Scalar* const scores = s.weights(chunk, head, map, row);
          const auto [base, sum] = exponentiate_row(scores, columns.begin, columns.end, exp2_);
          base_[at] = base;
          weight_sum_[at] = sum;
        }
      }
    }
  }

  /// What turns the weights of each chunk into probabilities, 2^(c·(its base − the largest))/l, times −λ for the second
  /// map.
  void set_factors(Index head, Index row) {
    const State& s = state_;
    const Index query = s.query(row), query_head = s.query_head(head, row);
    for (Index map = 0; map < kMaps; ++map) {
      const Index map_row = s.row_of(map, row);
      BaseAndSum<Scalar> all{kNoBase<Scalar>, 0};
      for (Index chunk = 0; chunk < s.chunks; ++chunk) {
        all.base = std::max(all.base, base_[s.index(chunk, head, map, map_row)]);
      }
      for (Index chunk = 0; chunk < s.chunks; ++chunk) {
        const Index at = s.index(chunk, head, map, map_row);
        const Scalar relative = simd::first(exp2_(simd::broadcast(base_[at] - all.base)));
        factor(chunk, head, map, row) = relative;
        all.sum += relative * weight_sum_[at];
      }
      const Scalar total = s.in.statistics[map].total(query, query_head, all, scale_);
      const Scalar of_row = normaliser(total, map == 0 ? Scalar(1) : -s.in.lambda(query, query_head));
      for (Index chunk = 0; chunk < s.chunks; ++chunk) factor(chunk, head, map, row) *= of_row;
    }
  }

  Scalar& factor(Index chunk, Index head, Index map, Index row) {
    return factor_[(state_.slot(chunk, head) * kMaps + map) * state_.rows + row];
  }

  /// Combines the weights of both maps, in the place of the first, and multiplies by V.
  void add_values(Index chunk, const KeyRange& heads) {
    const State& s = state_;
    const KeyRange columns = s.strips_of_any(chunk);
    for (Index head = heads.begin; head < heads.end; ++head) {
      for (Index row = 0; row < s.rows; ++row) {
        Scalar* const p1 = s.weights(chunk, head, 0, row);
        const Scalar f1 = factor(chunk, head, 0, row);
        if constexpr (kMaps == 1) {
          scale_row(p1, columns.begin, columns.end, f1);
        } else {
          const Scalar f2 = factor(chunk, head, 1, row);
          combine_maps(p1, s.weights(chunk, head, 1, s.row_of(1, row)), f2, p1, f1, columns.begin, columns.end);
        }
        if constexpr (is_narrow<typename Operands::Element>) round_weights(p1, p1, columns.begin, columns.end);
      }
    }
    source_.add_values(s, chunk, heads);
  }

  /// Adds up the sums of the chunks.
  void write(Index head) {
    const State& s = state_;
    for (Index row = 0; row < s.rows; ++row) {
      const auto out = s.in.result(s.query_head(head, row)).middle_rows(s.query(row), 1);
      Scalar* const all = s.sums(0, head, row);
      for (Index chunk = 1; chunk < s.chunks; ++chunk) {
        const Scalar* const sums = s.sums(chunk, head, row);
        for (Index c = 0; c < s.in.dv; ++c) all[c] += sums[c];
      }
      for (Index c = 0; c < s.in.dv; ++c) out(0, c) = typename Operands::Result(s.chunks == 0 ? Scalar(0) : all[c]);
    }
  }

  const Source& source_;
  ScoreScale<Scalar> scale_;
  ScaledExp2<Scalar> exp2_;
  State state_;
  Scalar* base_;        // of every chunk, head, map and row of it: what its weights are relative to
  Scalar* weight_sum_;  // likewise
  Scalar* factor_;      // [chunk][head][map][row]: what makes probabilities of them, for every row of the first map
  Index first_part_ = 0, first_row_ = 0;  // among those of several calls
};

}  // namespace diffattn::inline v0_1::detail
