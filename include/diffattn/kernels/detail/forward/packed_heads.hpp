#pragma once

// Keys and values of a head as row blocks read them: packed once, read by every block of every query head that shares
// them. PackedHead says where they are, be it a copy that HeadPacking makes (below) or the pages of a cache
// (cached_heads.hpp).

#include <algorithm>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/arithmetic.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/product/packed.hpp"
#include "diffattn/product/packed_pairs.hpp"

namespace diffattn::inline v0_1::detail {

/// Where keys and values of one head, or of one chunk of it, are packed.
template <typename Packed>
struct PackedPart {
  const Packed* keys[2] = {nullptr, nullptr};  // one for each map; the same twice when the maps share their keys
  const Packed* values = nullptr;
};

/// Keys and values of one head: in one piece, or in the pages of a cache, each chunk in a place of its own.
template <typename Packed>
struct PackedHead : PackedPart<Packed> {
  static constexpr Index kCols = Tile<SumOf<Packed>>::kCols;

  const PackedPart<Packed>* pages = nullptr;  // of every chunk
  Index value_stride = 0;  // steps of depth from a strip of values to the next: those of n_k, or of a page
  Index n_k = 0;
  Index d = 0;
  Index dv = 0;
  bool finite_values = true;

  /// Whether blocks fetch the chunk that comes next (kNearBytes, blocking.hpp).
  bool fetch_ahead() const {
    const Index key_maps = this->keys[1] == nullptr || this->keys[1] == this->keys[0] ? 1 : 2;
    const Index bytes = steps_of<Packed>(n_k) * (key_maps * d + dv) * static_cast<Index>(sizeof(Packed));
    return pages != nullptr || bytes > kNearBytes;
  }

  /// Keys and values of the chunk that begins at `first_key`.
  const Packed* chunk_keys(Index map, Index first_key) const {
    if (pages == nullptr) return this->keys[map] + first_key * steps_of<Packed>(d);
    return pages[first_key / kChunk].keys[map];
  }
  const Packed* chunk_values(Index first_key) const {
    if (pages == nullptr) return this->values + steps_of<Packed>(first_key) * kCols;
    return pages[first_key / kChunk].values;
  }
};

/// The packed copies of a wave of key heads, one wave after the other in the same memory.
template <typename Operands>
class HeadPacking {
  using Packed = PackedOf<typename Operands::Element>;
  using Sum = SumOf<Packed>;
  static constexpr Index kMaps = Operands::kMaps;

 public:

  /// Takes memory for `wave` key heads. seen: keys that some query sees; no others are packed.
  HeadPacking(const Operands& in, const KeyRange& seen, Index wave, Workspace& workspace)
      : in_(in),
        seen_(seen),
        key_maps_(in.shared_keys() ? 1 : kMaps),
        first_piece_(seen.begin / kPieceKeys),
        pieces_(divide_up(seen.end, kPieceKeys) - first_piece_),
        keys_size_(packed_strips_size<Sum>(seen.end, steps_of<Packed>(in.d))),
        values_size_(packed_strips_size<Sum>(in.dv, steps_of<Packed>(seen.end))),
        heads_(workspace.take<PackedHead<Packed>>(wave)),
        finite_(workspace.take<bool>(wave * pieces_)),
        keys_(workspace.take<Packed>(wave * key_maps_ * keys_size_)),
        values_(workspace.take<Packed>(wave * values_size_)) {}

  /// A head of these sizes, packed nowhere.
  PackedHead<Packed> shape() const {
    PackedHead<Packed> head;
    head.n_k = seen_.end;
    head.value_stride = steps_of<Packed>(seen_.end);
    head.d = in_.d;
    head.dv = in_.dv;
    return head;
  }

  /// Packs key heads [first, first + count).
  template <typename E>
  void pack(Index first, Index count, E& executor) {
    executor.run(count * pieces_, [&](Index task, Index /*worker*/) {
      const Index i = task / pieces_, row = (first_piece_ + task % pieces_) * kPieceKeys;
      finite_[task] = pack_piece(i, first + i, row, std::min(kPieceKeys, seen_.end - row));
    });
    for (Index i = 0; i < count; ++i) {
      heads_[i] = shape();
      for (Index map = 0; map < kMaps; ++map) heads_[i].keys[map] = keys(i, std::min(map, key_maps_ - 1));
      heads_[i].values = values(i);
      heads_[i].finite_values =
          std::all_of(finite_ + i * pieces_, finite_ + (i + 1) * pieces_, [](bool yes) { return yes; });
    }
  }

  /// The i-th of the heads that were packed last.
  const PackedHead<Packed>& operator[](Index i) const { return heads_[i]; }

 private:
  Packed* keys(Index i, Index map) const { return keys_ + (i * key_maps_ + map) * keys_size_; }
  Packed* values(Index i) const { return values_ + i * values_size_; }

  /// Packs `count` keys of a key head from `row` on, as the i-th of the wave. Returns whether the values are finite.
  bool pack_piece(Index i, Index head, Index row, Index count) const {
    for (Index map = 0; map < key_maps_; ++map) pack_transposed(keys(i, map), in_.keys(map, head), row, count);
    return pack_columns(values(i) + steps_of<Packed>(row) * Tile<Sum>::kCols, steps_of<Packed>(seen_.end),
                        in_.values(head).middle_rows(row, count), true);
  }

  const Operands& in_;
  KeyRange seen_;
  Index key_maps_;     // packed for each head
  Index first_piece_;  // that is packed
  Index pieces_;       // from there on, in a head
  Index keys_size_;    // of one head and map
  Index values_size_;  // of one head
  PackedHead<Packed>* heads_;
  bool* finite_;    // of every head and piece
  Packed* keys_;    // [head][map][strip of keys][d][kCols]
  Packed* values_;  // [head][strip of dv][key][kCols]
};

}  // namespace diffattn::inline v0_1::detail
