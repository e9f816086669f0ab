#pragma once

// Batches of token sequences, the same for a seed on every machine.
//
// The tokens are cut into windows of `length` inputs, each with its targets, which are the tokens one further on. Every
// epoch shifts the cuts by a random offset and visits all windows once, in random order, so that no token is preferred
// and no boundary stays where it is. Epochs follow each other without a gap: a batch may end one and begin the next.
//
//   BatchSampler<std::uint8_t> sampler(tokens, {.length = 256, .batch_size = 8, .seed = 1});
//   Batch batch;
//   sampler.next(batch);        batch.inputs and batch.targets: batch_size · length tokens, sequences one after another
//
// State    how many windows were drawn: with the same tokens and config, setting `drawn` resumes.
// Errors   std::invalid_argument if there are not at least length + 1 tokens, or a count is below 1, or a batch would
//          be more than memory holds. After std::bad_alloc a sampler is as before.
// Memory   one index a window. The tokens stay the caller's (a TokenFile maps them from disk) and have to outlive it: a
//          temporary container is refused.

#include <algorithm>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/random.hpp"
#include "diffattn/core/sizes.hpp"

namespace diffattn::inline v0_1 {

struct BatchSamplerConfig {
  Index length = 0;  ///< inputs in a sequence
  Index batch_size = 1;
  std::uint64_t seed = 0;
};

struct Batch {
  std::vector<Index> inputs;
  std::vector<Index> targets;  ///< the token after each input
  std::vector<Index> lengths;  ///< of the sequences: `length`, batch_size times
};

template <typename Token>
class BatchSampler {
 public:
  /// Throws std::invalid_argument as said above.
  BatchSampler(std::span<const Token> tokens, const BatchSamplerConfig& config) : tokens_(tokens), config_(config) {
    if (config.length < 1 || config.batch_size < 1) {
      detail::throw_invalid(
          {"BatchSampler: length and batch_size must be at least 1, got ", config.length, " and ", config.batch_size});
    }
    detail::checked_product("BatchSampler", "batch_size·length", {config.batch_size, config.length});
    const auto count = static_cast<Index>(tokens.size());
    if (count < config.length + 1) {
      detail::throw_invalid({"BatchSampler: a window of ", config.length, " inputs and their targets needs at least ",
                             config.length + 1, " tokens, got ", count});
    }
    // The last target needs a token, and so does the largest offset.
    windows_ = std::max<Index>((count - config.length) / config.length, 1);
  }

  /// The tokens would be gone before they are read: give their container a name.
  template <typename Container>
  requires(!std::is_lvalue_reference_v<Container> && !std::ranges::enable_borrowed_range<std::remove_cv_t<Container>>)
      BatchSampler(Container&& temporary, const BatchSamplerConfig& config)
  = delete;

  /// What the sampler was made with.
  const BatchSamplerConfig& config() const { return config_; }
  /// How many windows an epoch has.
  Index windows_per_epoch() const { return windows_; }

  /// Fills `batch`, whose memory is used again. Throws std::invalid_argument if `drawn` was set to a negative number.
  void next(Batch& batch) {
    if (drawn < 0) detail::throw_invalid({"BatchSampler: drawn must be 0 or more, got ", drawn});
    const auto size = static_cast<std::size_t>(config_.batch_size * config_.length);
    batch.inputs.resize(size);
    batch.targets.resize(size);
    batch.lengths.assign(static_cast<std::size_t>(config_.batch_size), config_.length);
    for (std::size_t at = 0; at < size; ++drawn) {
      std::size_t from = static_cast<std::size_t>(window_begin(drawn));
      for (Index i = 0; i < config_.length; ++i, ++at, ++from) {
        batch.inputs[at] = static_cast<Index>(tokens_[from]);
        batch.targets[at] = static_cast<Index>(tokens_[from + 1]);
      }
    }
  }

  Index drawn = 0;  ///< windows given out so far

 private:
  Index window_begin(Index window) {
    const Index epoch = window / windows_;
    if (epoch != epoch_) begin_epoch(epoch);
    return offset_ + order_[static_cast<std::size_t>(window % windows_)] * config_.length;
  }

  // Follows from the seed and the number of the epoch alone, so that any epoch can be entered anywhere.
  void begin_epoch(Index epoch) {
    SplitMix64 random(SplitMix64(config_.seed + static_cast<std::uint64_t>(epoch)).next());
    const Index surplus = static_cast<Index>(tokens_.size()) - 1 - windows_ * config_.length;
    offset_ = random.below(surplus + 1);
    order_.resize(static_cast<std::size_t>(windows_));
    for (Index i = 0; i < windows_; ++i) order_[static_cast<std::size_t>(i)] = i;
    for (Index i = windows_ - 1; i > 0; --i) {  // Fisher and Yates
      std::swap(order_[static_cast<std::size_t>(i)], order_[static_cast<std::size_t>(random.below(i + 1))]);
    }
    epoch_ = epoch;
  }

  std::span<const Token> tokens_;
  BatchSamplerConfig config_;
  Index windows_ = 0;
  Index epoch_ = -1;  // that order_ and offset_ belong to
  Index offset_ = 0;
  std::vector<Index> order_;
};

}  // namespace diffattn::inline v0_1
