#pragma once

// What example 07 asks of its files before it takes the first step, so that nothing is found out after an hour.

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "support/training_options.hpp"

namespace example {

inline std::filesystem::path checkpoint_path(const TrainingOptions& options, const std::string& model) {
  return options.out / (model + ".safetensors");
}

/// Bytes of the text that are kept for validation: the last twentieth.
inline std::size_t validation_bytes(std::size_t text_bytes) { return text_bytes / 20; }

/// Throws std::runtime_error unless both parts of the text hold a sequence and the byte behind it.
inline void check_text(const TrainingOptions& options, std::size_t bytes) {
  const auto window = static_cast<std::size_t>(options.length) + 1;
  if (validation_bytes(bytes) >= window) return;
  throw std::runtime_error(options.text.string() + ": has " + std::to_string(bytes) + " bytes; --length " +
                           std::to_string(options.length) + " needs at least " + std::to_string(20 * window) +
                           ", since the last twentieth is for validation");
}

/// Throws std::runtime_error unless heads come out even, as rotary embeddings want them.
inline void check_sizes(const TrainingOptions& options) {
  const diffattn::Index unit = 4 * options.heads();
  if (options.embed_dim % unit == 0) return;
  throw std::runtime_error("--embed-dim " + std::to_string(options.embed_dim) + ": must be a multiple of " +
                           std::to_string(unit) + ", for " + std::to_string(options.heads()) + " differential heads");
}

/// Makes the folder, and throws std::runtime_error if nothing can be written there or, to resume, nothing is there.
inline void check_folder(const TrainingOptions& options, std::initializer_list<std::string> models) {
  if (options.resume) {
    bool found = false;
    for (const std::string& model : models) found = found || std::filesystem::exists(checkpoint_path(options, model));
    if (!found) {
      throw std::runtime_error(options.out.string() + ": there is nothing to resume: no " + *models.begin() +
                               ".safetensors; leave out --resume to begin, or name another folder with --out");
    }
  }
  std::error_code error;
  std::filesystem::create_directories(options.out, error);
  const std::filesystem::path probe = options.out / ".can_be_written";
  const bool writable = !error && std::ofstream(probe).put('\n').flush().good();
  std::filesystem::remove(probe, error);
  if (!writable) throw std::runtime_error(options.out.string() + ": no folder that files can be written to");
}

}  // namespace example
