#pragma once

// DecoderCache: a KvCache for every layer of a Decoder, kept in step. See layers/kv_cache.hpp for storage types,
// windows, growth and what a fork shares.
//
//   DecoderCache<float> cache(model.num_layers(), {.max_tokens = 4096});
//   model.logits(prompt, cache);  model.logits({token}, cache);
//   auto branch = cache.fork();   cache.truncate(cache.position() - 1);
//
// Errors   std::invalid_argument, as KvCache says; before anything is changed. Whatever a call of a model throws,
// memory
//          that is short included, its cache is as before.

#include <cstddef>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/layers/kv_cache.hpp"

namespace diffattn::inline v0_1 {

template <typename Storage = float>
class DecoderCache {
 public:
  /// Throws std::invalid_argument unless there is at least one layer, and for options that KvCache refuses.
  explicit DecoderCache(Index num_layers, const KvCacheOptions& options = {}) {
    if (num_layers < 1 || num_layers > detail::kMostValues) {
      detail::throw_invalid({"DecoderCache: num_layers must be at least 1 and that of the model, got ", num_layers});
    }
    layers.assign(static_cast<std::size_t>(num_layers), KvCache<Storage>(options));
  }

  const KvCacheOptions& options() const { return layers.front().options(); }
  /// How many tokens have been fed: the position of the next one.
  Index position() const { return layers.empty() ? 0 : layers.front().position(); }
  /// How many of them the next one can see.
  Index size() const { return layers.empty() ? 0 : layers.front().size(); }
  bool empty() const { return position() == 0; }
  std::size_t memory_bytes() const {
    std::size_t bytes = 0;
    for (const KvCache<Storage>& layer : layers) bytes += layer.memory_bytes();
    return bytes;
  }

  [[nodiscard]] DecoderCache fork() const { return *this; }

  /// Keeps the first `tokens` tokens. Throws std::invalid_argument as KvCache does, and nothing is changed.
  void truncate(Index tokens) {
    for (KvCache<Storage>& layer : layers) layer.truncate(tokens);  // in step: the first refuses, or none
  }
  void clear() noexcept {
    for (KvCache<Storage>& layer : layers) layer.clear();
  }

  std::vector<KvCache<Storage>> layers;
};

namespace detail {

/// What several layers append, one after the other, is kept by all or by none: unless keep() is called before this
/// object's end, the cache is as it was at its beginning. Costs nothing but that windows drop what they pass later.
template <typename Storage>
class CacheTransaction {
 public:
  explicit CacheTransaction(DecoderCache<Storage>& cache) noexcept : cache_(cache), before_(cache.position()) {
    for (KvCache<Storage>& layer : cache_.layers) layer.hold();
  }
  CacheTransaction(const CacheTransaction&) = delete;
  CacheTransaction& operator=(const CacheTransaction&) = delete;
  ~CacheTransaction() {
    for (KvCache<Storage>& layer : cache_.layers) {
      if (!keep_ && layer.position() > before_) layer.truncate(before_);
      layer.release();
    }
  }

  void keep() noexcept { keep_ = true; }

 private:
  DecoderCache<Storage>& cache_;
  Index before_;
  bool keep_ = false;
};

}  // namespace detail

}  // namespace diffattn::inline v0_1
