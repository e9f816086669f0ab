#pragma once

// The needle task as experiments 1, 2, 3, 5 and 6 ask it, with what can be chosen of it on their command lines.

#include <functional>
#include <string>

#include "parts/options.hpp"
#include "parts/training.hpp"

namespace lab {

struct NeedleOptions : Options {
  RecallConfig recall;
  std::vector<Index> unseen_contexts = {1024, 2048};  ///< that a model is tested on, too
  Index test_sequences = 40;                          ///< of each context

  /// What the experiments have in common.
  NeedleOptions();

  void declare(CLI::App& app);
  /// What --smoke makes of it.
  void shrink();
  /// Contexts to test on: those of training, and the unseen ones.
  std::vector<Index> tested() const;
  /// A task of one context, to test on.
  RecallConfig test(Index context) const;
  /// What all runs of a file have in common.
  Fields configuration() const;
};

/// One model at one point of its training, and where its measurements go.
struct NeedlePoint {
  const NeedleOptions& options;
  const Run& run;
  Model& model;
  const Progress& progress;
  MeasurementFile& file;
  diffattn::ThreadPool& pool;

  /// A measurement here; `fields` say more than how far the training is.
  void measure(const std::string& measurement, double value, const Fields& fields = {}) const;
  /// Accuracy at every tested context, as "accuracy".
  void measure_accuracy() const;
  /// Mean loss over tests of all contexts that are no test of anything else: what a learning rate is chosen by.
  void measure_validation_loss() const;
};

/// main of an experiment: trains every model with every seed and rate, unless it is in the file or saved, and measures it
/// at every point.
int needle_program(const char* about, const std::string& experiment, NeedleOptions options, int argc, char** argv,
                   const std::function<void(const NeedlePoint&)>& measure);

/// A batch of one context for tests, the same for all models and seeds; `stream` tells one for choices (0) from the one
/// that is reported (1).
TaskBatch test_batch(const NeedleOptions& options, Index context, Index stream);

/// One of the batch's sequences, with its questions' rows counted from its beginning.
TaskBatch sequence_of(const TaskBatch& batch, Index number);

}  // namespace lab
