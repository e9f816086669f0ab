#pragma once

// The language models of questions 4, 7, 9 and 10: a text byte by byte, models of several sizes. A program that needs
// them trained takes from the folder of models what another has left there.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <diffattn/training/cross_entropy.hpp>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "parts/options.hpp"
#include "parts/training.hpp"

namespace lab {

/// A size, and how much longer than the smallest it is trained.
struct LanguageSize {
  Index layers, width;
  double longer;
};

/// A factor of 17 in parameters and of 31 in FLOP.
inline const std::vector<LanguageSize> kLanguageSizes = {{1, 32, 1.0}, {2, 64, 1.25}, {2, 96, 1.6}, {3, 96, 2.0}};

struct LanguageOptions : Options {
  std::filesystem::path text = DIFFATTN_EXAMPLE_DATA "/kjv.txt";
  Index length = 128;
  Index batch = 2;
  Index validation_windows = 48;
  Index points = 8;  ///< of measurement in a training

  LanguageOptions() {
    models = {"transformer", "differential"};
    learning_rates = {3e-3, 1e-2};
    steps = 2000;
    head_dim = 8;
  }

  /// Not Options::declare: the sizes are those of kLanguageSizes.
  void declare(CLI::App& app);

  /// What --smoke makes of it.
  void shrink() {
    if (!smoke) return;
    seeds = {1};
    learning_rates = {3e-3};
    length = 16;
    batch = 1;
    steps = 4;
    validation_windows = 2;
    points = 2;
  }

  /// What all language models of a folder have in common.
  Fields configuration() const {
    return {{"length", std::to_string(length)},
            {"batch", std::to_string(batch)},
            {"head_dim", std::to_string(head_dim)},
            {"smallest_steps", std::to_string(steps)}};
  }

  std::string made_with() const {
    std::string all;
    for (const auto& [key, value] : configuration()) all += key + "=" + value + ";";
    return all;
  }

  Plan plan(const LanguageSize& size, const Run& run, double rate) const {
    Plan plan = plan_of(*this, run.model, 256, run.seed, rate, made_with());
    plan.model.layers = size.layers;
    plan.model.width = size.width;
    plan.steps = std::lround(static_cast<double>(steps) * size.longer);
    plan.folder = out / "language_models";
    plan.measure_every = std::max<Index>(plan.steps / points, 1);
    return plan;
  }
};

/// Trains every model of these sizes with every seed and rate, or takes it as it was trained, and calls
/// `measure(run, size, model, progress, file)` at every point of those that the experiment's file has not.
template <typename MeasureRun>
void for_each_language_run(const LanguageOptions& options, const std::string& experiment,
                           const std::vector<LanguageSize>& sizes, const Text& text, const MeasureRun& measure) {
  Budget budget(options.minutes);
  diffattn::ThreadPool pool(options.threads);
  TextTask task(text.training(), options.length, options.batch);
  MeasurementFile file(options.out, experiment, options.configuration());
  // Seeds outermost: whenever it stops, all sizes and models have as many.
  for (const std::uint64_t seed : options.seeds) {
    for (const LanguageSize& size : sizes) {
      for (const double rate : options.learning_rates) {
        for (const std::string& model_name : options.models) {
          const Run run{.model = model_name,
                        .seed = seed,
                        .fields = {{"layers", std::to_string(size.layers)},
                                   {"width", std::to_string(size.width)},
                                   {"learning_rate", text_of(rate)}}};
          if (file.has(run)) continue;
          train(options.plan(size, run, rate), task, budget, pool,
                [&](Model& model, const Progress& progress) { measure(run, size, model, progress, file, pool); });
          file.finish(run);
          std::printf("%s: %s is measured\n", experiment.c_str(), run.identity().c_str());
          std::fflush(stdout);
        }
      }
    }
  }
}

/// A batch of held-out text, the same for all models and seeds.
inline TaskBatch held_out(const Text& text, Index length, Index windows) {
  TaskBatch batch;
  TextTask(text.validation(), length, windows).draw(batch, 0x7e57, 0);
  return batch;
}

/// −log of the probability that each row's logits give its target.
inline std::vector<double> losses_of(const Matrix<float>& logits, const std::vector<Index>& targets) {
  std::vector<double> losses;
  for (Index row = 0; row < logits.rows(); ++row) {
    const auto one = logits.row(row).cast<double>().array();
    const double largest = one.maxCoeff();
    losses.push_back(std::log((one - largest).exp().sum()) + largest - one(targets[static_cast<std::size_t>(row)]));
  }
  return losses;
}

}  // namespace lab
