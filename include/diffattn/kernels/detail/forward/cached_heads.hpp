#pragma once

// A call against the packed pages of a cache: a few queries go page by page (few_rows/few_rows_packed.hpp), more of
// them in row blocks, as head_schedule.hpp has them, but with nothing left to pack.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <span>
#include <type_traits>

#include "diffattn/core/executor_view.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/few_rows/few_rows_packed.hpp"
#include "diffattn/kernels/detail/forward/block_tasks.hpp"
#include "diffattn/kernels/detail/forward/packed_heads.hpp"
#include "diffattn/kernels/detail/mask_view.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/detail/shifted_mask.hpp"
#include "diffattn/kernels/key_value_pages.hpp"

namespace diffattn::inline v0_1::detail {

/// `count` rows of a strip, or the rows of pairs that they are in, as what tiles multiply: copied, or widened to
/// floats.
template <Index kCols, typename Packed, typename Stored>
void copy_strip(Packed* to, const Stored* from, Index count) {
  constexpr Index kLanes = simd::kLanes<SumOf<Packed>>;
  if constexpr (std::is_same_v<Packed, Stored>) {
    std::copy_n(from, steps_of<Packed>(count) * kCols, to);
  } else if constexpr (kStepDepth<Stored> == 1) {
    for (Index i = 0; i < count * kCols; i += kLanes) simd::store(to + i, simd::load_as<Packed>(from + i));
  } else {
    for (Index k = 0; k < count; k += 2, to += 2 * kCols, from += kCols) {
      for (Index c = 0; c < kCols; c += kLanes) {
        const auto pairs = simd::widen_pairs<Packed>(from + c);
        simd::store(to + c, pairs.first);
        if (k + 1 < count) simd::store(to + kCols + c, pairs.second);
      }
    }
  }
}

/// The pages of one key head at a time, as row blocks read them, a chunk in one piece: where they are, or copied, when
/// they are stored in a narrower type or a page is less than a chunk.
template <typename Packed, typename Storage, Index kMaps>
class HeadOfPages {
  static constexpr bool kWidened = !std::is_same_v<Packed, StoredAs<Storage>>;
  static constexpr Index kCols = Tile<SumOf<Packed>>::kCols;

 public:
  /// dv: columns of the values that are wanted, all of them or none.
  HeadOfPages(const KeyValuePages<Storage>& cache, Index dv, Workspace& workspace)
      : cache_(cache),
        end_(cache.lead() + cache.n_k),
        count_(divide_up(end_, kChunk)),
        key_maps_(cache.shape.key_maps),
        values_width_(round_up(cache.shape.dv, kCols)) {
    const Index most = std::max(count_, divide_up(cache.room(std::max(cache.shape.page_size, kChunk)), kChunk));
    chunks_ = workspace.take<PackedPart<Packed>>(most);
    if (copied()) copies_ = workspace.take<Packed>(most * copy_size());
    head_.pages = chunks_;
    head_.value_stride = steps_of<Packed>(copied() ? kChunk : cache.shape.page_size);
    head_.n_k = end_;
    head_.d = cache.shape.d;
    head_.dv = dv;
  }

  /// Turns to another key head.
  template <typename E>
  void select(Index head, E& executor) {
    executor.run(count_, [&](Index chunk, Index /*worker*/) {
      if (copied()) return copy_chunk(chunk, head);
      if constexpr (!kWidened) {
        for (Index map = 0; map < kMaps; ++map) {
          chunks_[chunk].keys[map] = cache_.key_strip(chunk * kChunk, head, std::min(map, key_maps_ - 1));
        }
        chunks_[chunk].values = cache_.value_row(chunk * kChunk, head);
      }
    });
    head_.finite_values = cache_.finite_values_of(0, end_, head);
  }

  const PackedHead<Packed>& operator[](Index /*i*/) const { return head_; }

 private:
  bool copied() const { return kWidened || cache_.shape.page_size < kChunk; }
  /// Numbers, or pairs, in the copy of a chunk.
  Index copy_size() const { return key_maps_ * keys_size() + steps_of<Packed>(kChunk) * values_width_; }
  Index keys_size() const { return kChunk * steps_of<Packed>(cache_.shape.d); }

  void copy_chunk(Index chunk, Index head) {
    const Index d = cache_.shape.d, page_size = cache_.shape.page_size, first = chunk * kChunk;
    Packed* const keys = copies_ + chunk * copy_size();
    Packed* const values = keys + key_maps_ * keys_size();
    for (Index map = 0; map < kMaps; ++map) {
      chunks_[chunk].keys[map] = keys + std::min(map, key_maps_ - 1) * keys_size();
    }
    chunks_[chunk].values = values;
    const Index count = std::min(page_size, kChunk);  // of keys that are copied together
    for (Index key = std::max(first, cache_.lead()); key < std::min(first + kChunk, end_); key += count) {
      const Index row = key - first;
      for (Index map = 0; map < key_maps_; ++map) {
        for (Index strip = 0; strip < count; strip += kCols) {
          copy_strip<kCols>(keys + map * keys_size() + (row + strip) * steps_of<Packed>(d),
                            cache_.key_strip(key + strip, head, map), d);
        }
      }
      const auto* const from = cache_.value_row(key, head);
      for (Index column = 0; column < values_width_; column += kCols) {
        copy_strip<kCols>(values + column * steps_of<Packed>(kChunk) + steps_of<Packed>(row) * kCols,
                          from + column * cache_.value_stride(), count);
      }
    }
  }

