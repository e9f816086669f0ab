#pragma once

// generate: text from a Decoder, token by token; one text, or many at once.
//
//   std::vector<Index> tokens = generate(model, prompt, {.max_new_tokens = 100, .temperature = 0.8, .top_p = 0.95});
//   std::vector<std::vector<Index>> texts = generate(model, prompts, {.max_new_tokens = 100}, threads);
//
// Returns the new tokens without the prompt; a stop token ends them and is the last of them. How they are chosen,
// generate_options.hpp says.
//
// Prompt   any contiguous integers, one at least. It is fed in chunks, which bounds scratch, not in one piece.
// Prompts  any contiguous range of such, of any lengths, with one GenerateOptions for all or a range of them, one a
//          prompt: other samplers, seeds, stops, callbacks. A step feeds one token of every text that goes on, so that
//          weights are read once for all of them; a text that ends leaves the batch. Each text is the one that
//          generate gives of its prompt alone, as long as rounding does not decide between two tokens: rows of a
//          product are rounded alike up to 4 of them and from 5 on. Callbacks are called by the thread that called,
//          step by step in the order of the prompts.
// Caches   with a DecoderCache of yours, the prompt follows what is in it, and all but the last new token are in it
//          afterwards: the next call may go on. For many prompts pointers to as many caches (layers/cache_batch.hpp).
// Errors   std::invalid_argument naming the option, an empty prompt, a token id outside the vocabulary, or a prompt
//          longer than max_length or the cache, before any work; of many, with the number of the sequence: "generate:
//          sequence 3: the prompt is empty". When there is no room for a further token, generation ends.
//          std::runtime_error for logits that are NaN, +inf or all -inf, of which none can be chosen.
//          Whatever is thrown, also by on_token or for lack of memory, all caches are as they were before the call.
// Memory   a row of logits a text, their order, the caches; a workspace that grows to that of one chunk. With a window,
//          until it returns, also what the caches held before.

#include <concepts>
#include <cstddef>
#include <deque>
#include <initializer_list>
#include <iterator>
#include <span>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/cache_batch.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/models/decoder_cache.hpp"
#include "diffattn/models/generate_options.hpp"
#include "diffattn/models/text_batch.hpp"
#include "diffattn/models/token_sampler.hpp"

