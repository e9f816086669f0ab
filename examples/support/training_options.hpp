#pragma once

// What can be asked of example 07 on its command line.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <diffattn/core/matrix.hpp>
#include <filesystem>
#include <thread>

namespace example {

struct TrainingOptions {
  std::filesystem::path text = DIFFATTN_EXAMPLE_DATA "/kjv.txt";
  std::filesystem::path out = "trained";
  diffattn::Index steps = 1500;
  diffattn::Index batch = 4;
  diffattn::Index length = 256;
  diffattn::Index embed_dim = 128;
  diffattn::Index layers = 4;
  diffattn::Index hidden_dim = 344;
  double learning_rate = 4e-3;
  std::uint64_t seed = 1;
  diffattn::Index threads = static_cast<diffattn::Index>(std::max(std::thread::hardware_concurrency(), 1U));
  diffattn::Index report_every = 100;
  bool resume = false;

  /// Throws CLI::Error, which app.exit() turns into a message and an exit status.
  void declare(CLI::App& app) {
    const auto positive = CLI::Range(1L, 1L << 30);
    app.add_option("--text", text, "any file; its bytes are the tokens")
        ->check(CLI::ExistingFile)
        ->capture_default_str();
    app.add_option("--out", out, "folder for checkpoints and curves")->capture_default_str();
    app.add_option("--steps", steps, "optimizer steps")->check(positive)->capture_default_str();
    app.add_option("--batch", batch, "sequences a step")->check(positive)->capture_default_str();
    app.add_option("--length", length, "bytes a sequence")->check(positive)->capture_default_str();
    app.add_option("--embed-dim", embed_dim, "width of the models")->check(positive)->capture_default_str();
    app.add_option("--layers", layers)->check(positive)->capture_default_str();
    app.add_option("--hidden-dim", hidden_dim, "inner width of SwiGLU")->check(positive)->capture_default_str();
    app.add_option("--learning-rate", learning_rate, "its peak")->capture_default_str();
    app.add_option("--seed", seed, "of parameters and batches")->capture_default_str();
    app.add_option("--threads", threads, "changes the speed and nothing else")->check(positive)->capture_default_str();
    app.add_option("--report-every", report_every, "steps from one validation to the next")
        ->check(positive)
        ->capture_default_str();
    app.add_flag("--resume", resume, "go on from the checkpoints in --out, as far as there are any");
  }
};

}  // namespace example
