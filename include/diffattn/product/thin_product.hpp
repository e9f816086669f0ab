#pragma once

// y = x Wᵀ + b for a few rows of x, a batch of tokens say: a product that is bound by reading W as much as by
// multiplying. W is read once, row by row as it lies in memory, and widened on the way; x is packed instead of it.
//
//   ThinProduct<Scalar, Stored>::fits(x, w)                          whether it is for these
//   multiply_thin(outputs, x, workspace, executor)                   y (n x out), x (n x in), w (out x in), bias out
//                                                                    values or null, for every output
//
// Operands  any strides of x and y; contiguous rows of W, of the scalar or a narrower type. y must not overlap x or W.
// Memory    a packed copy of x, of twice a packet's rows at least, and for each worker two pieces of W that stay in the
//           first-level cache, and the sums of a group of its rows.
// Cost      2·n·out·in FLOP, or the time of reading W.
//
// The tile is that of packed_product.hpp with its sides exchanged: the sums of kRows rows of W for two packets of rows
// of x, which lie transposed. Where x has no more than half or a quarter of two packets' rows, two or four rows of W
// share a packet: their values are stored side by side and loaded as one, and every row of x is packed as often. So the
// lanes are full, and 14 loads do for 24 multiplications.
//
// A group of rows of W is taken kChain steps at a time: while one piece is multiplied, the next is copied, and one that
// is a block further on is asked for from memory, evenly over the steps.
//
// Sums are chains of kChain multiply-adds along depth, added up in order, as those of packed_product.hpp: a row of x
// gets the same bits from either, however many rows come with it.

#include <algorithm>
#include <array>
#include <span>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/simd.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/product/register_tile.hpp"

namespace diffattn::inline v0_1::detail {

/// One of the products of an x.
template <typename Scalar, typename Stored>
struct ThinOutput {
  StridedView<Scalar> y;         ///< n x out
  StridedView<const Stored> w;   ///< out x in, contiguous rows
  const Scalar* bias = nullptr;  ///< out values, or null
};

/// Rows that will be read later: `row_stride` and, from one step of depth to the next, `step` bytes apart.
struct WeightsAhead {
  const char* data;
  Index row_stride;
  Index step;
};

/// The sizes of the tile and what is done at its level, where kTogether rows of W share a packet.
template <typename Scalar, Index kTogether>
struct ThinTile {
  static constexpr Index kLanes = simd::kLanes<Scalar>;
  static constexpr Index kPackets = Tile<Scalar>::kRows;  ///< of sums, for each packet of x
  static constexpr Index kRows = kPackets * kTogether;    ///< of W
  /// From kTogether rows of a piece to the next: not a power of two, or they would fall on the same places of the cache.
  static constexpr Index kStride = kTogether * kChain + 16;

  /// Rows [first, first + kTogether) of W, steps [k, k + steps) → [steps][kTogether]. Rows from `rows` on repeat the
  /// last.
  template <typename Stored>
  EIGEN_ALWAYS_INLINE static void copy(Scalar* to, const StridedView<const Stored>& w, Index first, Index k,
                                       Index steps) {
    const Stored* rows[kTogether];
    for (Index i = 0; i < kTogether; ++i) rows[i] = &w(std::min(first + i, w.rows - 1), k);
    Index c = 0;
    for (; c + kLanes <= steps; c += kLanes, to += kTogether * kLanes) {
      simd::Packet<Scalar> values[kTogether];
#pragma GCC unroll 4
      for (Index i = 0; i < kTogether; ++i) values[i] = simd::load_as<Scalar>(rows[i] + c);
      if constexpr (kTogether == 2) simd::interleave<Scalar>(values[0], values[1]);
      if constexpr (kTogether == 4) {
        simd::interleave<Scalar>(values[0], values[2]);
        simd::interleave<Scalar>(values[1], values[3]);
        simd::interleave<Scalar>(values[0], values[1]);
        simd::interleave<Scalar>(values[2], values[3]);
      }
#pragma GCC unroll 4
      for (Index i = 0; i < kTogether; ++i) simd::store(to + i * kLanes, values[i]);
    }
    for (; c < steps; ++c, to += kTogether) {
      for (Index i = 0; i < kTogether; ++i) to[i] = static_cast<Scalar>(rows[i][c]);
    }
  }

  /// Rows [first, …) of x → [depth][width], every row kTogether times: as many as fill the width, the last repeated.
  static void pack(Scalar* to, const StridedView<const Scalar>& x, Index first, Index width) {
    const Index last = x.rows - 1;
    Index k = 0;
    if (x.col_stride == 1) {
      for (; k + kLanes <= x.cols; k += kLanes) {
        for (Index c = 0; c < width; c += kLanes) {
          simd::Packet<Scalar> block[kLanes];
          for (Index r = 0; r < kLanes; ++r) {
            block[r] = simd::loadu(&x(std::min(first + (c + r) / kTogether, last), k));
          }
          simd::transpose<Scalar>(block);
          for (Index r = 0; r < kLanes; ++r) simd::store(to + (k + r) * width + c, block[r]);
        }
      }
    }
    for (; k < x.cols; ++k) {
      for (Index c = 0; c < width; ++c) to[k * width + c] = x(std::min(first + c / kTogether, last), k);
    }
  }

