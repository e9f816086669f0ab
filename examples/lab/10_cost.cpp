// Question 10: what the language models of question 4 cost: CPU time of one thread for a forward pass, forward and
// backward, a training step, and decoding behind a cache, in microseconds a byte.

#include <CLI/CLI.hpp>
#include <ctime>
#include <map>
#include <memory>

#include "parts/language.hpp"
#include "support/interruption.hpp"

namespace {

using lab::Index;

double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : 0.5 * (values[middle - 1] + values[middle]);
}

/// Seconds of every kind of pass, once.
std::map<std::string, double> time_once(lab::Model& model, const lab::TaskBatch& batch,
                                        const std::vector<Index>& decoded, Index prompt, diffattn::ThreadPool& pool) {
  std::map<std::string, double> seconds;
  double start = cpu_seconds();
  const auto lap = [&](const char* what, double bytes) {
    const double now = cpu_seconds();
    seconds[what] = (now - start) / bytes;
    start = now;
  };
  const auto bytes = static_cast<double>(batch.inputs.size());
  model.logits(batch, pool);
  lap("forward", bytes);
  model.gradient(batch, pool);
  lap("forward_backward", bytes);
  model.step(batch, 1e-4, pool);
  lap("step", bytes);
  bool began = false;
  model.decode(decoded, prompt, [&] {
    if (began) lap("decode", static_cast<double>(decoded.size()) - static_cast<double>(prompt));
    began = true;
    start = cpu_seconds();
  });
  return seconds;
}

}  // namespace

int main(int argc, char** argv) {
  lab::LanguageOptions options;
  Index rounds = 21;
  const auto declare = [&](CLI::App& app) {
    options.declare(app);
    app.add_option("--rounds", rounds, "passes of each model, by turns")
        ->check(CLI::Range(1L, 100000L))
        ->capture_default_str();
  };
  const auto experiment = [&] {
    options.shrink();
    if (options.smoke) rounds = 2;
    const lab::Text text(options.text, 2 * options.length);
    lab::TaskBatch batch;
    lab::TextTask(text.training(), options.length, options.batch).draw(batch, 1, 0);
    const std::vector<Index> decoded = held_out(text, 2 * options.length, 1).inputs;
    lab::MeasurementFile file(options.out, "cost", options.configuration());
    lab::Budget budget(options.minutes);
    diffattn::ThreadPool pool(options.threads);
    for (const std::uint64_t seed : options.seeds) {
      for (const lab::LanguageSize& size : lab::kLanguageSizes) {
        std::vector<lab::Run> runs;
        std::vector<std::unique_ptr<lab::Model>> models;
        for (const std::string& name : options.models) {
          runs.push_back(
              {name, seed, {{"layers", std::to_string(size.layers)}, {"width", std::to_string(size.width)}}});
          models.push_back(make_model(options.plan(size, runs.back(), options.learning_rates.front()).model));
        }
        if (file.has(runs.back())) continue;
        if (budget.used_up() || example::interrupted != 0)
          budget.stop("what was measured is in " + file.path().string());
        std::vector<std::map<std::string, std::vector<double>>> times(models.size());
        for (Index round = -1; round < rounds; ++round) {  // the first is for caches and memory
          for (std::size_t i = 0; i < models.size(); ++i) {
            for (const auto& [what, seconds] : time_once(*models[i], batch, decoded, options.length, pool)) {
              if (round >= 0) times[i][what].push_back(1e6 * seconds);
            }
          }
        }
        for (std::size_t i = 0; i < models.size(); ++i) {
          for (const auto& [what, seconds] : times[i]) {
            file.measure(runs[i], models[i]->parameters(), what, median(seconds));
          }
        }
        for (const lab::Run& run : runs) file.finish(run);  // the first writes what was measured of all
        budget.count_measurement();
      }
    }
  };
  return lab::run_program("Question 10 of the lab: what the models of question 4 cost.", argc, argv, declare,
                          experiment);
}
