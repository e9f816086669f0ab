// Question 3: how can a difference that is not normalised amplify? Row sums and negative mass of the differential maps,
// the answer's weight against that of noise in P1 and in A, and the size of a head's result before its norm and behind
// it, through training.

#include <cmath>
#include <diffattn/analysis/statistics.hpp>
#include <set>

#include "parts/needle.hpp"

namespace {

using lab::Index;
using lab::Matrix;

constexpr Index kSequences = 5;

struct Sums {
  double row_sum = 0, negative = 0, count = 0;
  double answer_p1 = 0, noise_p1 = 0, answer_map = 0, noise_map = 0;  // the weight of one key, signs kept
  double before = 0, after = 0, rows = 0;                             // squares of entries

  void add_maps(const diffattn::AttentionMaps<float>& head, const lab::TaskBatch& sequence,
                const std::set<Index>& needles) {
    const auto negatives = diffattn::negative_mass(head.combined);
    for (const auto& question : sequence.questions) {
      row_sum += static_cast<double>(head.combined.row(question.row).sum());
      negative += static_cast<double>(negatives(question.row));
      answer_p1 += static_cast<double>(head.p1(question.row, question.answer));
      answer_map += static_cast<double>(head.combined(question.row, question.answer));
      double of_p1 = 0, of_map = 0, keys = 0;
      for (Index key = 0; key <= question.row; ++key) {
        if (needles.count(key) != 0) continue;
        of_p1 += static_cast<double>(std::abs(head.p1(question.row, key)));
        of_map += static_cast<double>(std::abs(head.combined(question.row, key)));
        keys += 1;
      }
      noise_p1 += of_p1 / keys;
      noise_map += of_map / keys;
      count += 1;
    }
  }
  void add_heads(const lab::Model::HeadOutputs& heads, const lab::TaskBatch& sequence) {
    for (const auto& question : sequence.questions) {
      before +=
          static_cast<double>(heads.before.row(question.row).squaredNorm()) / static_cast<double>(heads.before.cols());
      after +=
          static_cast<double>(heads.after.row(question.row).squaredNorm()) / static_cast<double>(heads.after.cols());
      rows += 1;
    }
  }
};

void measure(const lab::NeedlePoint& at) {
  const Index context = at.options.recall.contexts.back();
  const lab::TaskBatch batch = test_batch(at.options, context, 1);
  std::vector<Sums> layers(static_cast<std::size_t>(at.options.layers));
  for (Index s = 0; s < std::min<Index>(kSequences, static_cast<Index>(batch.lengths.size())); ++s) {
    const lab::TaskBatch sequence = sequence_of(batch, s);
    std::set<Index> needles;
    for (const auto& question : sequence.questions) needles.insert(question.answer);
    const auto maps = at.model.maps(sequence.inputs);
    const auto heads = at.model.head_outputs(sequence.inputs);
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      for (const auto& head : maps[layer]) layers[layer].add_maps(head, sequence, needles);
      layers[layer].add_heads(heads[layer], sequence);
    }
  }
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    const Sums& sums = layers[layer];
    const lab::Fields fields = {{"context", std::to_string(context)}, {"layer", std::to_string(layer)}};
    at.measure("row_sum", sums.row_sum / sums.count, fields);
    at.measure("negative_mass", sums.negative / sums.count, fields);
    at.measure("answer_to_noise_p1", sums.answer_p1 / sums.noise_p1, fields);
    at.measure("answer_to_noise_map", sums.answer_map / sums.noise_map, fields);
    at.measure("head_rms_before_norm", std::sqrt(sums.before / sums.rows), fields);
    at.measure("head_rms_after_norm", std::sqrt(sums.after / sums.rows), fields);
  }
  if (at.progress.last()) at.measure_validation_loss();
}

}  // namespace

int main(int argc, char** argv) {
  return lab::needle_program("Question 3 of the lab: how a difference that is not normalised amplifies.",
                             "amplification", {}, argc, argv, measure);
}
