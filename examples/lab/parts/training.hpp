#pragma once

// Training as the lab does it: the same batches, order and schedule for every model, and what was done is never done
// again. At every point of measurement the model is saved; a program that is called again, or another program that asks
// for the same training, takes it from there.

#include <chrono>
#include <cstdint>
#include <diffattn/core/parallel_threads.hpp>
#include <filesystem>
#include <functional>
#include <string>

#include "parts/measurement_file.hpp"
#include "parts/model.hpp"
#include "parts/options.hpp"
#include "parts/task.hpp"

namespace lab {

/// How far a training is.
struct Progress {
  Index step = 0;   ///< steps that were taken
  Index steps = 0;  ///< of all
  double tokens = 0;
  double seconds = 0;                ///< of the CPU, in training steps alone
  double training_loss = 0;          ///< mean since the last point; 0 at step 0
  double largest_gradient_norm = 0;  ///< before clipping, behind the warm-up
  double largest_rise = 0;           ///< of the smoothed training loss above the least it had before
  bool last() const { return step == steps; }
};

/// The time that a program has. It starts with the object.
class Budget {
 public:
  /// 0 minutes: as long as it takes.
  explicit Budget(double minutes) : minutes_(minutes) {}
  bool used_up() const;
  void count_measurement() { ++measurements_; }
  /// Throws: Pause with `what_is_saved`, or std::runtime_error if the budget was too small for one measurement.
  [[noreturn]] void stop(const std::string& what_is_saved) const;

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  double minutes_;
  Index measurements_ = 0;
};

struct Plan {
  ModelSpec model;
  std::string made_with;  ///< what a saved model must have been made with, beside the sizes in its name
  double learning_rate = 3e-3;
  Index steps = 0;
  Index measure_every = 0;       ///< steps from one point of measurement to the next; the last step is always one
  std::filesystem::path folder;  ///< of the saved models
  bool keep_models = true;       ///< once the training has come to its end

  /// The folder of this training.
  std::filesystem::path path() const;
};

/// Trains on `task`, whose stream is that of the model's seed, and calls `measure` at step 0, at every point and at the end.
/// Throws std::runtime_error for a loss that is no number, or a saved model of another configuration; Pause.
using Measure = std::function<void(Model& model, const Progress& progress)>;
void train(const Plan& plan, Task& task, Budget& budget, diffattn::ThreadPool& pool, const Measure& measure);

/// The plan that the options ask for.
Plan plan_of(const Options& options, const std::string& model, Index vocab_size, std::uint64_t seed, double rate,
             const std::string& made_with);

/// step, steps, tokens and seconds, for the rows of a measurement.
Fields fields_of(const Progress& progress);

/// The fraction of the batch's questions whose answer has the largest logit.
double accuracy(const Matrix<float>& logits, const TaskBatch& batch);

}  // namespace lab
