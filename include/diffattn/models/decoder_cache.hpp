#pragma once

// DecoderCache: a KvCache for every layer of a Decoder, kept in step. See layers/kv_cache.hpp for storage types,
// windows, growth and what a fork shares.
//
//   DecoderCache<float> cache(model.num_layers(), {.max_tokens = 4096});
//   model.logits(prompt, cache);  model.logits({token}, cache);
//   auto branch = cache.fork();   cache.truncate(cache.position() - 1);
//
// Errors   std::invalid_argument, as KvCache says; before anything is changed.

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/layers/kv_cache.hpp"

namespace diffattn::inline v0_1 {

template <typename Storage = float>
class DecoderCache {
 public:
  explicit DecoderCache(Index num_layers, const KvCacheOptions& options = {}) {
    for (Index layer = 0; layer < num_layers; ++layer) layers.emplace_back(options);
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

  /// Keeps the first `tokens` tokens.
  void truncate(Index tokens) {
    for (KvCache<Storage>& layer : layers) layer.truncate(tokens);
  }
  void clear() {
    for (KvCache<Storage>& layer : layers) layer.clear();
  }

  /// After a failure half way: `tokens` tokens in every layer again; none if a window has dropped what that would take.
  void roll_back(Index tokens) {
    try {
      for (KvCache<Storage>& layer : layers) layer.truncate(std::min(tokens, layer.position()));
    } catch (const std::invalid_argument&) {
      clear();
    }
  }

  std::vector<KvCache<Storage>> layers;
};

}  // namespace diffattn::inline v0_1
