#pragma once

// What example 11 says of a model whose tokens are bytes.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <diffattn/models/generate.hpp>
#include <diffattn/training/batch_sampler.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/printable.hpp"

namespace example {

/// Throws std::runtime_error for a model from `directory` whose tokens are not bytes.
template <typename Model>
void check_takes_bytes(const Model& model, const std::filesystem::path& directory) {
  if (model.config().vocab_size == 256) return;
  throw std::runtime_error(directory.string() + ": has " + std::to_string(model.config().vocab_size) +
                           " tokens; this example takes bytes for tokens, 256 of them");
}

/// Nats a byte over the first windows of a text, 32 at most.
template <typename Model, typename Executor>
double loss_on(const Model& model, std::span<const std::uint8_t> text, diffattn::Index length, Executor& threads) {
  diffattn::BatchSampler<std::uint8_t> windows(text, {.length = length, .seed = 0});
  diffattn::Batch batch;
  diffattn::Workspace workspace;
  diffattn::Matrix<float> logits(length, 256);
  const diffattn::Index count = std::min<diffattn::Index>(windows.windows_per_epoch(), 32);
  double sum = 0;
  for (diffattn::Index i = 0; i < count; ++i) {
    windows.next(batch);
    model.logits_into(logits, batch.inputs, workspace, threads);
    sum += diffattn::cross_entropy(logits, batch.targets).mean;
  }
  return sum / static_cast<double>(count);
}

/// What a trained or loaded model makes of the prompt.
template <typename Model>
void print_sample(const Model& model, const std::string& prompt) {
  std::string text = prompt;
  std::vector<diffattn::Index> tokens;
  for (const char c : prompt) tokens.push_back(static_cast<unsigned char>(c));
  const diffattn::GenerateOptions options{.max_new_tokens = 160, .temperature = 0.6, .top_p = 0.95, .seed = 3};
  for (const diffattn::Index token : generate(model, tokens, options)) text += static_cast<char>(token);
  std::printf("  sample: %s\n\n", printable(text).c_str());
}

}  // namespace example
