#pragma once

// TokenSampler: picks the next token from a row of logits, as GenerateOptions says (generate_options.hpp): for a loop of
// your own, where generate() is not what you need.
//
//   TokenSampler sampler({.temperature = 0.8, .top_p = 0.95, .seed = 1});
//   Index token = sampler.next(std::span<const float>(logits), tokens_so_far);
//
// Memory   the scores of a vocabulary and their order, kept from one call to the next.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/random.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/models/generate_options.hpp"

namespace diffattn::inline v0_1 {

/// Picks the next token from a row of logits. After anything that is thrown it is as before.
class TokenSampler {
 public:
  /// Throws std::invalid_argument naming the option.
  explicit TokenSampler(const GenerateOptions& options)
      : temperature_(options.temperature),
        top_k_(options.top_k),
        top_p_(options.top_p),
        penalty_(options.repetition_penalty),
        random_(options.seed) {
    check(options);
  }

  /// Throws std::invalid_argument, naming `where` and the option, for one that cannot be.
  static void check(const GenerateOptions& options, const char* where = "generate") {
    const auto refuse_unless = [&](bool holds, const char* option, double value, const char* rule) {
      if (holds && std::isfinite(value)) return;
      detail::throw_invalid({where, ": ", option, " must be ", rule, ", got ", std::to_string(value).c_str()});
    };
    const double temperature = options.temperature, top_p = options.top_p, penalty = options.repetition_penalty;
    refuse_unless(temperature >= 0, "temperature", temperature, "0 or more");
    refuse_unless(top_p > 0 && top_p <= 1, "top_p", top_p, "more than 0 and at most 1");
    refuse_unless(penalty > 0, "repetition_penalty", penalty, "positive");
    if (options.top_k) detail::check_positive(where, "top_k", *options.top_k);
  }

  /// The next token, given the logits of all and the tokens so far. Throws std::invalid_argument for no logits and for
  /// a token so far that has none (with a penalty), std::runtime_error for logits that are NaN, +inf or all -inf.
  template <typename Scalar>
  Index next(std::span<const Scalar> logits, std::span<const Index> so_far) {
    scores_.assign(logits.begin(), logits.end());
    check_logits(static_cast<Index>(so_far.size()));
    if (penalty_ != 1) penalise(so_far);
    const auto best = std::max_element(scores_.begin(), scores_.end());
    if (temperature_ == 0) return best - scores_.begin();
    // The best one is 0: no temperature is so low that a quotient overflows to +inf.
    for (const double largest = *best; double& score : scores_) score = (score - largest) / temperature_;
    return draw(keep());
  }

 private:
  /// Refuses what cannot be ordered, or leaves nothing to be chosen.
  void check_logits(Index position) const {
    const auto vocabulary = static_cast<Index>(scores_.size());
    if (vocabulary == 0) detail::throw_invalid({"generate: there are no logits to choose from"});
    bool any = false;
    for (Index token = 0; token < vocabulary; ++token) {
      const double logit = score(token);
      any |= std::isfinite(logit);
      if (std::isnan(logit) || logit == std::numeric_limits<double>::infinity()) {
        throw std::runtime_error(detail::join({"generate: at position ", position, " the logit of token ", token,
                                               std::isnan(logit) ? " is NaN" : " is infinite",
                                               ": the model's parameters or its input are not finite"}));
      }
    }
    if (!any) {
      throw std::runtime_error(
          detail::join({"generate: at position ", position, " all logits are -inf, so that no token can be chosen"}));
    }
  }

  void penalise(std::span<const Index> so_far) {
    constexpr double kMost = std::numeric_limits<double>::max();
    seen_.assign(scores_.size(), 0);
    for (const Index token : so_far) {
      if (token < 0 || token >= static_cast<Index>(scores_.size())) {
        detail::throw_invalid({"generate: a token so far is ", token, ", and there are logits for ",
                               static_cast<Index>(scores_.size()), " tokens"});
      }
      char& seen = seen_[static_cast<std::size_t>(token)];
      double& score = scores_[static_cast<std::size_t>(token)];
      // A finite logit stays finite, however large or small the penalty.
      if (seen == 0 && std::isfinite(score)) {
        score = std::clamp(score > 0 ? score / penalty_ : score * penalty_, -kMost, kMost);
      }
      seen = 1;
    }
  }

  double score(Index token) const { return scores_[static_cast<std::size_t>(token)]; }

  /// Puts the tokens that may be drawn at the front of order_ and their weights into weights_, and returns their
  /// number.
  std::size_t keep() {
    order_.resize(scores_.size());
    std::iota(order_.begin(), order_.end(), Index{0});
    const auto better = [this](Index a, Index b) { return score(a) > score(b) || (score(a) == score(b) && a < b); };
    std::size_t kept = order_.size();
    if (top_k_ && static_cast<std::size_t>(*top_k_) < kept) {
      const auto last = order_.begin() + (*top_k_ - 1);
      std::nth_element(order_.begin(), last, order_.end(), better);
      const double least = score(*last);
      const auto end = std::partition(last + 1, order_.end(), [&](Index t) { return score(t) == least; });
      kept = static_cast<std::size_t>(end - order_.begin());
    }
    const auto end = order_.begin() + static_cast<std::ptrdiff_t>(kept);
    if (top_p_ < 1 || top_k_) std::sort(order_.begin(), end, better);

    weights_.clear();
    for (auto token = order_.begin(); token != end; ++token) weights_.push_back(std::exp(score(*token)));
    if (top_p_ == 1) return kept;
    const double enough = top_p_ * std::accumulate(weights_.begin(), weights_.end(), 0.0);
    double sum = 0;
    for (std::size_t i = 0; i < kept; ++i) {
      sum += weights_[i];
      if (sum >= enough) return i + 1;
    }
    return kept;
  }

  Index draw(std::size_t kept) {
    const double total = std::accumulate(weights_.begin(), weights_.begin() + static_cast<std::ptrdiff_t>(kept), 0.0);
    double left = random_.unit() * total;
    Index drawn = order_[0];
    for (std::size_t i = 0; i < kept && left >= 0; ++i) {
      // Rounding may leave a little at the end: it belongs to the last that can be drawn at all.
      if (weights_[i] > 0) drawn = order_[i];
      left -= weights_[i];
    }
    return drawn;
  }

  double temperature_;
  std::optional<Index> top_k_;
  double top_p_, penalty_;
  SplitMix64 random_;
  std::vector<double> scores_, weights_;
  std::vector<Index> order_;
  std::vector<char> seen_;
};

}  // namespace diffattn::inline v0_1