namespace diffattn::inline v0_1 {

/// A prompt: contiguous integers.
template <typename Tokens>
concept TokenRange = requires(const Tokens& tokens) {
  static_cast<Index>(*std::data(tokens));
  std::size(tokens);
};

/// Many prompts, one after another in memory.
template <typename Prompts>
concept PromptBatch = requires(const Prompts& prompts) {
  requires TokenRange<std::remove_cvref_t<decltype(*std::data(prompts))>>;
  std::size(prompts);
};

/// How many texts are written: GenerateOptions for all of them, or a contiguous range with those of each.
template <typename Options>
concept BatchOptions = std::same_as<Options, GenerateOptions> || requires(const Options& options) {
  { *std::data(options) } -> std::convertible_to<const GenerateOptions&>;
  std::size(options);
};

/// The new tokens behind `prompt`, with work spread over `executor`.
template <typename Scalar, typename Attention, TokenRange Tokens, Executor E = Serial>
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
template <typename Scalar, typename Attention, TokenRange Tokens, typename Storage, Executor E = Serial>
std::vector<Index> generate(const Decoder<Scalar, Attention>& model, const Tokens& prompt,
                            const GenerateOptions& options, DecoderCache<Storage>& cache, E&& executor = {}) {
  return generate(model, prompt, options, cache, CausalMask{}, executor);
}

/// The same under the mask that the model was trained with, which is that of all tokens, as if they stood in one piece.
template <typename Scalar, typename Attention, TokenRange Tokens, typename Storage, AttentionMask Mask,
          Executor E = Serial>
std::vector<Index> generate(const Decoder<Scalar, Attention>& model, const Tokens& prompt,
                            const GenerateOptions& options, DecoderCache<Storage>& cache, const Mask& mask,
                            E&& executor = {}) {
  std::deque<detail::Text<Storage>> texts;
  texts.emplace_back(prompt, options, cache);
  detail::write_texts<Scalar>(model, texts, mask, executor);
  return std::move(texts.front()).take();
}

/// The new tokens behind each of many prompts, written side by side.
template <typename Scalar, typename Attention, PromptBatch Prompts, BatchOptions Options = GenerateOptions,
          Executor E = Serial>
std::vector<std::vector<Index>> generate(const Decoder<Scalar, Attention>& model, const Prompts& prompts,
                                         const Options& options = {}, E&& executor = {}) {
  std::vector<DecoderCache<Scalar>> caches(std::size(prompts), model.make_cache());
  std::vector<DecoderCache<Scalar>*> batch;
  for (DecoderCache<Scalar>& cache : caches) batch.push_back(&cache);
  return generate(model, prompts, options, batch, executor);
}

/// The same, each behind what is in its cache, which holds prompt and text, but for the last token, afterwards.
template <typename Scalar, typename Attention, PromptBatch Prompts, BatchOptions Options = GenerateOptions,
          CacheBatch<DecoderCache> Caches, Executor E = Serial>
std::vector<std::vector<Index>> generate(const Decoder<Scalar, Attention>& model, const Prompts& prompts,
                                         const Options& options, const Caches& caches, E&& executor = {}) {
  return generate(model, prompts, options, caches, CausalMask{}, executor);
}

/// The same under the mask that the model was trained with.
template <typename Scalar, typename Attention, PromptBatch Prompts, BatchOptions Options = GenerateOptions,
          CacheBatch<DecoderCache> Caches, AttentionMask Mask, Executor E = Serial>
std::vector<std::vector<Index>> generate(const Decoder<Scalar, Attention>& model, const Prompts& prompts,
                                         const Options& options, const Caches& caches, const Mask& mask,
                                         E&& executor = {}) {
  constexpr const char* kName = "generate";
  const auto n = static_cast<Index>(std::size(prompts));
  const auto batch = detail::batch_of<DecoderCache>(std::data(caches), std::size(caches));
  constexpr bool kForAll = std::is_same_v<Options, GenerateOptions>;
  const auto options_of = [&](std::size_t i) -> const GenerateOptions& {
    if constexpr (kForAll) {
      return options;
    } else {
      return std::data(options)[i];
    }
  };
  if constexpr (!kForAll) {
    if (const auto given = static_cast<Index>(std::size(options)); given != n) {
      detail::throw_invalid({kName, ": there must be options for each of the ", n, " prompts, got ", given});
    }
  }
  Workspace workspace;
  detail::check_batch(kName, "prompts", n, batch, workspace);
  detail::check_sequences(kName, n, [&](const char* where, Index i) {
    const auto at = static_cast<std::size_t>(i);
    const auto& prompt = std::data(prompts)[at];
    const auto size = static_cast<Index>(std::size(prompt));
    TokenSampler::check(options_of(at), where);
    detail::most_tokens(where, options_of(at), size, *batch[at], batch[at]->position());
    model.check_tokens(prompt, where);
    model.check_cache(*batch[at], size, where);
  });

  std::vector<std::vector<Index>> result(static_cast<std::size_t>(n));
  std::deque<detail::Text<typename std::remove_pointer_t<typename decltype(batch)::value_type>::Storage>> texts;
  for (std::size_t i = 0; i < result.size(); ++i) texts.emplace_back(std::data(prompts)[i], options_of(i), *batch[i]);
  detail::write_texts<Scalar>(model, texts, mask, executor);
  for (std::size_t i = 0; i < result.size(); ++i) result[i] = std::move(texts[i]).take();
  return result;
}

}  // namespace diffattn::inline v0_1
