#include <cmath>
#include <diffattn/models/token_sampler.hpp>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace {

using diffattn::GenerateOptions;
using diffattn::Index;
using diffattn::TokenSampler;
using Tokens = std::vector<Index>;

/// How often each token is drawn in `draws` from these logits.
std::vector<double> frequencies(const GenerateOptions& options, const std::vector<float>& logits, int draws = 20000) {
  TokenSampler sampler(options);
  std::vector<double> counts(logits.size());
  for (int i = 0; i < draws; ++i) {
    counts[static_cast<std::size_t>(sampler.next(std::span<const float>(logits), {}))] += 1.0 / draws;
  }
  return counts;
}

void check_near(const std::vector<double>& seen, const std::vector<double>& expected) {
  REQUIRE(seen.size() == expected.size());
  for (std::size_t i = 0; i < seen.size(); ++i) {
    INFO("token " << i << ": " << seen[i] << ", expected " << expected[i]);
    CHECK(std::abs(seen[i] - expected[i]) < 0.02);  // five standard deviations of 20,000 draws
    CHECK((seen[i] == 0) == (expected[i] == 0));
  }
}

float log_of(double p) { return static_cast<float>(std::log(p)); }

}  // namespace

TEST_CASE("Tokens are drawn from the softmax at a temperature", "[models][token_sampler]") {
  const std::vector<float> logits = {log_of(0.1), log_of(0.4), log_of(0.2), log_of(0.3)};
  check_near(frequencies({.temperature = 1}, logits), {0.1, 0.4, 0.2, 0.3});
  const double root = std::sqrt(0.1) + std::sqrt(0.4) + std::sqrt(0.2) + std::sqrt(0.3);
  check_near(frequencies({.temperature = 2}, logits),
             {std::sqrt(0.1) / root, std::sqrt(0.4) / root, std::sqrt(0.2) / root, std::sqrt(0.3) / root});
  check_near(frequencies({.temperature = 0}, logits, 10), {0, 1, 0, 0});
  check_near(frequencies({.temperature = 0}, {0, 1, 1}, 10), {0, 1, 0});  // of equals the first
  check_near(frequencies({.temperature = 1, .top_k = 2}, logits), {0, 4.0 / 7, 0, 3.0 / 7});
  check_near(frequencies({.temperature = 1, .top_k = 4}, logits), {0.1, 0.4, 0.2, 0.3});
  check_near(frequencies({.temperature = 1, .top_k = 9}, logits), {0.1, 0.4, 0.2, 0.3});
  check_near(frequencies({.temperature = 1, .top_p = 0.65}, logits), {0, 4.0 / 7, 0, 3.0 / 7});
  check_near(frequencies({.temperature = 1, .top_p = 0.75}, logits), {0, 4.0 / 9, 2.0 / 9, 3.0 / 9});
  check_near(frequencies({.temperature = 1, .top_p = 0.5}, {0, 0, 0, 0}), {0.5, 0.5, 0, 0});  // exactly p is enough
  check_near(frequencies({.temperature = 1, .top_p = 0.01}, logits), {0, 1, 0, 0});
  check_near(frequencies({.temperature = 1, .top_k = 3, .top_p = 0.7}, logits), {0, 4.0 / 7, 0, 3.0 / 7});
  check_near(frequencies({.temperature = 1, .top_k = 1}, {0, 1, 1, 1, 0}), {0, 1.0 / 3, 1.0 / 3, 1.0 / 3, 0});
}

TEST_CASE("A repetition penalty weakens what has been, once", "[models][token_sampler]") {
  TokenSampler sampler({.repetition_penalty = 2});
  const std::vector<float> logits = {3, 2, -1, -1.5f};
  const auto next = [&](const Tokens& so_far) {
    return sampler.next(std::span<const float>(logits), std::span<const Index>(so_far));
  };
  CHECK(next({}) == 0);
  CHECK(next({0}) == 1);
  CHECK(next({0, 0, 0}) == 1);
  CHECK(next({0, 1}) == 0);
  const std::vector<float> apart = {3, 1};  // halved once the first is still the best, halved twice not
  const Tokens twice = {0, 0};
  CHECK(sampler.next(std::span<const float>(apart), std::span<const Index>(twice)) == 0);
  const std::vector<float> negative = {-1, -1.5f};
  const Tokens first = {0};
  CHECK(sampler.next(std::span<const float>(negative), std::span<const Index>(first)) == 1);
}

