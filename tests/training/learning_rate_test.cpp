#include <cmath>
#include <diffattn/training/learning_rate.hpp>
#include <limits>

#include "support/catch.hpp"
#include "support/throws.hpp"

using diffattn::LearningRate;
using diffattn::LearningRateDecay;

TEST_CASE("The rate warms up to its peak and decays to its end", "[training][learning_rate]") {
  const LearningRate cosine({.peak = 2, .warmup_steps = 4, .total_steps = 12, .final = 0.5});
  for (const int step : {0, 1, 2, 3}) CHECK(cosine.at(step) == 0.5 * (step + 1));
  CHECK(cosine.at(4) == 2);
  CHECK(std::abs(cosine.at(6) - (0.5 + 1.5 * 0.8535533905932737)) < 1e-15);  // (1 + cos 45°) / 2
  CHECK(std::abs(cosine.at(8) - 1.25) < 1e-15);
  CHECK(std::abs(cosine.at(10) - (0.5 + 1.5 * 0.1464466094067263)) < 1e-15);
  CHECK(cosine.at(12) == 0.5);
  CHECK(cosine.at(1000000) == 0.5);

  const LearningRate linear(
      {.peak = 2, .warmup_steps = 4, .total_steps = 12, .final = 0.5, .decay = LearningRateDecay::linear});
  CHECK(linear.at(3) == 2);
  CHECK(linear.at(4) == 2);
  CHECK(linear.at(6) == 1.625);
  CHECK(linear.at(8) == 1.25);
  CHECK(linear.at(12) == 0.5);

  const LearningRate constant({.peak = 2, .warmup_steps = 2, .decay = LearningRateDecay::none});
  CHECK(constant.at(0) == 1);
  CHECK(constant.at(1) == 2);
  CHECK(constant.at(1000000) == 2);

  const LearningRate all_warmup({.peak = 3, .warmup_steps = 3, .total_steps = 3, .final = 1});
  CHECK(all_warmup.at(2) == 3);
  CHECK(all_warmup.at(3) == 1);
}

TEST_CASE("Decays never rise, and stay between their ends", "[training][learning_rate]") {
  for (const auto decay : {LearningRateDecay::cosine, LearningRateDecay::linear}) {
    const LearningRate rate({.peak = 1e-3, .warmup_steps = 10, .total_steps = 137, .final = 1e-4, .decay = decay});
    for (int step = 9; step < 200; ++step) {
      CHECK(rate.at(step + 1) <= rate.at(step));
      CHECK(rate.at(step) >= 1e-4);
    }
  }
}

TEST_CASE("Schedules that make no sense are refused", "[training][learning_rate]") {
  const auto message = [](const diffattn::LearningRateConfig& config) {
    return support::thrown_by<std::invalid_argument>([&] { LearningRate{config}; });
  };
  CHECK(message({.warmup_steps = -1}) == "LearningRate: warmup_steps must not be negative, got -1");
  CHECK(message({.warmup_steps = 5, .total_steps = 4}) ==
        "LearningRate: total_steps must be at least the warmup_steps 5, got 4");
  CHECK(message({.peak = -1, .total_steps = 4}) == "LearningRate: peak and final must not be negative");
  CHECK(message({.peak = std::numeric_limits<double>::quiet_NaN(), .total_steps = 4}) ==
        "LearningRate: peak and final must not be negative");
}
