#pragma once

// The language models of questions 4, 7, 9 and 10: their sizes, how they are trained, and where they are kept.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ctime>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <diffattn/training/learning_rate.hpp>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "parts/measurement_file.hpp"
#include "parts/model.hpp"
#include "parts/task.hpp"

namespace lab {

/// A size, and how much longer than the smallest it is trained.
struct LanguageSize {
  Index layers, width;
  double longer;
};

/// A factor of 17 in parameters and of 32 in FLOP.
inline const std::vector<LanguageSize> kLanguageSizes = {{1, 32, 1.0}, {2, 64, 1.25}, {2, 96, 1.6}, {3, 96, 2.0}};

struct LanguageConfig {
  std::filesystem::path text = DIFFATTN_EXAMPLE_DATA "/kjv.txt";
  std::filesystem::path out = "lab";
  std::filesystem::path models = "lab/models";  ///< where question 4 leaves what the others take
  std::vector<std::string> compared = {"transformer", "differential"};
  std::vector<std::uint64_t> seeds = {1, 2, 3};
  std::vector<double> rates = {0.003, 0.01};
  Index length = 128;
  Index batch = 2;
  Index steps = 400;  ///< of the smallest
  Index head_dim = 8;
  double minutes = 0;
  bool smoke = false;
  Index validation_windows = 48;
  Index reports = 8;  ///< validations of a run

  /// Throws CLI::Error, which app.exit() turns into a message and a status.
  void declare(CLI::App& app) {
    const auto up_to = [](long most) { return CLI::Range(1L, most); };
    app.add_option("--text", text, "any file; its bytes are the tokens")->check(CLI::ExistingFile)->capture_default_str();
    app.add_option("--out", out, "folder for the CSV")->capture_default_str();
    app.add_option("--trained", models, "folder for the trained models")->capture_default_str();
    app.add_option("--seeds", seeds, "of parameters and data")->delimiter(',')->capture_default_str();
    app.add_option("--learning-rates", rates, "peaks that are tried")
        ->delimiter(',')
        ->check(CLI::Range(1e-9, 1e9))
        ->capture_default_str();
    app.add_option("--length", length, "bytes a sequence")->check(up_to(1 << 16))->capture_default_str();
    app.add_option("--batch", batch, "sequences a step")->check(up_to(4096))->capture_default_str();
    app.add_option("--steps", steps, "of the smallest model; the largest takes twice as many")
        ->check(up_to(1 << 30))
        ->capture_default_str();
    app.add_option("--minutes", minutes, "budget: no run begins afterwards; call again to go on")
        ->check(CLI::Range(0.0, 1e6));
    app.add_flag("--smoke", smoke, "everything tiny, to see that it works");
  }
  /// What --smoke stands for.
  void shrink() {
    seeds = {1};
    length = 16;
    batch = 1;
    steps = 4;
    validation_windows = 2;
    reports = 2;
  }

