#include "parts/task.hpp"

#include <algorithm>
#include <diffattn/training/cross_entropy.hpp>
#include <numeric>
#include <stdexcept>

namespace lab {

namespace {

/// A generator of its own for every batch of every stream.
diffattn::SplitMix64 generator(std::uint64_t seed, Index number) {
  diffattn::SplitMix64 random(seed * 0x9e3779b97f4a7c15 + 1);
  random.state ^= (static_cast<std::uint64_t>(number) + 1) * 0xd1342543de82ef95;
  random.next();
  return random;
}

/// `count` different numbers below `below`, in random order.
std::vector<Index> distinct(diffattn::SplitMix64& random, Index count, Index below) {
  std::vector<Index> all(static_cast<std::size_t>(below));
  std::iota(all.begin(), all.end(), Index{0});
  for (Index i = 0; i < count; ++i) {
    std::swap(all[static_cast<std::size_t>(i)], all[static_cast<std::size_t>(i + random.below(below - i))]);
  }
  all.resize(static_cast<std::size_t>(count));
  return all;
}

void clear(TaskBatch& batch) {
  batch.inputs.clear();
  batch.targets.clear();
  batch.lengths.clear();
  batch.questions.clear();
}

}  // namespace

void RecallConfig::check() const {
  const auto fail = [](const std::string& message) { throw std::runtime_error(message); };
  if (contexts.empty()) fail("--contexts: there must be one at least");
  for (const Index context : contexts) {
    if (keys <= context / needle_tokens()) continue;
    fail("--keys " + std::to_string(keys) + ": a context of " + std::to_string(context) + " tokens holds at most " +
         std::to_string(context / needle_tokens()) + " keys with their values");
  }
  if (keys > key_kinds) {
    fail("--keys " + std::to_string(keys) + ": there are " + std::to_string(key_kinds) + " different keys");
  }
  if (asked > keys) {
    fail("--asked " + std::to_string(asked) + ": there are " + std::to_string(keys) + " keys to ask for");
  }
}

RecallTask::RecallTask(const RecallConfig& config) : config_(config) { config.check(); }

void RecallTask::draw(TaskBatch& batch, std::uint64_t seed, Index number) {
  clear(batch);
  diffattn::SplitMix64 random = generator(seed, number);
  auto open = static_cast<Index>(config_.contexts.size());
  if (config_.grow_every > 0) open = std::min(open, 1 + number / config_.grow_every);
  const Index context = config_.contexts[static_cast<std::size_t>(random.below(open))];
  const Index length = context + config_.needle_tokens() * config_.asked;
  for (Index s = 0; s < std::max<Index>(1, config_.tokens / length); ++s) draw_sequence(batch, context, random);
}

void RecallTask::draw_sequence(TaskBatch& batch, Index context, diffattn::SplitMix64& random) {
  const RecallConfig& c = config_;
  const Index first_value = c.key_kinds, first_noise = first_value + c.value_kinds,
              first_pair = first_noise + c.noise_kinds;
  const Index width = c.needle_tokens();
  const auto begin = static_cast<Index>(batch.inputs.size());
  const auto end = static_cast<std::size_t>(begin + context + c.needle_tokens() * c.asked);
  batch.inputs.resize(end);
  batch.targets.resize(end, diffattn::kIgnoreTarget);
  batch.lengths.push_back(context + c.needle_tokens() * c.asked);
  Index* const tokens = batch.inputs.data() + begin;
  for (Index i = 0; i < context; ++i) tokens[i] = first_noise + random.below(c.noise_kinds);

  // Among the tokens, with each needle taken for one, so that every arrangement is as likely.
  std::vector<Index> places = distinct(random, c.keys, context - (width - 1) * c.keys);
  std::sort(places.begin(), places.end());
  const std::vector<Index> keys = distinct(random, c.keys, c.key_kinds);
  std::vector<Index> values(keys.size());
  for (std::size_t i = 0; i < keys.size(); ++i) {
    values[i] = random.below(c.value_kinds);
    places[i] += static_cast<Index>(i) * (width - 1);
    tokens[places[i]] = c.carried ? first_pair + keys[i] * c.value_kinds + values[i] : keys[i];
    if (!c.carried) tokens[places[i] + 1] = first_value + values[i];
  }
  const std::vector<Index> order = distinct(random, c.asked, c.keys);
  for (std::size_t q = 0; q < order.size(); ++q) {
    const auto needle = static_cast<std::size_t>(order[q]);
    const Index row = context + width * static_cast<Index>(q);
    tokens[row] = keys[needle];
    if (!c.carried) tokens[row + 1] = first_value + values[needle];
    batch.targets[static_cast<std::size_t>(begin + row)] = first_value + values[needle];
    batch.questions.push_back({begin + row, begin + places[needle] + width - 1,
                               static_cast<double>(places[needle]) / static_cast<double>(context - width)});
  }
}

Text::Text(const std::filesystem::path& path, Index length)
    : file_(path), bytes_(file_.tokens()), training_size_(bytes_.size() - bytes_.size() / 10) {
  if (validation().size() < static_cast<std::size_t>(length) + 1) {
    throw std::runtime_error(path.string() + ": has " + std::to_string(bytes_.size()) + " bytes; sequences of " +
                             std::to_string(length) + " need at least " + std::to_string(10 * (length + 1)) +
                             ", since the last tenth is for validation");
  }
}

void TextTask::draw(TaskBatch& batch, std::uint64_t seed, Index number) {
  clear(batch);
  diffattn::SplitMix64 random = generator(seed, number);
  for (Index s = 0; s < batch_; ++s) {
    const auto first = static_cast<std::size_t>(random.below(static_cast<Index>(bytes_.size()) - length_));
    for (std::size_t i = 0; i < static_cast<std::size_t>(length_); ++i) {
      batch.inputs.push_back(bytes_[first + i]);
      batch.targets.push_back(bytes_[first + i + 1]);
    }
    batch.lengths.push_back(length_);
  }
}

}  // namespace lab
