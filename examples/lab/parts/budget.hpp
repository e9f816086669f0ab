#pragma once

// The minutes that a program may take.

#include <chrono>
#include <string>

#include "parts/options.hpp"
#include "support/interruption.hpp"

namespace lab {

class Budget {
 public:
  /// 0 minutes: no limit.
  explicit Budget(double minutes) : minutes_(minutes), start_(std::chrono::steady_clock::now()) {}

  /// Throws Pause, saying how many runs are done, if the time is up or the user has asked to stop.
  void check(Index done, Index all) const {
    const bool late = minutes_ > 0 && elapsed() >= minutes_;
    if (!late && example::interrupted == 0) return;
    throw Pause(std::string(late ? "the minutes are up" : "interrupted") + ": " + std::to_string(done) + " of " +
                std::to_string(all) + " runs are measured; the same command goes on with the next");
  }
  double elapsed() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count() / 60;
  }

 private:
  double minutes_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace lab
