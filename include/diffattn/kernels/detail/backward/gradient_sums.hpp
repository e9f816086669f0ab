#pragma once

// What dK and dV add up in: sums for each task that runs at a time, cleared where its part sees keys, and written to
// the gradients once the part is done.

#include <algorithm>

#include "diffattn/core/simd.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward/backward_operands.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/product/packed.hpp"

namespace diffattn::inline v0_1::detail {

/// to = sums · factor, or += : rows [first, first + count) of a gradient. Rows that come next are fetched on the way.
template <typename Scalar>
void write_sums(const StridedView<Scalar>& to, const Scalar* sums, Index padded_keys, Index first, Index count,
                Scalar factor, bool add) {
  constexpr Index kCols = Tile<Scalar>::kCols, kLanes = Tile<Scalar>::kLanes, kAhead = 16;
  const auto factors = simd::broadcast(factor);
  for (Index key = first; key < first + count; ++key) {
    for (Index col = 0; col < to.cols; col += kCols) {
      const Index present = std::min(kCols, to.cols - col);
      Scalar* const row = &to(key, col);
      const Scalar* const from = sums + col * padded_keys + key * kCols;
      Index c = 0;
      for (; to.col_stride == 1 && c + kLanes <= present; c += kLanes) {
        const auto product = simd::mul(simd::load(from + c), factors);
        simd::prefetch(from + c, kAhead * kCols);
        simd::prefetch(row + c, kAhead * to.row_stride);
        simd::storeu(row + c, add ? simd::add(simd::loadu(row + c), product) : product);
      }
      for (; c < present; ++c) {
        const Scalar product = from[c] * factor;
        Scalar& element = row[c * to.col_stride];
        element = add ? element + product : product;
      }
    }
  }
}

template <typename Scalar, Index kMaps>
class GradientSums {
  static constexpr Index kCols = Tile<Scalar>::kCols;

 public:
  using Operands = HeadOperands<Scalar, kMaps>;
  using Gradients = HeadGradients<Scalar, kMaps>;

  /// Takes memory for `slots` tasks at a time.
  GradientSums(const Operands& in, const Gradients& grad, Index slots, Workspace& workspace)
      : grad_(grad),
        scale_(in.scale),
        padded_keys_(round_up(in.n_k(), kCols)),
        dk_maps_(grad.shared_keys() ? 1 : kMaps),
        dk_size_(packed_strips_size<Scalar>(in.d, padded_keys_)),
        size_(dk_maps_ * dk_size_ + packed_strips_size<Scalar>(in.dv, padded_keys_)),
        sums_(workspace.take<Scalar>(slots * size_)) {}

  KeyValueSums<Scalar, kMaps> operator[](Index slot) const {
    KeyValueSums<Scalar, kMaps> result;
    for (Index map = 0; map < kMaps; ++map) {
      result.dk[map] = sums_ + slot * size_ + std::min(map, dk_maps_ - 1) * dk_size_;
    }
    result.dv = sums_ + slot * size_ + dk_maps_ * dk_size_;
    result.padded_keys = padded_keys_;
    return result;
  }

  /// 0 for all that a part which sees `keys` will touch.
  void clear(Index slot, const KeyRange& keys) const {
    // Whole chunks, since tiles at the end of what a block sees reach further.
    const Index first = keys.begin / kChunk * kChunk * kCols;
    const Index last = std::min(round_up(keys.end, kChunk), padded_keys_) * kCols;
    for (Scalar* strip = sums_ + slot * size_; strip < sums_ + (slot + 1) * size_; strip += padded_keys_ * kCols) {
      std::fill(strip + first, strip + last, Scalar(0));
    }
  }

  /// Writes rows [row, row + count) of the gradients of a key head, or adds to them, from a part that sees `seen`.
  void write(Index slot, Index head, Index row, Index count, const KeyRange& seen, bool add) const {
    const KeyValueSums<Scalar, kMaps> from = (*this)[slot];
    const Index begin = std::clamp(seen.begin, row, row + count), end = std::clamp(seen.end, begin, row + count);
    const auto write_one = [&](const StridedView<Scalar>& to, const Scalar* sums, Scalar factor) {
      write_sums(to, sums, padded_keys_, begin, end - begin, factor, add);
      if (add) return;
      write_constant(to.middle_rows(row, begin - row), Scalar(0));
      write_constant(to.middle_rows(end, row + count - end), Scalar(0));
    };
    for (Index map = 0; map < dk_maps_; ++map) write_one(grad_.keys(map, head), from.dk[map], scale_);
    write_one(grad_.values(head), from.dv, Scalar(1));
  }

 private:
  const Gradients& grad_;
  Scalar scale_;
  Index padded_keys_;
  Index dk_maps_;
  Index dk_size_;  // of one map
  Index size_;     // of one slot
  Scalar* sums_;   // [slot][dK of each map, then dV]
};

}  // namespace diffattn::inline v0_1::detail
