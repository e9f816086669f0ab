#include "parts/needle.hpp"

#include <algorithm>
#include <cstdio>
#include <diffattn/training/cross_entropy.hpp>
#include <string_view>

namespace lab {

NeedleOptions::NeedleOptions() {
  // In the first the needles stand alone: they are found in a hundred steps, where among noise they are not in thousands.
  recall.contexts = {6, 12, 32, 128, 512};
  recall.grow_every = 100;
  recall.keys = recall.asked = 6;
  recall.key_kinds = recall.value_kinds = 12;
  recall.noise_kinds = 32;
  recall.tokens = 640;
  models = kModelNames;
  learning_rates = {3e-3, 6e-3};
  steps = 1000;
}

void NeedleOptions::shrink() {
  smoke = true;
  recall.contexts = {8, 16};
  recall.keys = recall.asked = recall.key_kinds = recall.value_kinds = 4;
  recall.noise_kinds = 8;
  recall.tokens = 64;
  recall.grow_every = 2;
  unseen_contexts = {20};
  test_sequences = 3;
  steps = 4;
  width = 32;
  head_dim = 8;
  seeds = {1};
  learning_rates = {3e-3};
}

std::vector<Index> NeedleOptions::tested() const {
  std::vector<Index> contexts = recall.contexts;
  contexts.insert(contexts.end(), unseen_contexts.begin(), unseen_contexts.end());
  return contexts;
}

RecallConfig NeedleOptions::test(Index context) const {
  RecallConfig config = recall;
  config.contexts = {context};
  config.grow_every = 0;
  config.tokens = test_sequences * (context + recall.needle_tokens() * recall.asked);
  return config;
}

Fields NeedleOptions::configuration() const {
  const auto text = [](Index number) { return std::to_string(number); };
  std::string contexts;
  for (const Index context : recall.contexts) contexts += (contexts.empty() ? "" : " ") + text(context);
  return {{"layers", text(layers)},
          {"width", text(width)},
          {"head_dim", text(head_dim)},
          {"trained_contexts", contexts},
          {"grow_every", text(recall.grow_every)},
          {"keys", text(recall.keys)},
          {"asked", text(recall.asked)},
          {"kinds", text(recall.key_kinds) + " " + text(recall.value_kinds) + " " + text(recall.noise_kinds)},
          {"carried", recall.carried ? "yes" : "no"},
          {"test_sequences", text(test_sequences)},
          {"step_tokens", text(recall.tokens)},
          {"steps", text(steps)},
          {"chance", text_of(recall.chance())}};
}

void NeedlePoint::measure(const std::string& measurement, double value, const Fields& fields) const {
  Fields all = {{"step", std::to_string(progress.step)}};
  all.insert(all.end(), fields.begin(), fields.end());
  file.measure(run, model.parameters(), measurement, value, all);
}

void NeedlePoint::measure_accuracy() const {
  for (const Index context : options.tested()) {
    const TaskBatch batch = test_batch(options, context, 1);
    measure("accuracy", accuracy(model.logits(batch, pool), batch), {{"context", std::to_string(context)}});
  }
}

void NeedlePoint::measure_validation_loss() const {
  double sum = 0;
  for (const Index context : options.recall.contexts) {
    const TaskBatch batch = test_batch(options, context, 0);
    sum += diffattn::cross_entropy(model.logits(batch, pool), batch.targets).mean;
  }
  measure("validation_loss", sum / static_cast<double>(options.recall.contexts.size()),
          {{"tokens", text_of(progress.tokens)}, {"seconds", text_of(progress.seconds)}});
}

int needle_program(const char* about, const std::string& experiment, NeedleOptions options, int argc, char** argv,
                   const std::function<void(const NeedlePoint&)>& measure) {
  // Before the others, which then stand as they were asked for.
  if (std::find(argv, argv + argc, std::string_view("--smoke")) != argv + argc) options.shrink();
  const auto run_all = [&] {
    Budget budget(options.minutes);
    diffattn::ThreadPool pool(options.threads);
    RecallTask task(options.recall);
    MeasurementFile file(options.out, experiment, options.configuration());
    // Seeds outermost: whenever it stops, all models have as many.
    for (const std::uint64_t seed : options.seeds) {
      for (const double rate : options.learning_rates) {
        for (const std::string& name : options.models) {
          const Run run{.model = name, .seed = seed, .fields = {{"learning_rate", text_of(rate)}}};
          if (file.has(run)) continue;
          Plan plan = plan_of(options, name, task.vocab_size(), seed, rate, joined(options.configuration()));
          plan.measure_every = std::max<Index>(1, options.steps / 6);
          train(plan, task, budget, pool, [&](Model& model, const Progress& progress) {
            if (progress.step == 0) {
              std::printf("%s, seed %lu, learning rate %g: %ld parameters\n", name.c_str(),
                          static_cast<unsigned long>(seed), rate, model.parameters());
              std::fflush(stdout);
            }
            measure({options, run, model, progress, file, pool});
          });
          file.finish(run);
        }
      }
    }
    std::printf("%s: %ld runs are in %s\n", experiment.c_str(), file.runs(), file.path().c_str());
  };
  return run_program(
      about, argc, argv, [&](CLI::App& app) { options.declare(app); }, run_all);
}

TaskBatch test_batch(const NeedleOptions& options, Index context, Index stream) {
  constexpr std::uint64_t kTestSeed = 0x7e57;
  RecallTask task(options.test(context));
  TaskBatch batch;
  task.draw(batch, kTestSeed, stream);
  return batch;
}

TaskBatch sequence_of(const TaskBatch& batch, Index number) {
  const Index length = batch.lengths.front(), first = number * length;
  const auto slice = [&](const std::vector<Index>& values) {
    return std::vector<Index>(values.begin() + first, values.begin() + first + length);
  };
  TaskBatch one{.inputs = slice(batch.inputs), .targets = slice(batch.targets), .lengths = {length}, .questions = {}};
  for (TaskBatch::Question question : batch.questions) {
    question.row -= first;
    question.answer -= first;
    if (question.row >= 0 && question.row < length) one.questions.push_back(question);
  }
  return one;
}

}  // namespace lab
