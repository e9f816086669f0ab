#pragma once

// The gradient of a learned bias: what the scores of each pair have, added up by the columns of its table. Each task
// adds to sums of its own, as for dK and dV, which are then added in order.

#include <algorithm>

#include "diffattn/core/simd.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/detail/visible_pairs.hpp"
#include "diffattn/kernels/learned_bias.hpp"

namespace diffattn::inline v0_1::detail {

/// to[i] = the sum of kMaps rows, in double.
template <Index kMaps, typename Scalar>
void sum_maps(double* to, const Scalar* (&maps)[kMaps], Index begin, Index count) {
  constexpr Index kLanes = simd::kLanes<double>;
  Index i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    auto sum = simd::load_as<double>(maps[0] + begin + i);
    for (Index map = 1; map < kMaps; ++map) sum = simd::add(sum, simd::load_as<double>(maps[map] + begin + i));
    simd::storeu(to + i, sum);
  }
  for (; i < count; ++i) {
    to[i] = maps[0][begin + i];
    for (Index map = 1; map < kMaps; ++map) to[i] += maps[map][begin + i];
  }
}

/// dtable, a row of the table's gradient, += dS of all maps in the columns of a chunk that `rows` see. dscores: of each
/// map, rows `stride` apart. Where they are not all finite, `finite` is false: only what a bias shows counts then.
template <Index kMaps, typename Scalar, typename Mask>
void add_bias_gradients(double* dtable, const Scalar* (&dscores)[kMaps], Index stride, const RowRange<Mask>& rows,
                        Index first_key, const KeyRange& columns, bool finite) {
  double sums[kChunk];
  for_each_row(rows, first_key, columns, [&](Index r, const KeyRange& seen) {
    const Index query = rows.first + r;
    const Scalar* of_row[kMaps];
    for (Index map = 0; map < kMaps; ++map) of_row[map] = dscores[map] + r * stride;
    sum_maps(sums, of_row, seen.begin, seen.end - seen.begin);
    for (Index c = seen.begin; !finite && c < seen.end; ++c) {
      if (!bias_shows(rows.mask, rows.head, query, first_key + c, rows.n_q, rows.n_k)) sums[c - seen.begin] = 0;
    }
    const BiasRow of{rows.head, query, first_key + seen.begin, seen.end - seen.begin, rows.n_q, rows.n_k};
    rows.mask.learned_bias().add_gradient(dtable, sums, of);
  });
}

/// Where one task adds the gradients of a key head's sharers.
struct HeadBiasSums {
  double* sums;  // [sharer][column]; null: not wanted
  Index sharers;
  Index columns;

  /// Those of a query head.
  double* row(Index head) const { return sums + head % sharers * columns; }
};

/// What the gradient adds up in: the rows of a key head's sharers, for each task that runs at a time.
template <typename Scalar>
class BiasGradientSums {
 public:
  /// to: where the gradient goes, a row for each query head. No data: it is not wanted.
  BiasGradientSums(const StridedView<Scalar>& to, Index heads_per_kv_head, Index slots, Workspace& workspace)
      : to_(to), sharers_(heads_per_kv_head), sums_(wanted() ? workspace.take<double>(slots * size()) : nullptr) {}

  bool wanted() const { return to_.data != nullptr; }

  void clear(Index slot) const {
    if (wanted()) std::fill_n(sums_ + slot * size(), size(), 0.0);
  }

  HeadBiasSums operator[](Index slot) const { return {wanted() ? sums_ + slot * size() : nullptr, sharers_, to_.cols}; }

  /// Writes what a task has added up to the rows of a key head's sharers, or adds it to them.
  void write(Index slot, Index kv_head, bool add) const {
    for (Index i = 0; wanted() && i < size(); ++i) {
      const Scalar sum = static_cast<Scalar>(sums_[slot * size() + i]);
      Scalar& entry = to_(kv_head * sharers_ + i / to_.cols, i % to_.cols);
      entry = add ? entry + sum : sum;
    }
  }

 private:
  Index size() const { return sharers_ * to_.cols; }  // of one slot

  StridedView<Scalar> to_;
  Index sharers_;
  double* sums_;  // [slot][sharer][column]
};

}  // namespace diffattn::inline v0_1::detail
