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
// Ranks    where several processes or threads share the work, each has a sampler of the same config but for `rank`. A
//          batch is the same for any number of ranks, and rank r gets the sequences from r · batch_size / num_ranks on.
// State    how many windows were drawn, by all ranks together: with the same tokens and config, setting `drawn` resumes,
//          also on another number of ranks.
// Errors   std::invalid_argument if there are not at least length + 1 tokens, or a count is below 1, or a batch would
//          be more than memory holds or less than a sequence for each rank. After std::bad_alloc a sampler is as before.
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
  Index length = 0;      ///< inputs in a sequence
  Index batch_size = 1;  ///< sequences of all ranks together
  std::uint64_t seed = 0;
  Index rank = 0;  ///< from 0 to num_ranks − 1
  Index num_ranks = 1;
};

struct Batch {
  std::vector<Index> inputs;
  std::vector<Index> targets;  ///< the token after each input
  std::vector<Index> lengths;  ///< of the sequences: `length` for each
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
    if (config.rank < 0 || config.rank >= config.num_ranks) {
      detail::throw_invalid(
          {"BatchSampler: rank must be from 0 to num_ranks - 1, got ", config.rank, " of ", config.num_ranks});
    }
    if (config.batch_size < config.num_ranks) {
      detail::throw_invalid({"BatchSampler: a batch must have a sequence for each of ", config.num_ranks,
                             " ranks, got batch_size ", config.batch_size});
    }
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
    const Index first = first_of_rank(config_.rank), count = first_of_rank(config_.rank + 1) - first;
    const auto size = static_cast<std::size_t>(count * config_.length);
    batch.inputs.resize(size);
    batch.targets.resize(size);
    batch.lengths.assign(static_cast<std::size_t>(count), config_.length);
    std::size_t at = 0;
    for (Index window = drawn + first; at < size; ++window) {
      std::size_t from = static_cast<std::size_t>(window_begin(window));
      for (Index i = 0; i < config_.length; ++i, ++at, ++from) {
        batch.inputs[at] = static_cast<Index>(tokens_[from]);
        batch.targets[at] = static_cast<Index>(tokens_[from + 1]);
      }
    }
    drawn += config_.batch_size;
  }

  Index drawn = 0;  ///< windows given out so far, by all ranks together

 private:
  // Of the sequences of a batch. Not rank · batch_size, which may be more than an Index holds.
  Index first_of_rank(Index rank) const {
    const Index each = config_.batch_size / config_.num_ranks, rest = config_.batch_size % config_.num_ranks;
    return rank * each + rank * rest / config_.num_ranks;
  }

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
