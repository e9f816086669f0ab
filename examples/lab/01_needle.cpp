// Question 1: does it find the needle? Keys with values are planted in noise, and asked: accuracy against the length of
// the context and the depth of the needle.

#include <algorithm>

#include "parts/needle.hpp"

namespace {

using lab::Index;

void measure(const lab::NeedlePoint& at) {
  if (!at.progress.last()) return;
  constexpr Index kDepths = 5;
  for (const Index context : at.options.tested()) {
    const lab::Fields fields = {{"context", std::to_string(context)}};
    const lab::TaskBatch batch = test_batch(at.options, context, 1);
    const lab::Matrix<float>& logits = at.model.logits(batch, at.pool);
    at.measure("accuracy", accuracy(logits, batch), fields);
    // The questions whose needle stands in each fifth of the context.
    for (Index fifth = 0; fifth < kDepths; ++fifth) {
      lab::TaskBatch part{.inputs = {}, .targets = batch.targets, .lengths = {}, .questions = {}};
      for (const auto& question : batch.questions) {
        const auto of = std::min(static_cast<Index>(question.depth * kDepths), kDepths - 1);
        if (of == fifth) part.questions.push_back(question);
      }
      lab::Fields of_fifth = fields;
      of_fifth.emplace_back("depth", lab::text_of((static_cast<double>(fifth) + 0.5) / kDepths));
      at.measure("accuracy_by_depth", accuracy(logits, part), of_fifth);
    }
  }
  at.measure_validation_loss();
}

}  // namespace

int main(int argc, char** argv) {
  return lab::needle_program(
      "Question 1 of the lab: accuracy of recall against length of context and depth of the needle.", "needle", {},
      argc, argv, measure);
}
