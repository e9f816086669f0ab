#pragma once

// The models that the lab compares, behind one interface, so that programs compile without their templates. Whatever
// differs between two of them stands in ModelSpec; all are diffattn::Decoder with another attention layer.

#include <cstdint>
#include <diffattn/analysis/model_maps.hpp>
#include <diffattn/core/matrix.hpp>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/io/checkpoint.hpp>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "parts/rounded.hpp"
#include "parts/task.hpp"

namespace lab {

using diffattn::Matrix;

struct ModelSpec {
  /// One of kModelNames or of the variants that model.cpp lists.
  std::string name = "transformer";
  Index vocab_size = 256;
  Index layers = 2;
  Index width = 64;
  Index head_dim = 16;
  std::uint64_t seed = 1;
  Index hidden_dim = 0;  ///< 0: 8/3 of the width for the Transformer, and what gives as many parameters for the others
};

/// The four that most questions compare.
inline const std::vector<std::string> kModelNames = {"transformer", "differential", "v2", "grouped"};
/// Those of question 5: differential attention whole, and with a part of it changed or left out.
inline const std::vector<std::string> kLambdaModels = {"transformer",
                                                       "differential",
                                                       "v2",
                                                       "differential-raw",
                                                       "differential-fixed",
                                                       "differential-init-0.5",
                                                       "differential-init-0.8",
                                                       "differential-no-norm",
                                                       "differential-no-scale",
                                                       "differential-no-norm-no-scale"};

/// One step's loss before it, and the norm of its gradient before it was clipped to 1.
struct StepResult {
  double loss;
  double gradient_norm;
};

class Model {
 public:
  Model() = default;
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  virtual ~Model() = default;

  virtual Index parameters() const = 0;
  virtual Index hidden_dim() const = 0;
  /// Forward, backward, AdamW. A loss or norm that is no number changes nothing.
  virtual StepResult step(const TaskBatch& batch, double learning_rate, diffattn::ThreadPool& pool) = 0;
  /// The logits of every row of the batch, valid until the next call.
  virtual const Matrix<float>& logits(const TaskBatch& batch, diffattn::ThreadPool& pool) = 0;
  /// maps[layer][head] for one sequence.
  virtual diffattn::ModelMaps<float> maps(const std::vector<Index>& tokens) const = 0;
  /// What every head of a layer gives for one sequence before its norm (or before the output projection, where there is
  /// none), and after: rows of num_heads · width of a head. Equal where there is no norm.
  struct HeadOutputs {
    Matrix<float> before, after;
    Index head_width;
  };
  virtual std::vector<HeadOutputs> head_outputs(const std::vector<Index>& tokens) const = 0;
  /// λ of every layer: learned ones as they are, V2's as the mean over `batch`; empty where there is none.
  virtual std::vector<double> lambdas(const TaskBatch& batch) const = 0;
  /// All λ become this number, whatever they were: for measurements, not for training. False where there is none.
  virtual bool force_lambda(double lambda) = 0;

  /// The gradient of the batch, which is not applied: forward and backward.
  virtual StepResult gradient(const TaskBatch& batch, diffattn::ThreadPool& pool) = 0;
  /// The logits of a sequence, with every attention score rounded to so many bits, as rounded.hpp says; 0: as it is. What
  /// the values on the way were is added to *seen, if there is one. Throws std::runtime_error for models other than
  /// "transformer", "differential" and "grouped".
  virtual Matrix<float> rounded(const std::vector<Index>& tokens, int bits, InnerValues* seen) const = 0;
  /// Reads the first `prompt` tokens at once, and then the others one by one behind a cache; calls `between` before
  /// and behind the latter.
  virtual void decode(const std::vector<Index>& tokens, Index prompt, const std::function<void()>& between) const = 0;

  virtual Index steps_done() const = 0;
  virtual void save(const std::filesystem::path& path, const diffattn::TrainingState& state) const = 0;
  virtual diffattn::TrainingState load(const std::filesystem::path& path) = 0;
};

/// Throws std::runtime_error for an unknown name, std::invalid_argument for sizes that cannot be.
std::unique_ptr<Model> make_model(const ModelSpec& spec);

}  // namespace lab
