// Question 2: where does attention go? The share of the answer, of the other needles and of the rest in each map of
// models that search for needles, by depth of the needle, and how many keys a map is spread over, before training and
// behind it. A differential map has signs: shares are those of |A| / Σ|A|.

#include <diffattn/analysis/statistics.hpp>
#include <map>
#include <set>

#include "parts/needle.hpp"

namespace {

using lab::Index;
using lab::Matrix;

constexpr Index kSequences = 6;
constexpr Index kDepths = 5;

/// Sums over questions and heads.
struct Sums {
  double answer = 0, needles = 0, entropy = 0, support = 0, count = 0;
  double answer_at[kDepths] = {}, count_at[kDepths] = {};

  void add(const Matrix<float>& map, const lab::TaskBatch& sequence, const std::set<Index>& all_answers) {
    if (map.size() == 0) return;
    for (const auto& question : sequence.questions) {
      const Matrix<float> row = map.row(question.row).cwiseAbs();
      const auto whole = static_cast<double>(row.sum());
      const double of_answer = static_cast<double>(row(0, question.answer)) / whole;
      answer += of_answer;
      for (const Index other : all_answers) {
        if (other != question.answer) needles += static_cast<double>(row(0, other)) / whole;
      }
      entropy += static_cast<double>(diffattn::row_entropy(row)(0));
      support += static_cast<double>(diffattn::effective_support(row)(0));
      count += 1;
      const auto fifth = std::min(static_cast<Index>(question.depth * kDepths), kDepths - 1);
      answer_at[fifth] += of_answer;
      count_at[fifth] += 1;
    }
  }
};

/// What a layer's maps have in common, one for each kind of map.
using OfLayer = std::map<std::string, Sums>;

std::vector<OfLayer> sums_of(const lab::NeedlePoint& at, Index context) {
  std::vector<OfLayer> layers(static_cast<std::size_t>(at.options.layers));
  const lab::TaskBatch batch = test_batch(at.options, context, 1);
  const Index sequences = std::min<Index>(kSequences, static_cast<Index>(batch.lengths.size()));
  for (Index s = 0; s < sequences; ++s) {
    const lab::TaskBatch sequence = sequence_of(batch, s);
    std::set<Index> answers;
    for (const auto& question : sequence.questions) answers.insert(question.answer);
    const auto maps = at.model.maps(sequence.inputs);
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      for (const auto& head : maps[layer]) {
        layers[layer]["p1"].add(head.p1, sequence, answers);
        layers[layer]["p2"].add(head.p2, sequence, answers);
        layers[layer]["combined"].add(head.combined, sequence, answers);
      }
    }
  }
  return layers;
}

void measure(const lab::NeedlePoint& at) {
  if (at.progress.step != 0 && !at.progress.last()) return;
  const Index context = at.options.recall.contexts.back();
  const std::vector<OfLayer> layers = sums_of(at, context);
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    for (const auto& [map, sums] : layers[layer]) {
      if (sums.count == 0) continue;
      const lab::Fields fields = {{"context", std::to_string(context)}, {"layer", std::to_string(layer)}, {"map", map}};
      at.measure("share_of_answer", sums.answer / sums.count, fields);
      at.measure("share_of_other_needles", sums.needles / sums.count, fields);
      at.measure("share_of_rest", 1 - (sums.answer + sums.needles) / sums.count, fields);
      at.measure("entropy", sums.entropy / sums.count, fields);
      at.measure("effective_support", sums.support / sums.count, fields);
      for (Index fifth = 0; at.progress.last() && fifth < kDepths; ++fifth) {
        if (sums.count_at[fifth] == 0) continue;
        lab::Fields of_fifth = fields;
        of_fifth.emplace_back("depth", lab::text_of((static_cast<double>(fifth) + 0.5) / kDepths));
        at.measure("share_of_answer_by_depth", sums.answer_at[fifth] / sums.count_at[fifth], of_fifth);
      }
    }
  }
  if (at.progress.last()) at.measure_validation_loss();
}

}  // namespace

int main(int argc, char** argv) {
  return lab::needle_program("Question 2 of the lab: where attention goes, before training and behind it.", "attention",
                             {}, argc, argv, measure);
}