  const KeyValuePages<Storage>& cache_;
  Index end_;           // of the keys, counted from the origin of the pages
  Index count_;         // of chunks
  Index key_maps_;      // in the cache
  Index values_width_;  // whole strips
  PackedPart<Packed>* chunks_;
  Packed* copies_ = nullptr;
  PackedHead<Packed> head_;
};

/// The operands of one query row.
template <typename Operands>
Operands row_of(Operands in, Index row) {
  for (Index map = 0; map < Operands::kMaps; ++map) {
    in.q[map] = in.q[map].middle_rows(row, 1);
    in.statistics[map] = in.statistics[map].of_row(row);
  }
  in.out = in.out.middle_rows(row, 1);
  if (in.lambda.values.data != nullptr) in.lambda.values = in.lambda.values.middle_rows(row, 1);
  return in;
}

/// run_cached_heads with its mask and its executor as they are viewed.
template <typename Block, typename Storage, typename Mask, typename E, typename Exchange>
void run_viewed_cached_heads(const typename Block::Operands& in, const KeyValuePages<Storage>& cache, const Mask& mask,
                             Workspace& workspace, E& executor, const Exchange& exchange) {
  using Operands = typename Block::Operands;
  if (in.n_q() == 0) return;
  const Index n_k = cache.lead() + cache.n_k;
  if (in.n_q() <= kFewRows || cache.n_k == 0) {
    const PackedSource<Storage> source{cache};
    return FewRows<Operands, Mask, PackedSource<Storage>>::run(in, source, n_k, mask, workspace, executor, exchange);
  }
  const auto frame = workspace.frame();
  BlockTasks<Block, Mask> tasks(in, mask, n_k);
  HeadOfPages<PackedOf<typename Operands::Element>, Storage, Operands::kMaps> pages(cache, in.dv, workspace);
  tasks.take_scratch(pages[0], std::max(tasks.most_keys(), cache.room(kChunk)), workspace, executor.concurrency());
  for (Index head = 0; head < in.heads.num_kv_heads; ++head) {
    pages.select(head, executor);
    tasks.run(head, 1, pages, executor);
  }
}

/// Attention of all heads against a cache; `in` has no keys and values. Block: StandardBlock or DifferentialBlock.
/// exchange: as FewRows has it, for calls that it takes.
template <typename Block, typename Storage, typename Mask, Executor E, typename Exchange = std::nullptr_t>
void run_cached_heads(const typename Block::Operands& in, const KeyValuePages<Storage>& cache, const Mask& mask,
                      Workspace& workspace, E& executor, const Exchange& exchange = nullptr) {
  check_keys_are_here<E>();
  const ViewedMask<typename Block::Operands::Scalar, Mask> seen(mask);
  ViewedExecutor<E> viewed(executor);
  run_viewed_cached_heads<Block>(in, cache, seen, workspace, viewed, exchange);
}

/// Several such calls of a few rows, which are shared out together.
template <typename Operands, typename Mask, typename Storage, typename E>
void run_viewed_cached_rows(std::span<FewRows<Operands, Mask, PackedSource<Storage>>> calls, E& executor) {
  FewRows<Operands, Mask, PackedSource<Storage>>::run(calls, executor);
}

/// One query against each of several caches: row i of `in`, which has no keys and values, against caches[i] under
/// masks[i]. What run_cached_heads computes of each row alone, bit for bit, shared out together.
template <typename Operands, typename Storage, typename Mask, Executor E>
void run_cached_rows(const Operands& in, std::span<const KeyValuePages<Storage>> caches, std::span<const Mask> masks,
                     Workspace& workspace, E& executor) {
  check_keys_are_here<E>();
  using Seen = MaskView<typename Operands::Scalar, HasBias<Mask>>;
  using Call = FewRows<Operands, Seen, PackedSource<Storage>>;
  struct Row {
    Operands in;
    PackedSource<Storage> source;
    ShiftedMask<Mask> mask;
    Seen seen{mask};
  };
  const auto frame = workspace.frame();
  const auto n = static_cast<Index>(caches.size());
  auto* const rows = workspace.take<Row>(n);
  auto* const calls = workspace.take<Call>(n);
  for (Index i = 0; i < n; ++i) {
    const KeyValuePages<Storage>& cache = caches[static_cast<std::size_t>(i)];
    // Made in its place: its view points at its mask.
    const Row& row =
        *new (rows + i) Row{row_of(in, i), {cache}, {masks[static_cast<std::size_t>(i)], cache.origin(), cache.lead()}};
    std::construct_at(calls + i, row.in, row.source, cache.lead() + cache.n_k, row.seen, workspace);
  }
  ViewedExecutor<E> viewed(executor);
  run_viewed_cached_rows(std::span<Call>(calls, static_cast<std::size_t>(n)), viewed);
}

}  // namespace diffattn::inline v0_1::detail
