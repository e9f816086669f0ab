#pragma once

// One line on the terminal that says how far a run is. Nothing where the output is no terminal.

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>

namespace example {

class ProgressLine {
 public:
  /// Draws `done` steps of `all`, at most ten times a second.
  void show(long done, long all, double loss, double tokens_per_second) {
    const auto now = std::chrono::steady_clock::now();
    if (!isatty(STDOUT_FILENO) || now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    constexpr long kCells = 30;
    const auto filled = static_cast<std::size_t>(kCells * done / all);
    std::printf("\r  [%s%s] %ld/%ld  loss %.3f  %.0f tokens/s ", std::string(filled, '#').c_str(),
                std::string(kCells - filled, '.').c_str(), done, all, loss, tokens_per_second);
    std::fflush(stdout);
  }

  /// Takes the line away, to make room for another.
  static void clear() {
    if (isatty(STDOUT_FILENO)) std::printf("\r%100s\r", "");
  }

 private:
  std::chrono::steady_clock::time_point last_{};
};

}  // namespace example