TEST_CASE("Logits that cannot be ordered are refused, and those of -inf never drawn", "[models][token_sampler]") {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();
  const GenerateOptions ways[] = {
      {},
      {.temperature = 1},
      {.temperature = 1, .top_k = 2},
      {.temperature = 1, .top_p = 0.9},
      {.temperature = 0.7, .top_k = 3, .top_p = 0.5, .repetition_penalty = 1.3},
  };
  for (const GenerateOptions& options : ways) {
    INFO("temperature " << options.temperature << ", top_k " << options.top_k.value_or(0) << ", top_p "
                        << options.top_p);
    const auto refused = [&](std::vector<float> logits) {
      TokenSampler sampler(options);
      const Tokens so_far = {0, 1};
      return support::thrown_by<std::runtime_error>(
          [&] { sampler.next(std::span<const float>(logits), std::span<const Index>(so_far)); });
    };
    for (std::size_t at = 0; at < 60; ++at) {
      std::vector<float> logits(60, 1.0f);
      logits[at] = kNaN;
      CHECK(refused(logits) == "generate: at position 2 the logit of token " + std::to_string(at) +
                                   " is NaN: the model's parameters or its input are not finite");
      logits[at] = kInf;
      CHECK(refused(logits).find("the logit of token " + std::to_string(at) + " is infinite") != std::string::npos);
    }
    CHECK(refused({-kInf, -kInf, -kInf}) ==
          "generate: at position 2 all logits are -inf, so that no token can be chosen");
    CHECK(refused({kNaN}).find("token 0 is NaN") != std::string::npos);

    // Masked ones first, last and most: the two that are left are drawn, and nothing else.
    const std::vector<double> seen = frequencies(options, {-kInf, 0.5f, -kInf, -kInf, 0.5f, -kInf}, 3000);
    CHECK(seen[1] + seen[4] > 1 - 1e-9);
    TokenSampler one(options);
    const std::vector<float> last = {-kInf, -kInf, -3e38f};
    CHECK(one.next(std::span<const float>(last), {}) == 2);
    CHECK(support::thrown_by<std::invalid_argument>([&] { one.next(std::span<const float>(), {}); }) ==
          "generate: there are no logits to choose from");
  }
}

TEST_CASE("No temperature and no penalty turns logits into something that cannot be drawn from",
          "[models][token_sampler]") {
  const std::vector<float> logits = {3e38f, -3e38f, 1, 2.5e38f};
  for (const double temperature : {1e-320, 1e-300, 1e-30, 1e300}) {
    for (const double penalty : {1e-320, 1e-300, 1.0, 1e300}) {
      INFO("temperature " << temperature << ", penalty " << penalty);
      TokenSampler sampler({.temperature = temperature, .top_k = 3, .top_p = 0.9, .repetition_penalty = penalty});
      const Tokens so_far = {1, 2};
      for (int i = 0; i < 5; ++i) {
        const Index token = sampler.next(std::span<const float>(logits), std::span<const Index>(so_far));
        CHECK(token >= 0);
        CHECK(token < 4);
        if (temperature < 1 && penalty >= 1) CHECK(token == 0);
      }
    }
  }
  TokenSampler sampler({.repetition_penalty = 2});
  const Tokens beyond = {4}, negative = {-1};
  CHECK(support::thrown_by<std::invalid_argument>([&] {
          sampler.next(std::span<const float>(logits), std::span<const Index>(beyond));
        }) == "generate: a token so far is 4, and there are logits for 4 tokens");
  CHECK_THROWS_AS(sampler.next(std::span<const float>(logits), std::span<const Index>(negative)),
                  std::invalid_argument);
}
