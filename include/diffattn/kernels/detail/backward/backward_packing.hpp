#pragma once

// Keys and values of a wave of key heads, packed as the backward pass reads them: keys as strips for the scores and as
// columns for dQ, values as strips for dA.

#include <algorithm>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward/backward_operands.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/product/packed.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar>
bool all_finite(const StridedView<const Scalar>& view) {
  constexpr Index kLanes = simd::kLanes<Scalar>;
  auto not_finite = simd::broadcast(Scalar(0));  // x · 0 is 0, or NaN
  Scalar last_not_finite = 0;
  for (Index i = 0; i < view.rows; ++i) {
    Index j = 0;
    for (; view.col_stride == 1 && j + kLanes <= view.cols; j += kLanes) {
      not_finite = simd::fma(simd::loadu(&view(i, j)), simd::broadcast(Scalar(0)), not_finite);
    }
    for (; j < view.cols; ++j) last_not_finite += view(i, j) * Scalar(0);
  }
  return simd::reduce_add(not_finite) + last_not_finite == Scalar(0);
}

/// The packed copies of a wave of key heads, one wave after the other in the same memory.
template <typename Scalar, Index kMaps>
class BackwardPacking {
 public:
  using Operands = HeadOperands<Scalar, kMaps>;
  using Head = BackwardHead<Scalar, kMaps>;

  /// Takes memory for `wave` key heads.
  BackwardPacking(const Operands& in, Index wave, Workspace& workspace)
      : in_(in),
        key_maps_(in.shared_keys() ? 1 : kMaps),
        pieces_(divide_up(in.n_k(), kPieceKeys)),
        keys_size_(packed_strips_size<Scalar>(in.n_k(), in.d)),
        columns_size_(packed_strips_size<Scalar>(in.d, in.n_k())),
        values_size_(packed_strips_size<Scalar>(in.n_k(), in.dv)),
        heads_(workspace.take<Head>(wave)),
        finite_(workspace.take<bool>(wave * pieces_)),
        keys_(workspace.take<Scalar>(wave * key_maps_ * keys_size_)),
        key_columns_(workspace.take<Scalar>(wave * key_maps_ * columns_size_)),
        values_(workspace.take<Scalar>(wave * values_size_)) {}

  /// A head of these sizes, packed nowhere.
  Head shape() const {
    Head head;
    head.n_k = in_.n_k();
    head.d = in_.d;
    head.dv = in_.dv;
    return head;
  }

  /// Packs key heads [first, first + count).
  template <typename E>
  void pack(Index first, Index count, E& executor) {
    executor.run(count * pieces_, [&](Index task, Index /*worker*/) {
      const Index i = task / pieces_, row = task % pieces_ * kPieceKeys;
      finite_[task] = pack_piece(i, first + i, row, std::min(kPieceKeys, in_.n_k() - row));
    });
    for (Index i = 0; i < count; ++i) {
      heads_[i] = shape();
      for (Index map = 0; map < kMaps; ++map) {
        const Index packed = i * key_maps_ + std::min(map, key_maps_ - 1);
        heads_[i].keys[map] = keys_ + packed * keys_size_;
        heads_[i].key_columns[map] = key_columns_ + packed * columns_size_;
      }
      heads_[i].values = values_ + i * values_size_;
      heads_[i].finite = std::all_of(finite_ + i * pieces_, finite_ + (i + 1) * pieces_, [](bool yes) { return yes; });
    }
  }

  /// The i-th of the heads that were packed last.
  const Head& operator[](Index i) const { return heads_[i]; }

 private:
  /// Packs `count` keys of a key head from `row` on, as the i-th of the wave. Returns whether all that was read is
  /// finite.
  bool pack_piece(Index i, Index head, Index row, Index count) const {
    bool finite = true;
    for (Index map = 0; map < key_maps_; ++map) {
      const Index packed = i * key_maps_ + map;
      const StridedView<const Scalar> keys = in_.keys(map, head);
      pack_transposed(keys_ + packed * keys_size_, keys, row, count);
      finite &= pack_columns(key_columns_ + packed * columns_size_ + row * Tile<Scalar>::kCols, in_.n_k(),
                             keys.middle_rows(row, count), true);
    }
    const StridedView<const Scalar> values = in_.values(head);
    pack_transposed(values_ + i * values_size_, values, row, count);
    return finite && all_finite(values.middle_rows(row, count));
  }

  const Operands& in_;
  Index key_maps_;      // packed for each head
  Index pieces_;        // in a head
  Index keys_size_;     // of one head and map
  Index columns_size_;  // likewise
  Index values_size_;   // of one head
  Head* heads_;
  bool* finite_;         // of every head and piece
  Scalar* keys_;         // [head][map][strip of n_k][d][kCols]
  Scalar* key_columns_;  // [head][map][strip of d][n_k][kCols]
  Scalar* values_;       // [head][strip of n_k][dv][kCols]
};

}  // namespace diffattn::inline v0_1::detail
