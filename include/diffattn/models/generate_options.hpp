#pragma once

// GenerateOptions: how text is made from a model, by generate (generate.hpp) and TokenSampler (token_sampler.hpp).
//
//   generate(model, prompt, {.max_new_tokens = 100, .temperature = 0.8, .top_k = 40, .top_p = 0.95});
//
// Temperature 0, the default, is greedy: the most probable token, of equals the first. Otherwise one is drawn from
// softmax(logits / temperature), after, in this order as in Hugging Face's transformers,
//
//   repetition_penalty   divides the positive and multiplies the negative logits of every token so far
//                        (Keskar et al., arXiv 1909.05858); also when greedy
//   top_k                keeps the k best tokens, and those equal to the last of them
//   top_p                keeps the fewest best tokens whose probabilities add up to p
//                        (Holtzman et al., arXiv 1904.09751)
//
// The same seed gives the same tokens, on every machine where the logits are the same. A logit of -inf is a token that
// is never drawn.
//
// Tested by tests/models/generate_test.cpp and token_sampler_test.cpp.

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

struct GenerateOptions {
  Index max_new_tokens = 100;
  double temperature = 0;                    ///< 0: greedy
  std::optional<Index> top_k = {};           ///< 1 or more; left out: all
  double top_p = 1;                          ///< 1: all
  double repetition_penalty = 1;             ///< 1: none
  std::vector<Index> stop_tokens = {};       ///< generation ends behind one of these
  std::uint64_t seed = 0;                    ///< of what is drawn
  Index prefill_chunk = 512;                 ///< tokens of the prompt that are fed at once
  std::optional<Index> max_length = {};      ///< of prompt and text together, cache included; left out: no limit
  std::function<bool(Index)> on_token = {};  ///< called with every new token; false ends generation
};

}  // namespace diffattn::inline v0_1
