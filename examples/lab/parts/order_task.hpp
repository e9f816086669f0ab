#pragma once

// Classification from examples in the context, for the question of their order.

#include <cstdint>
#include <diffattn/core/matrix.hpp>
#include <diffattn/core/random.hpp>
#include <vector>

#include "parts/task.hpp"

namespace lab {

/// Items fall into groups, always the same. In every sequence each group has a label of its own, drawn anew, so that an
/// item's label can be known from the examples before it alone:
///
///   [item 7] [item 7 is B] [item 2] [item 2 is A] [item 5] [item 5 is B] …      asked: the label, at every bare item
///
/// An example is one token that stands for item and label together: with two tokens a model has first to find out that a
/// label belongs to the item before it, and both models spend thousands of steps on that. Some examples
/// are wrong (`noise`), so that it takes several to be sure, and their order matters.
struct OrderConfig {
  Index groups = 4;
  Index members = 2;   ///< items of a group
  Index labels = 4;    ///< one for each group, or more
  Index shots = 16;    ///< examples of a sequence
  Index batch = 32;    ///< sequences
  double noise = 0.3;  ///< part of the examples that show a label at random
  Index quiet = 0;     ///< batches at the beginning of a stream that have no noise: with it nothing is learnt for long

  /// Throws std::runtime_error, naming the option, for sizes that do not fit.
  void check() const;
  Index items() const { return groups * members; }
  Index example(Index item, Index label) const { return items() + item * labels + label; }
  Index label_token(Index label) const { return items() + items() * labels + label; }
  Index length() const { return 2 * shots; }
};

/// What a sequence shows: an item, the label that stands beside it, and its true one.
struct Shot {
  Index item;
  Index shown;
  Index truth;
};

class OrderTask final : public Task {
 public:
  explicit OrderTask(const OrderConfig& config);
  Index vocab_size() const override { return config_.label_token(config_.labels); }
  void draw(TaskBatch& batch, std::uint64_t seed, Index number) override;
  double chance() const { return 1.0 / static_cast<double>(config_.labels); }
  const OrderConfig& config() const { return config_; }

  /// The label of every group of a new sequence.
  std::vector<Index> draw_labels(diffattn::SplitMix64& random) const;
  Shot draw_shot(const std::vector<Index>& label_of_group, diffattn::SplitMix64& random) const {
    return draw_shot(label_of_group, random, config_.noise);
  }
  /// Appends a sequence of the shots, each asked before it is shown. Only rows from shot `asked_from` on have targets.
  void append(TaskBatch& batch, const std::vector<Shot>& shots, Index asked_from) const;

 private:
  Shot draw_shot(const std::vector<Index>& label_of_group, diffattn::SplitMix64& random, double noise) const;

  OrderConfig config_;
};

}  // namespace lab
