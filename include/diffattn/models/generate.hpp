#pragma once

// generate: text from a Decoder, token by token.
//
//   std::vector<Index> tokens = generate(model, prompt, {.max_new_tokens = 100, .temperature = 0.8, .top_p = 0.95});
//
// Returns the new tokens without the prompt; a stop token ends them and is the last of them. How they are chosen,
// generate_options.hpp says.
//
// Prompt   any contiguous integers, one at least. It is fed in chunks, which bounds scratch, not in one piece.
// Caches   with a DecoderCache of yours, the prompt follows what is in it, and all but the last new token are in it
//          afterwards: the next call may go on.
// Errors   std::invalid_argument naming the option, an empty prompt, a token id outside the vocabulary, or a prompt
//          longer than max_length or the cache, before any work. When there is no room for a further token, generation
//          ends. std::runtime_error for logits that are NaN, +inf or all -inf, of which none can be chosen.
//          Whatever is thrown, also by on_token or for lack of memory, the cache is as it was before the call.
// Memory   one row of logits, their order, the cache; a workspace that grows to that of one chunk. With a window, until
//          it returns, also what the cache held before.

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <span>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/models/decoder_cache.hpp"
#include "diffattn/models/generate_options.hpp"
#include "diffattn/models/token_sampler.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// How many tokens prompt and text may have together. Throws unless the options can be and the prompt has its place.
template <typename Storage>
std::size_t most_tokens(const GenerateOptions& options, Index prompt_size, const DecoderCache<Storage>& cache) {
  constexpr const char* kName = "generate";
  if (options.max_new_tokens < 0) {
    throw_invalid({kName, ": max_new_tokens must be at least 0, got ", options.max_new_tokens});
  }
  check_positive(kName, "prefill_chunk", options.prefill_chunk);
  if (options.max_length) check_positive(kName, "max_length", *options.max_length);
  if (prompt_size == 0) throw_invalid({kName, ": the prompt is empty"});
  Index room = std::numeric_limits<Index>::max();
  if (options.max_length) room = *options.max_length - cache.position();
  if (prompt_size > room) throw_invalid({kName, ": the prompt has ", prompt_size, " tokens, there is room for ", room});
  // A prompt that is too long for the cache itself, the decoder refuses.
  if (const Index most = cache.options().max_tokens; most != 0) room = std::min(room, most - cache.position());
  return static_cast<std::size_t>(prompt_size + std::min(options.max_new_tokens, room - prompt_size));
}

/// Whether text goes on behind this token.
inline bool goes_on(const GenerateOptions& options, Index token) {
  const auto& stops = options.stop_tokens;
  if (options.on_token && !options.on_token(token)) return false;
  return std::find(stops.begin(), stops.end(), token) == stops.end();
}

}  // namespace detail

/// The new tokens behind `prompt`, with work spread over `executor`.
template <typename Scalar, typename Attention, typename Tokens, Executor E = Serial>
std::vector<Index> generate(const Decoder<Scalar, Attention>& model, const Tokens& prompt,
                            const GenerateOptions& options = {}, E&& executor = {}) {
  DecoderCache<Scalar> cache = model.make_cache();
  return generate(model, prompt, options, cache, executor);
}
template <typename Scalar, typename Attention, Executor E = Serial>
std::vector<Index> generate(const Decoder<Scalar, Attention>& model, std::initializer_list<Index> prompt,
                            const GenerateOptions& options = {}, E&& executor = {}) {
  return generate(model, std::span(prompt), options, executor);
}

/// The same behind what is in `cache`, which holds prompt and text, but for the last token, afterwards.
template <typename Scalar, typename Attention, typename Tokens, typename Storage, Executor E = Serial>
std::vector<Index> generate(const Decoder<Scalar, Attention>& model, const Tokens& prompt,
                            const GenerateOptions& options, DecoderCache<Storage>& cache, E&& executor = {}) {
  return generate(model, prompt, options, cache, CausalMask{}, executor);
}

/// The same under the mask that the model was trained with, which is that of all tokens, as if they stood in one piece.
template <typename Scalar, typename Attention, typename Tokens, typename Storage, AttentionMask Mask,
          Executor E = Serial>
std::vector<Index> generate(const Decoder<Scalar, Attention>& model, const Tokens& prompt,
                            const GenerateOptions& options, DecoderCache<Storage>& cache, const Mask& mask,
                            E&& executor = {}) {
  TokenSampler sampler(options);
  std::vector<Index> tokens(std::data(prompt), std::data(prompt) + std::size(prompt));
  const std::size_t prompt_size = tokens.size();
  const std::size_t most_tokens = detail::most_tokens(options, static_cast<Index>(prompt_size), cache);

  Workspace workspace;
  Matrix<Scalar> logits(1, model.config().vocab_size);
  const std::span<const Scalar> scores(logits.data(), static_cast<std::size_t>(logits.size()));
  using Transaction = detail::CacheTransaction<Storage>;
  Transaction transaction(cache, Transaction::Calls::several);
  model.last_logits_into(logits, tokens, cache, mask, options.prefill_chunk, workspace, executor);
  while (tokens.size() < most_tokens) {
    if (tokens.size() > prompt_size) {
      model.last_logits_into(logits, std::span(&tokens.back(), 1), cache, mask, 1, workspace, executor);
    }
    tokens.push_back(sampler.next(scores, std::span<const Index>(tokens)));
    if (!detail::goes_on(options, tokens.back())) break;
  }
  transaction.keep();
  tokens.erase(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(prompt_size));
  return tokens;
}

}  // namespace diffattn::inline v0_1
