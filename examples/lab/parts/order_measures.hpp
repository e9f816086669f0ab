#pragma once

// Question 8: how much a model's answers depend on the order of the examples before them.

#include <algorithm>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <utility>
#include <vector>

#include "parts/model.hpp"
#include "parts/order_task.hpp"

namespace lab {

/// Part of the asked rows whose largest logit is the target.
inline double accuracy_of(const Matrix<float>& logits, const std::vector<Index>& targets) {
  Index right = 0, asked = 0;
  for (Index row = 0; row < logits.rows(); ++row) {
    const Index target = targets[static_cast<std::size_t>(row)];
    if (target == diffattn::kIgnoreTarget) continue;
    Index said = 0;
    logits.row(row).maxCoeff(&said);
    right += said == target ? 1 : 0;
    ++asked;
  }
  return asked == 0 ? 0 : static_cast<double>(right) / static_cast<double>(asked);
}

template <typename T>
void shuffle(std::vector<T>& values, diffattn::SplitMix64& random) {
  for (std::size_t i = values.size(); i > 1; --i) {
    std::swap(values[i - 1], values[static_cast<std::size_t>(random.below(static_cast<Index>(i)))]);
  }
}

enum class Arrangement { random, by_label };

/// The same examples in another order: any, or those with the same label behind one another, the labels in any order.
inline void arrange(std::vector<Shot>& shots, Arrangement arrangement, Index labels, diffattn::SplitMix64& random) {
  shuffle(shots, random);
  if (arrangement == Arrangement::random) return;
  std::vector<Index> place(static_cast<std::size_t>(labels));
  for (std::size_t i = 0; i < place.size(); ++i) place[i] = static_cast<Index>(i);
  shuffle(place, random);
  const auto place_of = [&](const Shot& shot) { return place[static_cast<std::size_t>(shot.shown)]; };
  std::stable_sort(shots.begin(), shots.end(), [&](const Shot& a, const Shot& b) { return place_of(a) < place_of(b); });
}

/// Accuracies of the orders of some examples: means over several sets of them.
struct OrderAccuracy {
  double mean = 0, best = 0, worst = 0;
  double margin() const { return best - worst; }
};

struct OrderTest {
  Index sets = 24;    ///< of examples, each with labels of its own
  Index orders = 10;  ///< of each set
  std::uint64_t seed = 1000;
};

/// After each order of a set every item is asked once, in a sequence of its own.
inline OrderAccuracy order_accuracy(Model& model, const OrderTask& task, Arrangement arrangement, const OrderTest& test,
                                    diffattn::ThreadPool& pool) {
  const OrderConfig& config = task.config();
  diffattn::SplitMix64 random(test.seed);
  OrderAccuracy sum;
  TaskBatch batch;
  for (Index set = 0; set < test.sets; ++set) {
    const std::vector<Index> labels = task.draw_labels(random);
    // One place is left for the question.
    std::vector<Shot> shots(static_cast<std::size_t>(config.shots - 1));
    for (Shot& shot : shots) shot = task.draw_shot(labels, random);
    double best = 0, worst = 1;
    for (Index order = 0; order < test.orders; ++order) {
      arrange(shots, arrangement, config.labels, random);
      batch = {};
      for (Index item = 0; item < config.items(); ++item) {
        std::vector<Shot> sequence = shots;
        const Index truth = labels[static_cast<std::size_t>(item / config.members)];
        sequence.push_back({item, truth, truth});
        task.append(batch, sequence, config.shots - 1);
      }
      const double accuracy = accuracy_of(model.logits(batch, pool), batch.targets);
      sum.mean += accuracy / static_cast<double>(test.orders);
      best = std::max(best, accuracy);
      worst = std::min(worst, accuracy);
    }
    sum.best += best;
    sum.worst += worst;
  }
  const auto sets = static_cast<double>(test.sets);
  return {sum.mean / sets, sum.best / sets, sum.worst / sets};
}

/// The accuracy after 0, 1, 2, … examples, over some batches that training does not see.
inline std::vector<double> accuracy_by_shots(Model& model, OrderTask& task, Index batches, diffattn::ThreadPool& pool) {
  const OrderConfig& config = task.config();
  std::vector<double> right(static_cast<std::size_t>(config.shots), 0.0);
  TaskBatch batch;
  for (Index number = 0; number < batches; ++number) {
    task.draw(batch, 1000, number);
    const Matrix<float>& logits = model.logits(batch, pool);
    for (Index row = 0; row < logits.rows(); row += 2) {
      Index said = 0;
      logits.row(row).maxCoeff(&said);
      if (said == batch.targets[static_cast<std::size_t>(row)]) {
        right[static_cast<std::size_t>(row % config.length() / 2)] += 1.0;
      }
    }
  }
  for (double& value : right) value /= static_cast<double>(batches * config.batch);
  return right;
}

}  // namespace lab
