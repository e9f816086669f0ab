#pragma once

// A call against the packed pages of a cache: a few queries go page by page (few_rows/few_rows_packed.hpp), more of
// them in row blocks, as head_schedule.hpp has them, but with nothing left to pack.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <span>
#include <type_traits>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/few_rows/few_rows_packed.hpp"
#include "diffattn/kernels/detail/forward/block_tasks.hpp"
#include "diffattn/kernels/detail/forward/packed_heads.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/detail/shifted_mask.hpp"
#include "diffattn/kernels/key_value_pages.hpp"

namespace diffattn::inline v0_1::detail {

/// `count` values of strips, widened to Scalar.
template <typename Scalar, typename Storage>
void widen(Scalar* to, const Storage* from, Index count) {
  for (Index i = 0; i < count; i += simd::kLanes<Scalar>) simd::store(to + i, simd::load_as<Scalar>(from + i));
}

/// The pages of one key head at a time, as row blocks read them: where they are, or widened when they are stored in a
/// narrower type.
template <typename Scalar, typename Storage, Index kMaps>
class HeadOfPages {
  static constexpr bool kNarrow = !std::is_same_v<Scalar, Storage>;

 public:
  HeadOfPages(const KeyValuePages<Storage>& cache, Workspace& workspace)
      : cache_(cache),
        count_(divide_up(cache.n_k, kPageKeys)),
        key_maps_(cache.shape.key_maps),
        widened_size_(key_maps_ * cache.shape.keys_size() + cache.shape.values_size()),
        pages_(workspace.take<PackedPart<Scalar>>(count_)) {
    head_.pages = pages_;
    head_.value_stride = kPageKeys;
    head_.n_k = cache.n_k;
    head_.d = cache.shape.d;
    head_.dv = cache.shape.dv;
    if constexpr (kNarrow) widened_ = workspace.take<Scalar>(count_ * widened_size_);
  }

  /// Turns to another key head.
  template <typename E>
  void select(Index head, E& executor) {
    executor.run(count_, [&](Index page, Index /*worker*/) {
      if constexpr (kNarrow) {
        widen_page(page, head);
      } else {
        for (Index map = 0; map < kMaps; ++map) {
          pages_[page].keys[map] = cache_.keys(page, head, std::min(map, key_maps_ - 1));
        }
        pages_[page].values = cache_.values(page, head);
      }
    });
    head_.finite_values = true;
    for (Index page = 0; page < count_; ++page) head_.finite_values &= cache_.finite_values(page, head);
  }

  const PackedHead<Scalar>& operator[](Index /*i*/) const { return head_; }

 private:
  void widen_page(Index page, Index head) {
    const Index keys_size = cache_.shape.keys_size();
    Scalar* const keys = widened_ + page * widened_size_;
    for (Index map = 0; map < kMaps; ++map) pages_[page].keys[map] = keys + std::min(map, key_maps_ - 1) * keys_size;
    for (Index map = 0; map < key_maps_; ++map) widen(keys + map * keys_size, cache_.keys(page, head, map), keys_size);
    Scalar* const values = keys + key_maps_ * keys_size;
    widen(values, cache_.values(page, head), cache_.shape.values_size());
    pages_[page].values = values;
  }

  const KeyValuePages<Storage>& cache_;
  Index count_;         // of pages
  Index key_maps_;      // in the cache
  Index widened_size_;  // of one page
  PackedPart<Scalar>* pages_;
  Scalar* widened_ = nullptr;
  PackedHead<Scalar> head_;
};

/// The operands of one query row.
template <typename Scalar, Index kMaps>
HeadOperands<Scalar, kMaps> row_of(HeadOperands<Scalar, kMaps> in, Index row) {
  for (Index map = 0; map < kMaps; ++map) {
    in.q[map] = in.q[map].middle_rows(row, 1);
    if (in.lse[map].data != nullptr) in.lse[map] = in.lse[map].middle_rows(row, 1);
  }
  in.out = in.out.middle_rows(row, 1);
  if (in.lambda.values.data != nullptr) in.lambda.values = in.lambda.values.middle_rows(row, 1);
  return in;
}

/// Attention of all heads against a cache; `in` has no keys and values. Block: StandardBlock or DifferentialBlock.
template <typename Block, typename Scalar, typename Storage, typename Mask, Executor E>
void run_cached_heads(const HeadOperands<Scalar, Block::kMaps>& in, const KeyValuePages<Storage>& cache,
                      const Mask& mask, Workspace& workspace, E& executor) {
  if (in.n_q() == 0) return;
  if (in.n_q() <= kFewRows || cache.n_k == 0) {
    const PackedSource<Storage> source{cache};
    return FewRows<Scalar, Block::kMaps, Mask, PackedSource<Storage>>::run(in, source, cache.n_k, mask, workspace,
                                                                           executor);
  }
  const auto frame = workspace.frame();
  BlockTasks<Block, Scalar, Mask> tasks(in, mask, cache.n_k);
  HeadOfPages<Scalar, Storage, Block::kMaps> pages(cache, workspace);
  tasks.take_scratch(pages[0], cache.n_k, workspace, executor.concurrency());
  for (Index head = 0; head < in.heads.num_kv_heads; ++head) {
    pages.select(head, executor);
    tasks.run(head, 1, pages, executor);
  }
}

/// One query against each of several caches: row i of `in`, which has no keys and values, against caches[i] under
/// masks[i]. What run_cached_heads computes of each row alone, bit for bit, shared out together.
template <typename Scalar, Index kMaps, typename Storage, typename Mask, Executor E>
void run_cached_rows(const HeadOperands<Scalar, kMaps>& in, std::span<const KeyValuePages<Storage>> caches,
                     std::span<const Mask> masks, Workspace& workspace, E& executor) {
  using Shifted = ShiftedMask<Mask>;
  using Call = FewRows<Scalar, kMaps, Shifted, PackedSource<Storage>>;
  struct Row {
    HeadOperands<Scalar, kMaps> in;
    PackedSource<Storage> source;
    Shifted mask;
  };
  const auto frame = workspace.frame();
  const auto n = static_cast<Index>(caches.size());
  auto* const rows = workspace.take<Row>(n);
  auto* const calls = workspace.take<Call>(n);
  for (Index i = 0; i < n; ++i) {
    const KeyValuePages<Storage>& cache = caches[static_cast<std::size_t>(i)];
    const Row& row = *std::construct_at(
        rows + i, Row{row_of(in, i), {cache}, {masks[static_cast<std::size_t>(i)], cache.first_key}});
    std::construct_at(calls + i, row.in, row.source, cache.n_k, row.mask, workspace);
  }
  Call::run(std::span<Call>(calls, static_cast<std::size_t>(n)), executor);
}

}  // namespace diffattn::inline v0_1::detail
