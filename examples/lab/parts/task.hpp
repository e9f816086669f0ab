#pragma once

// What the models of the lab are asked: batches of token sequences with targets, of which most may not count.

#include <cstdint>
#include <diffattn/core/matrix.hpp>
#include <diffattn/core/random.hpp>
#include <diffattn/training/batch_sampler.hpp>
#include <diffattn/training/token_file.hpp>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace lab {

using diffattn::Index;

/// Sequences one after another, as a Decoder takes them.
struct TaskBatch {
  std::vector<Index> inputs;
  std::vector<Index> targets;  ///< diffattn::kIgnoreTarget where nothing is asked
  std::vector<Index> lengths;
  /// Where a token is asked whose answer stands in the context: one entry for each question, in the order of the rows.
  struct Question {
    Index row;     ///< of the batch: its target is asked
    Index answer;  ///< the row of the batch at which the answer stands
    double depth;  ///< where in the context the answer stands: 0 first, 1 last
  };
  std::vector<Question> questions;
};

/// Draws batches: the same for a seed, whichever model asks.
class Task {
 public:
  Task() = default;
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;
  virtual ~Task() = default;
  virtual Index vocab_size() const = 0;
  /// Batch number `number` of a stream: any of them can be drawn at any time, so that a resumed run goes on with the
  /// next one. Streams with different seeds have nothing in common.
  virtual void draw(TaskBatch& batch, std::uint64_t seed, Index number) = 0;
};

/// Needles among distractors. A context holds `keys` keys with their values, at random places between noise; then
/// `asked` of the keys come once more, and the model has to say their values:
///
///   carried        noise noise [K7 V3] noise [K2 V9] noise …  |  K2 K7 …          one token has both; asked is V9, V3
///   not carried    noise noise K7 V3 noise K2 V9 noise …  |  K2 V9 K7 V3 …        the value stands behind its key
///
/// Keys of a sequence differ; values are drawn freely, so that chance is 1 / value_kinds.
struct RecallConfig {
  /// Tokens before the questions. Every batch has one of these, drawn anew: short ones teach what is to be done, long
  /// ones to do it well. A stream begins with the first alone, and the next joins every `grow_every` batches.
  std::vector<Index> contexts = {64};
  Index grow_every = 0;
  Index keys = 8;        ///< planted
  Index asked = 8;       ///< of them
  Index tokens = 1280;   ///< of a batch, about: as many sequences as make them, one at least
  Index key_kinds = 16;  ///< different keys
  Index value_kinds = 16;
  Index noise_kinds = 32;
  bool carried = true;  ///< a needle is one token

  /// Throws std::runtime_error, naming the option, for sizes that do not fit.
  void check() const;
  Index needle_tokens() const { return carried ? 1 : 2; }
  Index vocab_size() const { return key_kinds + value_kinds + noise_kinds + (carried ? key_kinds * value_kinds : 0); }
  double chance() const { return 1.0 / static_cast<double>(value_kinds); }
};

class RecallTask final : public Task {
 public:
  explicit RecallTask(const RecallConfig& config);
  Index vocab_size() const override { return config_.vocab_size(); }
  void draw(TaskBatch& batch, std::uint64_t seed, Index number) override;
  const RecallConfig& config() const { return config_; }

 private:
  void draw_sequence(TaskBatch& batch, Index context, diffattn::SplitMix64& random);

  RecallConfig config_;
};

/// A text byte by byte. The last tenth is for validation, the rest for training.
class Text {
 public:
  /// Throws std::runtime_error, naming the file, if it cannot be read or is too short for `length`.
  Text(const std::filesystem::path& path, Index length);
  std::span<const std::uint8_t> training() const { return bytes_.first(training_size_); }
  std::span<const std::uint8_t> validation() const { return bytes_.subspan(training_size_); }

 private:
  diffattn::TokenFile<std::uint8_t> file_;
  std::span<const std::uint8_t> bytes_;
  std::size_t training_size_;
};

/// Windows of some bytes, each byte asked.
class TextTask final : public Task {
 public:
  TextTask(std::span<const std::uint8_t> bytes, Index length, Index batch)
      : bytes_(bytes), length_(length), batch_(batch) {}
  Index vocab_size() const override { return 256; }
  void draw(TaskBatch& batch, std::uint64_t seed, Index number) override;

 private:
  std::span<const std::uint8_t> bytes_;
  Index length_, batch_;
};

}  // namespace lab
