#pragma once

// Batches of caches: many sequences that go on at once, a token each, every one in a cache of its own.
//
//   std::vector<KvCache<float>*> caches = {&a, &b, &c};       pointers, since caches stay where their owners keep them
//   y = layer.forward(x, caches);                             row i of x continues *caches[i]
//
// Layers take pointers to KvCache, models to DecoderCache. The caches may differ in length, window and what else their
// options say, not in the storage type. Forks of one cache are different caches.
// Errors   of every call, before any work and with the number of the sequence: a null pointer, a cache that is there
//          twice, one of another layer or model, one that is full. Whatever is thrown, all caches are as before.

#include <algorithm>
#include <cstddef>
#include <functional>
#include <iterator>
#include <span>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/workspace.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

template <template <typename> class Cache, typename Storage>
std::span<Cache<Storage>* const> batch_of(Cache<Storage>* const* caches, std::size_t count) {
  return {caches, count};
}

}  // namespace detail

/// Any contiguous range of pointers to caches: a std::span<KvCache<Storage>* const>, a std::vector or an array.
template <typename Caches, template <typename> class Cache>
concept CacheBatch = requires(const Caches& caches) {
  detail::batch_of<Cache>(std::data(caches), std::size(caches));
};

namespace detail {

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_cache_twice(const char* where, Index first, Index second) {
  throw_invalid(
      {where, ": sequence ", second, ": its cache is that of sequence ", first, " too; did you mean a fork() of it?"});
}

/// Throws std::invalid_argument unless there are `count` caches, none of them null and none there twice. `each` says
/// what a cache is wanted for.
template <typename Cache>
void check_batch(const char* where, const char* each, Index count, std::span<Cache* const> caches,
                 Workspace& workspace) {
  const auto given = static_cast<Index>(caches.size());
  if (given != count) {
    throw_invalid({where, ": there must be a cache for each of the ", count, " ", each, ", got ", given});
  }
  for (Index i = 0; i < given; ++i) {
    if (caches[static_cast<std::size_t>(i)] != nullptr) continue;
    throw_invalid({where, ": sequence ", i, ": its cache is a null pointer"});
  }
  const auto frame = workspace.frame();
  auto* const sorted = workspace.take<Cache*>(given);
  std::copy(caches.begin(), caches.end(), sorted);
  std::sort(sorted, sorted + given, std::less<>());
  const auto* const twice = std::adjacent_find(sorted, sorted + given);
  if (twice == sorted + given) return;
  const auto first = std::find(caches.begin(), caches.end(), *twice),
             second = std::find(first + 1, caches.end(), *twice);
  throw_cache_twice(where, first - caches.begin(), second - caches.begin());
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
