#pragma once

// One model in training: the forward and backward pass, the optimizer, its batches, its checkpoints.

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <diffattn/io/checkpoint.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/batch_sampler.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <diffattn/training/gradient_norm.hpp>
#include <diffattn/training/learning_rate.hpp>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <string>

#include "support/interruption.hpp"
#include "support/loss_curve.hpp"
#include "support/progress_line.hpp"
#include "support/thread_choice.hpp"
#include "support/training_files.hpp"
#include "support/training_options.hpp"

namespace example {

using Bytes = std::span<const std::uint8_t>;

template <typename Attention>
class TrainingRun {
 public:
  using Model = diffattn::Decoder<float, Attention>;

  TrainingRun(std::string name, const typename Model::Config& config, const TrainingOptions& options, Bytes training,
              Bytes validation)
      : model(config),
        options_(options),
        identity_(options.identity(training.size() + validation.size())),
        checkpoint_(checkpoint_path(options, name)),
        gradient_(diffattn::zeros_like(model)),
        optimizer_(model, {.beta2 = 0.99, .weight_decay = 0.1}),
        rate_({.peak = options.learning_rate,
               .warmup_steps = std::min<diffattn::Index>(100, options.steps / 10),
               .total_steps = options.steps,
               .final = options.learning_rate / 20}),
        sampler_(training, {.length = options.length, .batch_size = options.batch, .seed = options.seed}),
        validation_(validation),
        threads_(options.threads) {
    curve.name = std::move(name);
    if (options.resume && std::filesystem::exists(checkpoint_)) resume();
  }

  /// Trains to the end, reporting and saving as it goes. Throws std::runtime_error, with the step, when the loss is no
  /// number or the user interrupts: the checkpoint is then the last one before.
  void run() {
    ProgressLine progress;
    const auto start = std::chrono::steady_clock::now();
    const diffattn::Index first = optimizer_.steps;
    double sum = 0, speed = 0;
    diffattn::Index summed = 0;
    std::printf("%s: %ld parameters", curve.name.c_str(), parameter_count(model));
    std::printf(first == 0 ? "\n" : ", trained up to step %ld\n", first);
    while (optimizer_.steps < options_.steps) {
      if (interrupted != 0) {
        progress.clear();
        throw std::runtime_error(curve.name + ": stopped at step " + std::to_string(optimizer_.steps) + "; " +
                                 what_is_saved());
      }
      const double loss = step();
      sum += loss;
      ++summed;
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      speed = static_cast<double>((optimizer_.steps - first) * options_.batch * options_.length) / seconds;
      progress.show(optimizer_.steps, options_.steps, loss, speed);
      if (optimizer_.steps % options_.report_every == 0 || optimizer_.steps == options_.steps) {
        const double validation = validation_loss();
        progress.clear();
        check_finite(validation, optimizer_.steps);  // parameters that give no number are not saved
        curve.points.push_back({optimizer_.steps, sum / static_cast<double>(summed), validation});
        std::printf("  step %5ld   training %.4f   validation %.4f nats a byte   %6.0f tokens/s   %4.0f s\n",
                    optimizer_.steps, curve.points.back().training, curve.points.back().validation, speed, seconds);
        std::fflush(stdout);
        save_checkpoint(
            model, optimizer_, checkpoint_,
            {.windows_drawn = sampler_.drawn, .notes = {{"made_with", identity_}, {"curve", to_text(curve.points)}}});
        sum = 0;
        summed = 0;
      }
    }
  }

  Model model;
  LossCurve curve;

 private:
  /// Model, optimizer, batches and curve as the checkpoint has them.
  void resume() {
    // The notes first: what was made with other sizes is told by them, and not by a list of tensors.
    const diffattn::Safetensors file(checkpoint_);
    const auto note = [&](const char* key) {
      const auto found = file.metadata().find(key);
      return found == file.metadata().end() ? std::string() : found->second;
    };
    if (const std::string made_with = note("made_with"); !made_with.empty() && made_with != identity_) {
      throw std::runtime_error(checkpoint_.string() + ": was made with " + made_with + "; this is " + identity_);
    }
    curve.points = curve_from_text(note("curve"));
    sampler_.drawn = load_checkpoint(model, optimizer_, checkpoint_).windows_drawn;
  }

  double step() {
    const auto start = std::chrono::steady_clock::now();
    diffattn::ThreadPool& pool = threads_.pool();
    sampler_.next(batch_);
    const auto rows = static_cast<diffattn::Index>(batch_.inputs.size());
    logits_.resize(rows, model.config().vocab_size);
    model.logits_into(logits_, batch_.inputs, batch_.lengths, tape_, workspace_, pool);
    const double loss =
        cross_entropy_into(logits_, logits_, batch_.targets, diffattn::kIgnoreTarget, workspace_, pool).mean;
    set_zero(gradient_, pool);
    model.backward(logits_, tape_, gradient_, workspace_, pool);
    const double norm = clip_gradient_norm(gradient_, 1.0, pool);
    check_finite(loss, optimizer_.steps + 1);
    check_finite(norm, optimizer_.steps + 1);
    optimizer_.step(model, gradient_, rate_.at(optimizer_.steps), pool);
    threads_.took(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    return loss;
  }

  void check_finite(double value, diffattn::Index step) const {
    if (std::isfinite(value)) return;
    throw std::runtime_error(curve.name + ": a loss or gradient is " + std::to_string(value) + " at step " +
                             std::to_string(step) + "; " + what_is_saved());
  }

  std::string what_is_saved() const {
    return curve.points.empty() ? "nothing is saved yet"
                                : "step " + std::to_string(curve.points.back().step) + " is saved, --resume goes on";
  }

  /// Over the first windows of the validation text, 32 at most.
  double validation_loss() {
    diffattn::Batch batch;
    diffattn::BatchSampler<std::uint8_t> windows(validation_, {.length = options_.length, .seed = 0});
    double sum = 0;
    const diffattn::Index count = std::min<diffattn::Index>(windows.windows_per_epoch(), 32);
    for (diffattn::Index i = 0; i < count; ++i) {
      windows.next(batch);
      logits_.resize(options_.length, model.config().vocab_size);
      model.logits_into(logits_, batch.inputs, workspace_, threads_.pool());
      sum += diffattn::cross_entropy(logits_, batch.targets).mean;
    }
    return sum / static_cast<double>(count);
  }

  const TrainingOptions& options_;
  std::string identity_;  // what a checkpoint must have been made with
  std::filesystem::path checkpoint_;
  Model gradient_;
  diffattn::AdamW<float> optimizer_;
  diffattn::LearningRate rate_;
  diffattn::BatchSampler<std::uint8_t> sampler_;
  Bytes validation_;
  ThreadChoice threads_;
  diffattn::Batch batch_;
  diffattn::Matrix<float> logits_;
  typename Model::Tape tape_;
  diffattn::Workspace workspace_;
};

}  // namespace example
