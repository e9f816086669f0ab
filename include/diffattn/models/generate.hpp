#pragma once

// generate: text from a Decoder, token by token.
//
//   std::vector<Index> tokens = generate(model, prompt, {.max_new_tokens = 100, .temperature = 0.8, .top_p = 0.95});
//
// Returns the new tokens without the prompt; a stop token ends them and is the last of them. Temperature 0, the
// default, is greedy: the most probable token, of equals the first. Otherwise one is drawn from softmax(logits /
// temperature), after, in this order as in Hugging Face's transformers,
//
//   repetition_penalty   divides the positive and multiplies the negative logits of every token so far (Keskar et al.,
//                        arXiv 1909.05858); also when greedy
//   top_k                keeps the k best tokens, and those equal to the last of them
//   top_p                keeps the fewest best tokens whose probabilities add up to p (Holtzman et al., arXiv
//                        1904.09751)
//
// The same seed gives the same tokens, on every machine where the logits are the same. A logit of -inf is a token that
// is never drawn.
//
// Caches   with a DecoderCache of yours, the prompt follows what is in it, and all but the last new token are in it
//          afterwards: the next call may go on. The prompt is fed in chunks, which bounds scratch, not in one piece.
// Errors   std::invalid_argument naming the option, an empty prompt, a token id outside the vocabulary, or a prompt
//          longer than max_length or the cache, before any work. When there is no room for a further token, generation
//          ends. std::runtime_error for logits that are NaN, +inf or all -inf, of which none can be chosen.
//          Whatever is thrown, also by on_token or for lack of memory, the cache is as it was before the call.
// Memory   one row of logits, their order, the cache; a workspace that grows to that of one chunk. With a window, until
//          it returns, also what the cache held before.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/random.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/models/decoder_cache.hpp"

namespace diffattn::inline v0_1 {

struct GenerateOptions {
  Index max_new_tokens = 100;
  double temperature = 0;                 ///< 0: greedy
  Index top_k = 0;                        ///< 0: all
  double top_p = 1;                       ///< 1: all
  double repetition_penalty = 1;          ///< 1: none
  std::vector<Index> stop_tokens{};       ///< generation ends behind one of these
  std::uint64_t seed = 0;                 ///< of what is drawn
  Index prefill_chunk = 512;              ///< tokens of the prompt that are fed at once
  Index max_length = 0;                   ///< of prompt and text together, cache included; 0: no limit
  std::function<bool(Index)> on_token{};  ///< called with every new token; false ends generation
};

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
    check("temperature", temperature_, temperature_ >= 0, "0 or more");
    check("top_p", top_p_, top_p_ > 0 && top_p_ <= 1, "more than 0 and at most 1");
    check("repetition_penalty", penalty_, penalty_ > 0, "positive");
    if (top_k_ < 0) detail::throw_invalid({"generate: top_k must be 0 or more, got ", top_k_});
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
  static void check(const char* option, double value, bool holds, const char* rule) {
    if (holds && std::isfinite(value)) return;
    detail::throw_invalid({"generate: ", option, " must be ", rule, ", got ", std::to_string(value).c_str()});
  }

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
    if (top_k_ > 0 && static_cast<std::size_t>(top_k_) < kept) {
      std::nth_element(order_.begin(), order_.begin() + (top_k_ - 1), order_.end(), better);
      const double least = score(order_[static_cast<std::size_t>(top_k_ - 1)]);
      const auto end =
          std::partition(order_.begin() + top_k_, order_.end(), [&](Index t) { return score(t) == least; });
      kept = static_cast<std::size_t>(end - order_.begin());
    }
    const auto end = order_.begin() + static_cast<std::ptrdiff_t>(kept);
    if (top_p_ < 1 || top_k_ > 0) std::sort(order_.begin(), end, better);

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
  Index top_k_;
  double top_p_, penalty_;
  SplitMix64 random_;
  std::vector<double> scores_, weights_;
  std::vector<Index> order_;
  std::vector<char> seen_;
};

namespace detail {

/// A cache as it was, for calls that feed it more than once. Where a window drops tokens on the way, a fork keeps them.
template <typename Storage>
class CacheBefore {
 public:
  explicit CacheBefore(const DecoderCache<Storage>& cache) : position_(cache.position()) {
    if (cache.options().window && position_ != 0) fork_.emplace(cache);
  }

