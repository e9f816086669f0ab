#pragma once

// What can be asked of example 07 on its command line.

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdint>
#include <diffattn/core/matrix.hpp>
#include <filesystem>
#include <string>

namespace example {

struct TrainingOptions {
  std::filesystem::path text = DIFFATTN_EXAMPLE_DATA "/kjv.txt";
  std::filesystem::path out = "trained";
  std::string prompt = "And the LORD said unto ";
  diffattn::Index steps = 1500;
  diffattn::Index batch = 4;
  diffattn::Index length = 256;
  diffattn::Index embed_dim = 128;
  diffattn::Index layers = 4;
  diffattn::Index hidden_dim = 344;
  double learning_rate = 4e-3;
  std::uint64_t seed = 1;
  diffattn::Index threads = 0;
  diffattn::Index report_every = 100;
  bool resume = false;

  /// Throws CLI::Error, which app.exit() turns into a message and an exit status.
  void declare(CLI::App& app) {
    const auto up_to = [](long most) { return CLI::Range(1L, most); };
    const CLI::Validator rate(
        [](const std::string& text_of_rate) {
          double value = 0;
          const bool good = CLI::detail::lexical_cast(text_of_rate, value) && value > 0 && std::isfinite(value);
          return good ? std::string() : text_of_rate + " is no positive number";
        },
        "POSITIVE");
    const CLI::Validator words(
        [](const std::string& given) { return given.empty() ? std::string("must not be empty") : std::string(); },
        "NOT EMPTY");
    app.add_option("--text", text, "any file; its bytes are the tokens")
        ->check(CLI::ExistingFile)
        ->capture_default_str();
    app.add_option("--out", out, "folder for checkpoints and curves")->capture_default_str();
    app.add_option("--prompt", prompt, "what the trained models go on from")->check(words)->capture_default_str();
    app.add_option("--steps", steps, "optimizer steps")->check(up_to(1 << 30))->capture_default_str();
    app.add_option("--batch", batch, "sequences a step")->check(up_to(4096))->capture_default_str();
    app.add_option("--length", length, "bytes a sequence")->check(up_to(1 << 20))->capture_default_str();
    app.add_option("--embed-dim", embed_dim, "width of the models")->check(up_to(1 << 14))->capture_default_str();
    app.add_option("--layers", layers)->check(up_to(1024))->capture_default_str();
    app.add_option("--hidden-dim", hidden_dim, "inner width of SwiGLU")->check(up_to(1 << 16))->capture_default_str();
    app.add_option("--learning-rate", learning_rate, "its peak")->check(rate)->capture_default_str();
    app.add_option("--seed", seed, "of parameters and batches")->check(CLI::NonNegativeNumber)->capture_default_str();
    app.add_option("--threads", threads, "changes the speed and nothing else; 0: as many as help, found out by trying")
        ->check(CLI::Range(0L, 1024L))
        ->capture_default_str();
    app.add_option("--report-every", report_every, "steps from one validation to the next")
        ->check(up_to(1 << 30))
        ->capture_default_str();
    app.add_flag("--resume", resume, "go on from the checkpoints in --out, with the options that they were made with");
  }

  /// Differential heads, of width 32; a Transformer has twice as many.
  diffattn::Index heads() const { return std::max<diffattn::Index>(embed_dim / 64, 1); }

  /// Of the loss curve.
  std::string title() const {
    return text.filename().string() + " byte by byte: " + std::to_string(layers) + " layers, " +
           std::to_string(embed_dim) + " wide";
  }

  /// The options that a run has to keep when it goes on; `text_bytes` stands for the text.
  std::string identity(std::size_t text_bytes) const {
    const auto option = [](const char* name, const auto& value) { return name + std::to_string(value); };
    return "a text of " + std::to_string(text_bytes) + option(" bytes --batch ", batch) + option(" --length ", length) +
           option(" --embed-dim ", embed_dim) + option(" --layers ", layers) + option(" --hidden-dim ", hidden_dim) +
           option(" --seed ", seed);
  }
};

}  // namespace example
