#include "parts/order_task.hpp"

#include <diffattn/training/cross_entropy.hpp>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace lab {

void OrderConfig::check() const {
  if (labels < groups) {
    throw std::runtime_error("--labels " + std::to_string(labels) + ": there are " + std::to_string(groups) +
                             " groups, each with a label of its own");
  }
}

OrderTask::OrderTask(const OrderConfig& config) : config_(config) { config.check(); }

std::vector<Index> OrderTask::draw_labels(diffattn::SplitMix64& random) const {
  std::vector<Index> labels(static_cast<std::size_t>(config_.labels));
  std::iota(labels.begin(), labels.end(), Index{0});
  for (std::size_t i = 0; i < labels.size(); ++i) {
    std::swap(labels[i], labels[i + static_cast<std::size_t>(random.below(static_cast<Index>(labels.size() - i)))]);
  }
  labels.resize(static_cast<std::size_t>(config_.groups));
  return labels;
}

Shot OrderTask::draw_shot(const std::vector<Index>& label_of_group, diffattn::SplitMix64& random, double noise) const {
  const Index item = random.below(config_.items());
  const Index truth = label_of_group[static_cast<std::size_t>(item / config_.members)];
  const Index other = random.below(config_.labels);
  const bool wrong = static_cast<double>(random.below(1 << 20)) < noise * (1 << 20);
  return {item, wrong ? other : truth, truth};
}

void OrderTask::append(TaskBatch& batch, const std::vector<Shot>& shots, Index asked_from) const {
  Index number = 0;
  for (const Shot& shot : shots) {
    batch.inputs.push_back(shot.item);
    batch.targets.push_back(number++ >= asked_from ? config_.label_token(shot.truth) : diffattn::kIgnoreTarget);
    batch.inputs.push_back(config_.example(shot.item, shot.shown));
    batch.targets.push_back(diffattn::kIgnoreTarget);
  }
  batch.lengths.push_back(2 * static_cast<Index>(shots.size()));
}

void OrderTask::draw(TaskBatch& batch, std::uint64_t seed, Index number) {
  batch.inputs.clear();
  batch.targets.clear();
  batch.lengths.clear();
  batch.questions.clear();
  diffattn::SplitMix64 random((seed * 0x9e3779b97f4a7c15 + 1) ^
                              ((static_cast<std::uint64_t>(number) + 1) * 0xd1342543de82ef95));
  random.next();
  std::vector<Shot> shots(static_cast<std::size_t>(config_.shots));
  for (Index s = 0; s < config_.batch; ++s) {
    const std::vector<Index> labels = draw_labels(random);
    for (Shot& shot : shots) shot = draw_shot(labels, random, number < config_.quiet ? 0 : config_.noise);
    append(batch, shots, 0);
  }
}

}  // namespace lab