  Index steps_of(const LanguageSize& size) const {
    return static_cast<Index>(std::lround(static_cast<double>(steps) * size.longer));
  }
  /// What all language models of a folder have in common.
  Fields fields() const {
    return {{"length", std::to_string(length)},
            {"batch", std::to_string(batch)},
            {"head_dim", std::to_string(head_dim)},
            {"smallest_steps", std::to_string(steps)}};
  }
};

inline ModelSpec language_spec(const std::string& model, const LanguageSize& size, const LanguageConfig& config,
                               std::uint64_t seed) {
  ModelSpec spec;
  spec.name = model;
  spec.layers = size.layers;
  spec.width = size.width;
  spec.head_dim = config.head_dim;
  spec.seed = seed;
  return spec;
}

inline Run language_run(const std::string& model, const LanguageSize& size, double rate, std::uint64_t seed) {
  return {model, seed, {{"layers", std::to_string(size.layers)}, {"width", std::to_string(size.width)},
                        {"learning_rate", text_of(rate)}}};
}

inline std::filesystem::path language_path(const LanguageConfig& config, const Run& run) {
  std::string name = run.model;
  for (const auto& [key, value] : run.fields) name += "-" + value;
  return config.models / (name + "-" + std::to_string(run.seed) + ".safetensors");
}

/// The processor's seconds of this thread: what others do on the machine does not count.
inline double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

/// Mean loss over a batch that is not trained on.
inline double loss_on(Model& model, const TaskBatch& batch, diffattn::ThreadPool& pool) {
  return diffattn::cross_entropy(model.logits(batch, pool), batch.targets).mean;
}

/// Operations of a training step: those of the forward pass, counted as ModelSize::flop_per_token does, three times.
inline double flop_of_step(const Model& model, const LanguageSize& size, const LanguageConfig& config) {
  const double context = 0.5 * static_cast<double>(config.length + 1);
  const double of_token = 2.0 * static_cast<double>(model.parameters()) +
                          4.0 * static_cast<double>(size.layers * size.width) * context;
  return 3.0 * of_token * static_cast<double>(config.batch * config.length);
}

/// How much a run jumped: the largest gradient norm, and how far the smoothed training loss rose above its least. Counts
/// from behind the warm-up on.
class Stability {
 public:
  void see(const StepResult& step, bool warm) {
    smooth_ = smooth_ == 0 ? step.loss : 0.95 * smooth_ + 0.05 * step.loss;
    if (!warm) return;
    norm_ = std::max(norm_, step.gradient_norm);
    least_ = least_ == 0 ? smooth_ : std::min(least_, smooth_);
    rise_ = std::max(rise_, smooth_ - least_);
  }
  double largest_gradient_norm() const { return norm_; }
  double largest_rise() const { return rise_; }

 private:
  double smooth_ = 0, least_ = 0, norm_ = 0, rise_ = 0;
};

/// Trains one model from its first step to its last, measures validation loss on the way, and keeps the model. Returns the
/// last of those losses. Throws std::runtime_error, naming the step, for a loss that is no number.
inline double train_language_model(const Run& run, const LanguageSize& size, double rate, const LanguageConfig& config,
                                   const Text& text, MeasurementFile& file, diffattn::ThreadPool& pool) {
  const auto model = make_model(language_spec(run.model, size, config, run.seed));
  const Index steps = config.steps_of(size), warm_up = std::max<Index>(steps / 10, 1);
  const diffattn::LearningRate schedule(
      {.peak = rate, .warmup_steps = warm_up, .total_steps = steps, .final = rate / 20});
  TextTask training(text.training(), config.length, config.batch);
  TextTask validation(text.validation(), config.length, config.validation_windows);
  TaskBatch batch, held_out;
  validation.draw(held_out, 0, 0);
  Stability stability;
  double seconds = 0, validation_loss = 0;
  const double flop = flop_of_step(*model, size, config);
  for (Index step = 1; step <= steps; ++step) {
    const double start = cpu_seconds();
    training.draw(batch, run.seed, step - 1);
    const StepResult result = model->step(batch, schedule.at(step - 1), pool);
    seconds += cpu_seconds() - start;
    if (!std::isfinite(result.loss) || !std::isfinite(result.gradient_norm)) {
      throw std::runtime_error(run.identity() + ": the loss is " + std::to_string(result.loss) + " and the gradient " +
                               std::to_string(result.gradient_norm) + " at step " + std::to_string(step));
    }
    stability.see(result, step > 2 * warm_up);
    if (step % std::max<Index>(steps / config.reports, 1) != 0 && step != steps) continue;
    validation_loss = loss_on(*model, held_out, pool);
    file.measure(run, model->parameters(), "validation_loss", validation_loss,
                 {{"step", std::to_string(step)},
                  {"steps", std::to_string(steps)},
                  {"tokens", std::to_string(step * config.batch * config.length)},
                  {"flop", text_of(flop * static_cast<double>(step))},
                  {"seconds", text_of(seconds)}});
  }
  file.measure(run, model->parameters(), "largest_gradient_norm", stability.largest_gradient_norm());
  file.measure(run, model->parameters(), "largest_rise", stability.largest_rise());
  std::filesystem::create_directories(config.models);
  model->save(language_path(config, run), {});
  return validation_loss;
}

}  // namespace lab
