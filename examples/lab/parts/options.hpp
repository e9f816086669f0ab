#pragma once

// What all programs of the lab can be asked on their command lines, and how they end.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <diffattn/core/matrix.hpp>
#include <exception>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "parts/model.hpp"
#include "support/interruption.hpp"

namespace lab {

struct Options {
  std::filesystem::path out = "lab";
  std::vector<std::string> models;  ///< which are compared
  std::vector<std::uint64_t> seeds = {1, 2, 3};
  std::vector<double> learning_rates = {3e-3};
  Index steps = 2000;
  Index batch = 32;
  Index layers = 2;
  Index width = 64;
  Index head_dim = 16;
  Index threads = 1;
  double minutes = 0;
  bool smoke = false;

  /// An experiment sets its own defaults first. Throws CLI::Error, which app.exit() turns into a message and a status.
  void declare(CLI::App& app) {
    const auto up_to = [](long most) { return CLI::Range(1L, most); };
    app.add_option("--steps", steps, "optimizer steps of a model")->check(up_to(1 << 30))->capture_default_str();
    app.add_option("--batch", batch, "sequences a step")->check(up_to(4096))->capture_default_str();
    app.add_option("--layers", layers)->check(up_to(1024))->capture_default_str();
    app.add_option("--width", width, "of the models")->check(up_to(1 << 14))->capture_default_str();
    app.add_option("--head-dim", head_dim, "of one map of a head")->check(up_to(1024))->capture_default_str();
    declare_common(app);
  }

  /// Those of declare that say nothing of the models.
  void declare_common(CLI::App& app) {
    const auto up_to = [](long most) { return CLI::Range(1L, most); };
    app.add_option("--out", out, "folder for the CSV and for checkpoints to go on from")->capture_default_str();
    app.add_option("--models", models, "which are compared")->delimiter(',')->capture_default_str();
    app.add_option("--seeds", seeds, "of parameters and data")->delimiter(',')->capture_default_str();
    app.add_option("--learning-rates", learning_rates, "peaks that are tried")
        ->delimiter(',')
        ->check(CLI::Range(1e-9, 1e9))
        ->capture_default_str();
    app.add_option("--threads", threads, "changes the speed and nothing else")
        ->check(up_to(1024))
        ->capture_default_str();
    app.add_option("--minutes", minutes, "budget: afterwards the program saves and ends, and goes on when called again")
        ->check(CLI::Range(0.0, 1e6));
    app.add_flag("--smoke", smoke, "everything tiny, to see that it works");
  }

  ModelSpec model(const std::string& name, Index vocab_size, std::uint64_t seed) const {
    return {.name = name,
            .vocab_size = vocab_size,
            .layers = layers,
            .width = width,
            .head_dim = head_dim,
            .seed = seed};
  }
};

/// The budget is used up, or the user interrupted: what is measured is saved, and the next call goes on.
struct Pause : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// main of every program: parses, runs, and turns what is thrown into a message and an exit status. 3: the budget is used
/// up and something is left to do.
inline int run_program(CLI::App& app, int argc, char** argv, const std::function<void()>& experiment) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;  // --help is 0
  }
  try {
    example::catch_interruption();
    experiment();
    return EXIT_SUCCESS;
  } catch (const Pause& pause) {
    std::printf("%s\n", pause.what());
    return 3;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "not enough memory: --batch, --width or --layers is too large\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return EXIT_FAILURE;
}

}  // namespace lab
