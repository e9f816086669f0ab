#pragma once

// DecoderCache: a KvCache for every layer of a Decoder, kept in step. See layers/kv_cache.hpp for storage types,
// windows, growth and what a fork shares.
//
//   DecoderCache<float> cache = model.make_cache({.max_tokens = 4096});
//   model.logits(prompt, cache);  model.logits({token}, cache);
//   auto branch = cache.fork();   cache.truncate(cache.position() - 1);
//
// Errors   std::invalid_argument, as KvCache says; before anything is changed. Whatever a call of a model throws,
//          memory that is short included, its cache is as before.
//
// Tested by tests/models/decoder_test.cpp, generate_test.cpp and failing_allocations_test.cpp.

#include <cstddef>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/layers/kv_cache.hpp"

namespace diffattn::inline v0_1 {

template <typename StorageType = float>
class DecoderCache {
 public:
  using Storage = StorageType;

  /// Throws std::invalid_argument unless there is at least one layer, and for options that KvCache refuses.
  explicit DecoderCache(Index num_layers, const KvCacheOptions& options = {}) {
    if (num_layers < 1 || num_layers > detail::kMostValues) {
      detail::throw_invalid({"DecoderCache: num_layers must be at least 1 and that of the model, got ", num_layers});
    }
    layers.assign(static_cast<std::size_t>(num_layers), KvCache<Storage>(options));
  }

  /// Those of every layer's cache.
  const KvCacheOptions& options() const { return layers.front().options(); }
  /// How many tokens have been fed: the position of the next one.
  Index position() const { return layers.empty() ? 0 : layers.front().position(); }
  /// How many of them the next one can see.
  Index size() const { return layers.empty() ? 0 : layers.front().size(); }
  /// Whether nothing has been fed.
  bool empty() const { return position() == 0; }
  /// Bytes of keys and values held by all layers, as KvCache counts them.
  std::size_t memory_bytes() const {
    std::size_t bytes = 0;
    for (const KvCache<Storage>& layer : layers) bytes += layer.memory_bytes();
    return bytes;
  }

  /// A cache that continues from here on its own and shares what is there.
  [[nodiscard]] DecoderCache fork() const { return *this; }

  /// Throws std::invalid_argument, naming `where`, unless this is a cache for num_layers layers with room for so many
  /// tokens more.
  void check_room(const char* where, Index num_layers, Index tokens) const {
    if (static_cast<Index>(layers.size()) != num_layers) {
      detail::throw_invalid(
          {where, ": the cache must have ", num_layers, " layers, got ", static_cast<Index>(layers.size())});
    }
    const Index most = options().max_tokens;
    if (most != 0 && tokens > most - position()) {
      detail::throw_invalid(
          {where, ": the cache holds at most ", most, " tokens and has ", position(), ", cannot append ", tokens});
    }
  }

  /// Keeps the first `tokens` tokens. Throws std::invalid_argument as KvCache does, and nothing is changed.
  void truncate(Index tokens) {
    for (KvCache<Storage>& layer : layers) layer.truncate(tokens);  // in step: the first refuses, or none
  }
  /// As new, but for the memory.
  void clear() noexcept {
    for (KvCache<Storage>& layer : layers) layer.clear();
  }

  std::vector<KvCache<Storage>> layers;  ///< one a layer of the model, all at one position
};

namespace detail {

/// What is fed to a cache in the life of this object is kept as a whole or not at all: unless keep() is called before
/// its end, the cache is as it was at its beginning. They nest.
///
/// Without a window, going back is forgetting the last tokens. With one, the first tokens must still be there, which a
/// call of the model has at once (each layer drops what its window passes only when all layers are done), and several
/// calls, which would keep everything for that, by a fork: what the cache held before.
template <typename Storage>
class CacheTransaction {
 public:
  enum class Calls { one, several };

  explicit CacheTransaction(DecoderCache<Storage>& cache, Calls calls = Calls::one)
      : cache_(cache), before_(cache.position()), holds_(calls == Calls::one) {
    if (!holds_ && cache.options().window && before_ != 0) fork_.emplace(cache);
    if (!holds_) return;
    for (KvCache<Storage>& layer : cache_.layers) layer.hold();
  }
  CacheTransaction(const CacheTransaction&) = delete;
  CacheTransaction& operator=(const CacheTransaction&) = delete;
  ~CacheTransaction() {
    if (!keep_ && fork_) std::swap(cache_.layers, fork_->layers);
    for (KvCache<Storage>& layer : cache_.layers) {
      // A callback of generate's may have cut the cache: what is shorter than before stays so.
      if (!keep_ && layer.position() > before_) layer.truncate(before_);
      if (holds_) layer.release();
    }
  }

  void keep() noexcept { keep_ = true; }

 private:
  DecoderCache<Storage>& cache_;
  Index before_;
  bool holds_;
  bool keep_ = false;
  std::optional<DecoderCache<Storage>> fork_;
};

/// The same for one call of a model on a batch of caches, all of which keep what it feeds them, or none. The workspace's
/// frame must outlive it.
template <typename Storage>
class BatchTransaction {
 public:
  BatchTransaction(std::span<DecoderCache<Storage>* const> caches, Workspace& workspace)
      : caches_(caches), before_(workspace.take<Index>(static_cast<Index>(caches.size()))) {
    for (std::size_t i = 0; i < caches.size(); ++i) {
      before_[i] = caches[i]->position();
      for (KvCache<Storage>& layer : caches[i]->layers) layer.hold();
    }
  }
  BatchTransaction(const BatchTransaction&) = delete;
  BatchTransaction& operator=(const BatchTransaction&) = delete;
  ~BatchTransaction() {
    for (std::size_t i = 0; i < caches_.size(); ++i) {
      for (KvCache<Storage>& layer : caches_[i]->layers) {
        if (!keep_ && layer.position() > before_[i]) layer.truncate(before_[i]);
        layer.release();
      }
    }
  }

  void keep() noexcept { keep_ = true; }

 private:
  std::span<DecoderCache<Storage>* const> caches_;
  Index* before_;
  bool keep_ = false;
};

}  // namespace detail

}  // namespace diffattn::inline v0_1