  /// sums (kPackets x kWidth packets) = w · x, or += with `add`, over up to kChain steps of depth. A call of its own, as
  /// add_product is.
  template <Index kWidth>
  EIGEN_DONT_INLINE static void add_product(Scalar* sums, bool add, const Scalar* w, const Scalar* x, Index steps,
                                            WeightsAhead ahead) {
    TileSums<Scalar, kPackets, kWidth> tile;
    tile.set_zero();
    for (; steps > 0; --steps) {
      simd::Packet<Scalar> right[kWidth];
#pragma GCC unroll 2
      for (Index p = 0; p < kWidth; ++p) right[p] = simd::load(x + p * kLanes);
#pragma GCC unroll 16
      for (Index r = 0; r < kPackets; ++r) {
        const simd::Packet<Scalar> left = simd::repeat<kTogether>(w + r * kStride);
#pragma GCC unroll 2
        for (Index p = 0; p < kWidth; ++p) tile.sums[r][p] = simd::fma(left, right[p], tile.sums[r][p]);
      }
      w += kTogether;
      x += kWidth * kLanes;
#pragma GCC unroll 4
      for (Index i = 0; i < kTogether; ++i) simd::prefetch(ahead.data, i * ahead.row_stride);
      ahead.data += ahead.step;
    }
    constexpr Index kStep = kWidth * kLanes;
    if (add) tile.add(sums, kStep);
    tile.store(sums, kStep);
  }
};

/// The products of one x. x lies in panels of two packets, the last of one or two: [panel][depth][width].
template <typename Scalar, typename Stored, Index kTogether>
class ThinProducts {
  using Tile = ThinTile<Scalar, kTogether>;
  using Output = ThinOutput<Scalar, Stored>;
  static constexpr Index kLanes = Tile::kLanes, kPanel = 2 * kLanes;
  static constexpr Index kTiles = 4 / kTogether;
  static constexpr Index kGroup = kTiles * Tile::kRows;  ///< rows of W
  static constexpr Index kPiece = kTiles * Tile::kPackets * Tile::kStride;

 public:
  ThinProducts(std::span<const Output> outputs, const StridedView<const Scalar>& x)
      : outputs_(outputs), x_(x), width_(kTogether > 1 ? kPanel : round_up(x.rows, kLanes)) {
    const Index parts = divide_up(x.cols, kChain), blocks = std::max(parts / Tile::kPackets, Index{1});
    block_parts_ = divide_up(parts, blocks);
    for (const Output& output : outputs) groups_ += divide_up(output.w.rows, kGroup);
  }

  template <Executor E>
  void run(Workspace& workspace, E& executor) const {
    const Index workers = executor.concurrency(), sums = kGroup / kTogether * width_;
    const auto frame = workspace.frame();
    auto* const packed = workspace.take<Scalar>(width_ * x_.cols);
    auto* const pieces = workspace.take<Scalar>(workers * 2 * kPiece);
    auto* const all_sums = workspace.take<Scalar>(workers * sums);
    for (Index c = 0; c < width_; c += kPanel) {
      Tile::pack(packed + c * x_.cols, x_, c / kTogether, std::min(kPanel, width_ - c));
    }
    // Neighbouring groups go to one thread, which asks for the next while it multiplies the present one; a few times as
    // many tasks as threads are enough to share out evenly.
    const Index task_groups = std::max(workers == 1 ? groups_ : groups_ / (4 * workers), Index{1});
    executor.run(divide_up(groups_, task_groups), [&](Index task, Index worker) {
      const Index first = task * task_groups, last = std::min(first + task_groups, groups_);
      run_groups(first, last, packed, pieces + worker * 2 * kPiece, all_sums + worker * sums);
    });
  }

 private:
  /// A group of rows of W, and how far in it: steps of depth from part · kChain on.
  struct Place {
    const Output* output;
    Index row;
    Index part;
  };

  void run_groups(Index first, Index last, const Scalar* packed, Scalar* pieces, Scalar* sums) const {
    const Index parts = divide_up(x_.cols, kChain), steps = (last - first) * parts;
    Place place = place_of(first);
    copy(pieces, place);
    for (Index step = 0; step < steps; ++step) {
      const Place next = place_after(place);
      if (step + 1 < steps) copy(pieces + (step + 1) % 2 * kPiece, next);
      add_products(place, packed, pieces + step % 2 * kPiece, sums);
      if (place.part + 1 == parts) store(place, sums);
      place = next;
    }
  }

