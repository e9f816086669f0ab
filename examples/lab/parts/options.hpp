#pragma once

// What all programs of the lab can be asked on their command lines, and how they end. CLI11 itself is included by
// options.cpp, and by programs that have options of their own.

#include <cstdint>
#include <diffattn/core/matrix.hpp>
#include <filesystem>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "parts/model.hpp"

namespace CLI {
class App;
}

namespace lab {

struct Options {
  std::filesystem::path out = "lab";
  std::vector<std::string> models;  ///< which are compared
  std::vector<std::uint64_t> seeds = {1, 2, 3};
  std::vector<double> learning_rates = {3e-3};
  Index steps = 2000;
  Index layers = 2;
  Index width = 64;
  Index head_dim = 16;
  Index threads = 1;
  double minutes = 0;  ///< 0: as long as it takes
  bool smoke = false;

  /// The options above, with what they are set to as defaults.
  void declare(CLI::App& app);
  /// Without those that say how large a model is and how long it is trained.
  void declare_common(CLI::App& app);

  ModelSpec model(const std::string& name, Index vocab_size, std::uint64_t seed) const {
    return {
        .name = name, .vocab_size = vocab_size, .layers = layers, .width = width, .head_dim = head_dim, .seed = seed};
  }
};

/// The budget is used up, or the user interrupted: what is measured is saved, and the next call goes on.
struct Pause : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// main of every program: declares, parses, runs, and turns what is thrown into a message and an exit status: 0, 1 for an
/// error, 3 if the budget is used up and something is left to do. Ctrl-C ends the experiment between two steps.
int run_program(const char* about, int argc, char** argv, const std::function<void(CLI::App&)>& declare,
                const std::function<void()>& experiment);

}  // namespace lab
