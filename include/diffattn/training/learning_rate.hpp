#pragma once

// The learning rate of each step: a linear warm-up to the peak, then a decay to the final rate.
//
//   step < warmup_steps          peak · (step + 1) / warmup_steps
//   step < total_steps           from peak (at warmup_steps) to final (at total_steps), along half a cosine or a line
//   from there on                final
//
// Steps count from 0; the first one learns already. No state: a resumed run asks for the step that it is at.

#include <cmath>
#include <numbers>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

enum class LearningRateDecay { cosine, linear, none };

struct LearningRateConfig {
  double peak = 1e-3;
  Index warmup_steps = 0;
  Index total_steps = 0;  ///< warm-up included
  double final = 0;
  LearningRateDecay decay = LearningRateDecay::cosine;  ///< none stays at the peak, and total_steps means nothing
};

class LearningRate {
 public:
  /// Throws std::invalid_argument if steps or rates are negative, a rate is not finite, or the warm-up is longer than
  /// the whole.
  explicit LearningRate(const LearningRateConfig& config) : config_(config) {
    if (config.warmup_steps < 0) {
      detail::throw_invalid({"LearningRate: warmup_steps must not be negative, got ", config.warmup_steps});
    }
    if (config.decay != LearningRateDecay::none && config.total_steps < config.warmup_steps) {
      detail::throw_invalid({"LearningRate: total_steps must be at least the warmup_steps ", config.warmup_steps,
                             ", got ", config.total_steps});
    }
    // Written so that NaN fails as well.
    if (!(config.peak >= 0 && config.final >= 0)) {
      detail::throw_invalid({"LearningRate: peak and final must not be negative"});
    }
    if (!std::isfinite(config.peak + config.final)) {
      detail::throw_invalid({"LearningRate: peak and final must be finite"});
    }
  }

  /// The rate of step `step`, 0 or more: std::invalid_argument otherwise.
  double at(Index step) const {
    if (step < 0) detail::throw_invalid({"LearningRate: steps count from 0, got ", step});
    const double peak = config_.peak, final = config_.final;
    if (step < config_.warmup_steps) {
      return peak * static_cast<double>(step + 1) / static_cast<double>(config_.warmup_steps);
    }
    if (config_.decay == LearningRateDecay::none) return peak;
    if (step >= config_.total_steps) return final;
    const double progress = static_cast<double>(step - config_.warmup_steps) /
                            static_cast<double>(config_.total_steps - config_.warmup_steps);
    const double left =
        config_.decay == LearningRateDecay::linear ? 1 - progress : (1 + std::cos(std::numbers::pi * progress)) / 2;
    return final + (peak - final) * left;
  }

  /// What the schedule was made with.
  const LearningRateConfig& config() const { return config_; }

 private:
  LearningRateConfig config_;
};

}  // namespace diffattn::inline v0_1