  Place place_of(Index group) const {
    const Output* output = outputs_.data();
    for (; group >= divide_up(output->w.rows, kGroup); ++output) group -= divide_up(output->w.rows, kGroup);
    return {output, group * kGroup, 0};
  }
  /// Nothing follows the last: what is returned for it is past the end.
  Place place_after(const Place& place) const {
    if ((place.part + 1) * kChain < x_.cols) return {place.output, place.row, place.part + 1};
    if (place.row + kGroup < place.output->w.rows) return {place.output, place.row + kGroup, 0};
    const Output* output = place.output + 1;
    while (output != outputs_.data() + outputs_.size() && output->w.rows == 0) ++output;
    return {output, 0, 0};
  }

  Index rows_at(const Place& place) const { return std::min(kGroup, place.output->w.rows - place.row); }
  Index steps_at(const Place& place) const { return std::min(kChain, x_.cols - place.part * kChain); }

  void copy(Scalar* to, const Place& place) const {
    const Index rows = round_up(rows_at(place), Tile::kRows);
    for (Index r = 0; r < rows; r += kTogether, to += Tile::kStride) {
      Tile::copy(to, place.output->w, place.row + r, place.part * kChain, steps_at(place));
    }
  }

  /// The part of the next block of the same rows, or of the first of the next rows, that is asked for with this one.
  WeightsAhead ahead_of(const Place& place) const {
    const StridedView<const Stored>& w = place.output->w;
    const Index block = place.part / block_parts_ + 1, in_block = place.part % block_parts_;
    const bool same_rows = block * block_parts_ * kChain < x_.cols;
    const Index row = (same_rows ? place.row : place.row + kGroup) + in_block * kGroup / block_parts_;
    const Index k = same_rows ? block * block_parts_ * kChain : 0;
    constexpr Index kSize = sizeof(Stored);
    return {reinterpret_cast<const char*>(&w(std::min(row, w.rows - 1), k)), w.row_stride * kSize,
            block_parts_ * kSize};
  }

  void add_products(const Place& place, const Scalar* packed, const Scalar* piece, Scalar* sums) const {
    const Index rows = rows_at(place), steps = steps_at(place), k = place.part * kChain;
    WeightsAhead ahead = ahead_of(place);
    for (Index c = 0; c < width_; c += kPanel) {
      const Index width = std::min(kPanel, width_ - c);
      const Scalar* const x = packed + c * x_.cols + k * width;
      Scalar* to = sums + c * (kGroup / kTogether);
      const Scalar* w = piece;
      for (Index row = 0; row < rows; row += Tile::kRows) {
        if (width == kPanel) {
          Tile::template add_product<2>(to, k != 0, w, x, steps, ahead);
        } else {
          Tile::template add_product<1>(to, k != 0, w, x, steps, ahead);
        }
        to += Tile::kPackets * width;
        w += Tile::kPackets * Tile::kStride;
        ahead.data += c == 0 ? kTogether * ahead.row_stride : 0;
      }
    }
  }

  void store(const Place& place, const Scalar* sums) const {
    const auto& [y, w, bias] = *place.output;
    for (Index c = 0; c < width_; c += kPanel) {
      const Index width = std::min(kPanel, width_ - c), first = c / kTogether;
      const Scalar* const from = sums + c * (kGroup / kTogether);
      for (Index i = 0; i < std::min(width / kTogether, y.rows - first); ++i) {
        for (Index r = 0; r < rows_at(place); ++r) {
          const Scalar sum = from[r / kTogether * width + i * kTogether + r % kTogether];
          y(first + i, place.row + r) = bias == nullptr ? sum : sum + bias[place.row + r];
        }
      }
    }
  }

  std::span<const Output> outputs_;
  StridedView<const Scalar> x_;
  Index width_;        // of x, packed: lanes of all panels
  Index block_parts_;  // parts of depth that are asked for together
  Index groups_ = 0;
};

/// When the thin product is for an x and a W.
template <typename Scalar, typename Stored>
struct ThinProduct {
  static constexpr Index kMostRows = 64;
  static bool fits(const StridedView<const Scalar>& x, const StridedView<const Stored>& w) {
    return x.rows <= kMostRows && x.rows > 0 && x.cols > 0 && w.col_stride == 1;
  }
};

/// All outputs of one x that is not empty.
template <typename Scalar, typename Stored, Executor E>
void multiply_thin(std::span<const ThinOutput<Scalar, Stored>> outputs, const StridedView<const Scalar>& x,
                   Workspace& workspace, E& executor) {
  constexpr Index kLanes = simd::kLanes<Scalar>;
  // No panel of fewer than 8 rows, which is few enough to be bound by memory.
  if constexpr (kLanes >= 16) {
    if (x.rows <= kLanes / 2) return ThinProducts<Scalar, Stored, 4>(outputs, x).run(workspace, executor);
  }
  if constexpr (kLanes >= 8) {
    if (x.rows <= kLanes) return ThinProducts<Scalar, Stored, 2>(outputs, x).run(workspace, executor);
  }
  ThinProducts<Scalar, Stored, 1>(outputs, x).run(workspace, executor);
}

}  // namespace diffattn::inline v0_1::detail
