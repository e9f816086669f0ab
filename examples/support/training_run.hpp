#pragma once

// One model in training: the forward and backward pass, the optimizer, its batches, its checkpoints.

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/batch_sampler.hpp>
#include <diffattn/training/checkpoint.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <diffattn/training/gradient_norm.hpp>
#include <diffattn/training/learning_rate.hpp>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <string>

#include "support/loss_curve.hpp"
#include "support/progress_line.hpp"
#include "support/training_options.hpp"

namespace example {

using Bytes = std::span<const std::uint8_t>;

template <typename Attention>
class TrainingRun {
 public:
  using Model = diffattn::Decoder<float, Attention>;

  TrainingRun(std::string name, const typename Model::Config& config, const TrainingOptions& options, Bytes training,
              Bytes validation, diffattn::ThreadPool& pool)
      : model(config),
        options_(options),
        checkpoint_(options.out / (name + ".safetensors")),
        gradient_(diffattn::zeros_like(model)),
        optimizer_(model, {.beta2 = 0.99, .weight_decay = 0.1}),
        rate_({.peak = options.learning_rate,
               .warmup_steps = std::min<diffattn::Index>(100, options.steps / 10),
               .total_steps = options.steps,
               .final = options.learning_rate / 20}),
        sampler_(training, {.length = options.length, .batch_size = options.batch, .seed = options.seed}),
        validation_(validation),
        pool_(pool) {
    curve.name = std::move(name);
    if (options.resume && std::filesystem::exists(checkpoint_))
      sampler_.drawn = load_checkpoint(checkpoint_, model, optimizer_).windows_drawn;
  }

  /// Trains to the end, reporting and saving as it goes. Throws std::runtime_error, with the step, when the loss is no
  /// number: the checkpoint is then the last one before.
  void run() {
    ProgressLine progress;
    const auto start = std::chrono::steady_clock::now();
    const diffattn::Index first = optimizer_.steps;
    double sum = 0, speed = 0;
    diffattn::Index summed = 0;
    std::printf("%s: %ld parameters\n", curve.name.c_str(), parameter_count(model));
    while (optimizer_.steps < options_.steps) {
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
        save_checkpoint(checkpoint_, model, optimizer_, {.windows_drawn = sampler_.drawn});
        sum = 0;
        summed = 0;
      }
    }
  }

  Model model;
  LossCurve curve;

 private:
  double step() {
    sampler_.next(batch_);
    const auto rows = static_cast<diffattn::Index>(batch_.inputs.size());
    logits_.resize(rows, model.config().vocab_size);
    model.logits_into(logits_, batch_.inputs, batch_.lengths, tape_, workspace_, pool_);
    const double loss =
        cross_entropy_into(logits_, logits_, batch_.targets, diffattn::kIgnoreTarget, workspace_, pool_).mean;
    set_zero(gradient_);
    model.backward(logits_, tape_, gradient_, workspace_, pool_);
    const double norm = clip_gradient_norm(gradient_, 1.0);
    check_finite(loss, optimizer_.steps + 1);
    check_finite(norm, optimizer_.steps + 1);
    optimizer_.step(model, gradient_, rate_.at(optimizer_.steps), pool_);
    return loss;
  }

  void check_finite(double value, diffattn::Index step) const {
    if (std::isfinite(value)) return;
    throw std::runtime_error(
        curve.name + ": a loss or gradient is " + std::to_string(value) + " at step " + std::to_string(step) + "; " +
        (std::filesystem::exists(checkpoint_) ? "the last good checkpoint is " + checkpoint_.string()
                                              : std::string("there is no checkpoint yet")));
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
      model.logits_into(logits_, batch.inputs, workspace_, pool_);
      sum += diffattn::cross_entropy(logits_, batch.targets).mean;
    }
    return sum / static_cast<double>(count);
  }

  const TrainingOptions& options_;
  std::filesystem::path checkpoint_;
  Model gradient_;
  diffattn::AdamW<float> optimizer_;
  diffattn::LearningRate rate_;
  diffattn::BatchSampler<std::uint8_t> sampler_;
  Bytes validation_;
  diffattn::ThreadPool& pool_;
  diffattn::Batch batch_;
  diffattn::Matrix<float> logits_;
  typename Model::Tape tape_;
  diffattn::Workspace workspace_;
};

}  // namespace example