  void restore(DecoderCache<Storage>& cache) noexcept {
    if (fork_) {
      std::swap(cache.layers, fork_->layers);
    } else {
      cache.truncate(std::min(position_, cache.position()));  // on_token may have cut it
    }
  }

 private:
  Index position_;
  std::optional<DecoderCache<Storage>> fork_;
};

}  // namespace detail

/// The new tokens behind `prompt`, which follows what is in `cache`, with work spread over `executor`.
template <typename Scalar, typename Attention, typename Tokens, typename Storage, Executor E = Serial>
std::vector<Index> generate(const Decoder<Scalar, Attention>& model, const Tokens& prompt,
                            const GenerateOptions& options, DecoderCache<Storage>& cache, E&& executor = {}) {
  TokenSampler sampler(options);
  const auto check = [](const char* option, Index value, Index least) {
    if (value < least) detail::throw_invalid({"generate: ", option, " must be at least ", least, ", got ", value});
  };
  check("max_new_tokens", options.max_new_tokens, 0);
  check("prefill_chunk", options.prefill_chunk, 1);
  check("max_length", options.max_length, 0);
  std::vector<Index> tokens(std::data(prompt), std::data(prompt) + std::size(prompt));
  const auto prompt_size = static_cast<Index>(tokens.size());
  if (prompt_size == 0) detail::throw_invalid({"generate: the prompt is empty"});
  model.check_tokens(tokens);
  model.check_cache(cache, prompt_size);
  Index room = std::numeric_limits<Index>::max();
  for (const Index most : {options.max_length, cache.options().max_tokens}) {
    if (most != 0) room = std::min(room, most - cache.position());
  }
  if (prompt_size > room) {
    detail::throw_invalid({"generate: the prompt has ", prompt_size, " tokens, there is room for ", room});
  }
  const auto most_tokens = static_cast<std::size_t>(prompt_size + std::min(options.max_new_tokens, room - prompt_size));

  Workspace workspace;
  Matrix<Scalar> logits(1, model.config().vocab_size);
  const auto feed = [&](std::span<const Index> chunk, bool is_last) {
    const auto frame = workspace.frame();
    const Index n = static_cast<Index>(chunk.size()), width = model.embedding.cols();
    MatrixMap<Scalar> x(workspace.take<Scalar>(n * width), n, width);
    model.hidden_into(x, chunk, cache, workspace, executor);
    if (is_last) model.head_into(logits, detail::rows_of(x, n - 1, 1), workspace, executor);
  };
  detail::CacheBefore<Storage> before(cache);
  try {
    const auto chunk = static_cast<std::size_t>(options.prefill_chunk);
    for (std::size_t at = 0; at < tokens.size(); at += chunk) {
      const std::size_t count = std::min(chunk, tokens.size() - at);
      feed(std::span<const Index>(tokens).subspan(at, count), at + count == tokens.size());
    }
    while (tokens.size() < most_tokens) {
      if (tokens.size() > static_cast<std::size_t>(prompt_size)) feed({&tokens.back(), 1}, true);
      const Index token = sampler.next(std::span<const Scalar>(logits.data(), static_cast<std::size_t>(logits.size())),
                                       std::span<const Index>(tokens));
      tokens.push_back(token);
      const auto& stops = options.stop_tokens;
      if (options.on_token && !options.on_token(token)) break;
      if (std::find(stops.begin(), stops.end(), token) != stops.end()) break;
    }
  } catch (...) {
    before.restore(cache);
    throw;
  }
  tokens.erase(tokens.begin(), tokens.begin() + prompt_size);
  return tokens;
}

/// The same with a cache of its own.
template <typename Scalar, typename Attention, typename Tokens>
std::vector<Index> generate(const Decoder<Scalar, Attention>& model, const Tokens& prompt,
                            const GenerateOptions& options = {}) {
  DecoderCache<Scalar> cache(model.num_layers());
  return generate(model, prompt, options, cache);
}
template <typename Scalar, typename Attention>
std::vector<Index> generate(const Decoder<Scalar, Attention>& model, std::initializer_list<Index> prompt,
                            const GenerateOptions& options = {}) {
  return generate(model, std::span(prompt), options);
}

}  // namespace diffattn::inline v0_1
