#pragma once

// What can be asked of example 11 on its command line.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <diffattn/core/matrix.hpp>
#include <filesystem>
#include <string>

namespace example {

struct FineTuneOptions {
  std::filesystem::path model = DIFFATTN_EXAMPLE_DATA "/diffllama-bytes";
  std::filesystem::path text;
  std::filesystem::path out = "fine-tuned";
  std::string prompt = "And it came to pass, that he said unto them, ";
  diffattn::Index steps = 120;
  diffattn::Index batch = 4;
  diffattn::Index length = 256;
  double learning_rate = 1e-3;
  std::uint64_t seed = 1;
  int threads = 2;

  void declare(CLI::App& app) {
    const auto up_to = [](long most) { return CLI::Range(1L, most); };
    app.add_option("--model", model, "directory of a DiffLlama whose tokens are bytes")->capture_default_str();
    app.add_option("--text", text, "any file; left out, the King James Bible in today's words")
        ->check(CLI::ExistingFile);
    app.add_option("--out", out, "directory for the tuned model")->capture_default_str();
    app.add_option("--prompt", prompt, "what the model goes on from")->capture_default_str();
    app.add_option("--steps", steps, "optimizer steps")->check(up_to(1 << 30))->capture_default_str();
    app.add_option("--batch", batch, "sequences a step")->check(up_to(4096))->capture_default_str();
    app.add_option("--length", length, "bytes a sequence")->check(up_to(1 << 20))->capture_default_str();
    app.add_option("--learning-rate", learning_rate, "its peak")->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--seed", seed, "of batches")->check(CLI::NonNegativeNumber)->capture_default_str();
    app.add_option("--threads", threads, "changes the speed and nothing else")
        ->check(up_to(1024))
        ->capture_default_str();
  }
};

}  // namespace example
