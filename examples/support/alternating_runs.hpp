#pragma once

// Times two calls in turn, so that whatever else the machine does meets both alike, and takes medians.

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <vector>

namespace example {

struct AlternatingTimes {
  double first, second, ratio;  ///< medians: microseconds, microseconds, first / second of the same round
};

template <typename First, typename Second>
AlternatingTimes time_alternating_runs(First first, Second second, std::size_t rounds = 31) {
  const auto microseconds = [](auto& call) {
    const auto start = std::chrono::steady_clock::now();
    call();
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
  };
  std::array<std::vector<double>, 3> samples;
  for (std::size_t round = 0; round < rounds; ++round) {
    samples[0].push_back(microseconds(first));
    samples[1].push_back(microseconds(second));
    samples[2].push_back(samples[0].back() / samples[1].back());
  }
  for (auto& values : samples) std::sort(values.begin(), values.end());
  return {samples[0][rounds / 2], samples[1][rounds / 2], samples[2][rounds / 2]};
}

}  // namespace example
