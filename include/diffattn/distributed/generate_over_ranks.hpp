#pragma once

// generate() over ranks (models/generate.hpp): the prompt is fed with its rows spread over the ranks, and text is written
// behind a cache of which each rank keeps a part. All ranks call it with the same arguments and get the same tokens.
//
//   CacheParallel ranks(communicator);                                        // or (communicator, executor)
//   std::vector<Index> tokens = generate(model, prompt, {.max_new_tokens = 100}, ranks);
//
//   DecoderCache<float> cache = model.make_cache();                           // this rank's part, which stays:
//   generate(model, prompt, options, cache, ranks);                           // or (…, cache, mask, ranks)
//   generate(model, next_prompt, options, cache, ranks);                      // behind it
//
// Tokens     those of one rank, as long as rounding does not decide between two of them. Every rank draws the same
//            numbers; callbacks are called on every rank and must return the same. One text at a time.
// Exchanged  for a prompt, keys and values of its rows (sequence_parallel.hpp) and the last hidden row; for a token what
//            cache_parallel.hpp says, and two checks of three words.
// Errors     as of generate(); an error of one rank is an error on all, and so is std::invalid_argument where they
//            disagree on the prompt, an option or a token. Whatever is thrown, caches and `ranks` are as before.
// Memory     a prompt for empty caches is fed in one piece, of which each rank has its rows; one behind other tokens, or
//            with fewer tokens than ranks, in chunks of prefill_chunk, as one rank feeds it. A cache's max_tokens are
//            those of all ranks.

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/distributed/cache_parallel.hpp"
#include "diffattn/distributed/collective_check.hpp"
#include "diffattn/distributed/communicator.hpp"
#include "diffattn/distributed/sequence_parallel.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/models/decoder_cache.hpp"
#include "diffattn/models/generate.hpp"
#include "diffattn/models/generate_options.hpp"
#include "diffattn/models/text_batch.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// Everything that the same text on all ranks depends on.
inline void agree_on_text(Agreed& agreed, std::span<const Index> prompt, const GenerateOptions& options) {
  const auto bytes_of = [](std::span<const Index> tokens) {
    return std::string_view(reinterpret_cast<const char*>(tokens.data()), tokens.size_bytes());
  };
  agreed.add("tokens of the prompt", static_cast<Index>(prompt.size()));
  agreed.add("the prompt", bytes_of(prompt));
  agreed.add("max_new_tokens", options.max_new_tokens);
  agreed.add("temperature", options.temperature);
  agreed.add("top_k", options.top_k.value_or(-1));
  agreed.add("top_p", options.top_p);
  agreed.add("repetition_penalty", options.repetition_penalty);
  agreed.add("stop_tokens", bytes_of(options.stop_tokens));
  agreed.add("seed", options.seed);
  agreed.add("prefill_chunk", options.prefill_chunk);
  agreed.add("max_length", options.max_length.value_or(-1));
}

/// Throws unless the cache is one for this model, and this rank's part of what `ranks` share, with room for a prompt.
template <typename Model, typename Storage, typename Ranks>
void check_shared_cache(const Model& model, const DecoderCache<Storage>& cache, Index prompt_size, const Ranks& ranks) {
  constexpr const char* where = "generate";
  model.check_cache(cache, 0, where);
  if (const Index kept = ranks.kept_before(ranks.tokens()); cache.position() != kept) {
    throw_invalid({where, ": CacheParallel has put ", kept, " tokens into this rank's cache, got one that has ",
                   cache.position(), "; every sequence needs a CacheParallel of its own"});
  }
  if (const Index most = cache.options().max_tokens; most != 0 && prompt_size > most - ranks.tokens()) {
    throw_invalid({where, ": the caches hold at most ", most, " tokens together and have ", ranks.tokens(),
                   ", cannot append ", prompt_size});
  }
}

/// Feeds a prompt to empty caches, its rows spread over the ranks; hidden (1 x embed_dim): the last of them, on all.
template <typename Model, typename Scalar, typename Storage, typename Mask, typename Ranks>
void prefill_over_ranks(const Model& model, Matrix<Scalar>& hidden, const std::vector<Index>& tokens,
                        DecoderCache<Storage>& cache, const Mask& mask, Workspace& workspace, Ranks& ranks) {
  const auto n = static_cast<Index>(tokens.size());
  SequenceParallel rows(ranks.communicator(), n, ranks.local());
  const SequencePlacement& placement = rows.placement();
  const Index owner = placement.rank_of(n - 1);
  rows.with_others("generate", model.num_layers(), [&] {
    const auto frame = workspace.frame();
    MatrixMap<Scalar> x(workspace.take<Scalar>(placement.mine() * hidden.cols()), placement.mine(), hidden.cols());
    model.hidden_into(x, placement.elements_of(tokens), cache, mask, workspace, rows);
    if (owner == placement.rank()) hidden = x.bottomRows(1);
  });
  ranks.communicator().broadcast(std::span<Scalar>(hidden.data(), static_cast<std::size_t>(hidden.size())), owner);
  ranks.prefilled(placement);
}

/// Feeds tokens to the caches in chunks, as one rank does; hidden (1 x embed_dim): the last row.
template <typename Model, typename Scalar, typename Storage, typename Mask, typename Ranks>
void feed_over_ranks(const Model& model, Matrix<Scalar>& hidden, std::span<const Index> tokens, Index chunk,
                     DecoderCache<Storage>& cache, const Mask& mask, Workspace& workspace, Ranks& ranks) {
  while (!tokens.empty()) {
    const auto count = std::min(tokens.size(), static_cast<std::size_t>(chunk));
    const auto rows = static_cast<Index>(count);
    ranks.feed(rows);
    // What fails behind the last exchange fails on one rank alone: the check tells the others.
    check_on_all(ranks.communicator(), "generate", [&] {
      ranks.with_others("generate", model.num_layers(), [&] {
        const auto frame = workspace.frame();
        MatrixMap<Scalar> x(workspace.take<Scalar>(rows * hidden.cols()), rows, hidden.cols());
        model.hidden_into(x, tokens.first(count), cache, mask, workspace, ranks);
        hidden = x.bottomRows(1);
      });
    });
    tokens = tokens.subspan(count);
  }
}

/// Writes a text that has been checked, with room for one row of hidden values and logits.
template <typename Model, typename Scalar, typename Storage, typename Mask, typename Ranks>
void write_over_ranks(const Model& model, Text<Storage>& text, Matrix<Scalar>& hidden, Matrix<Scalar>& logits,
                      const Mask& mask, Ranks& ranks) {
  auto& communicator = ranks.communicator();
  const Index size = communicator.size();
  Workspace workspace;
  if (ranks.tokens() == 0 && size > 1 && static_cast<Index>(text.tokens.size()) >= size) {
    prefill_over_ranks(model, hidden, text.tokens, text.cache, mask, workspace, ranks);
  } else {
    feed_over_ranks(model, hidden, std::span<const Index>(text.tokens), text.options.prefill_chunk, text.cache, mask,
                    workspace, ranks);
  }
  while (text.has_room()) {
    Index token = 0;
    bool goes_on = false;
    check_on_all(communicator, "generate", [&](Agreed& agreed) {
      model.head_into(logits, hidden, workspace, ranks.local());
      const std::span<const Scalar> scores(logits.data(), static_cast<std::size_t>(logits.cols()));
      token = text.sampler.next(scores, std::span<const Index>(text.tokens));
      goes_on = text.add(token);
      agreed.add("the new token", token);
      agreed.add("whether text goes on behind it", goes_on);
    });
    if (!goes_on) break;
    feed_over_ranks(model, hidden, std::span<const Index>(&token, 1), 1, text.cache, mask, workspace, ranks);
  }
}

}  // namespace detail

/// The new tokens behind `prompt`, on all ranks, each of which has the model. The caches are gone afterwards, and `ranks`
/// is as new. Collective. Throws as said above, and std::invalid_argument if tokens have been fed to `ranks`.
template <typename Scalar, typename Attention, TokenRange Tokens, Communicator C, Executor E>
std::vector<Index> generate(const Decoder<Scalar, Attention>& model, const Tokens& prompt,
                            const GenerateOptions& options, CacheParallel<C, E>& ranks) {
  std::optional<DecoderCache<Scalar>> cache;
  check_on_all(ranks.communicator(), "generate", [&] {
    if (ranks.tokens() != 0) {
      detail::throw_invalid({"generate: ", ranks.tokens(),
                             " tokens have been fed to the CacheParallel: pass the cache that they are in, too"});
    }
    cache.emplace(model.make_cache());
  });
  std::vector<Index> text = generate(model, prompt, options, *cache, CausalMask{}, ranks);
  ranks.take_back(0);
  return text;
}

/// The same behind what is in the caches of all ranks, of which `cache` is this one's. Collective.
template <typename Scalar, typename Attention, TokenRange Tokens, typename Storage, AttentionMask Mask, Communicator C,
          Executor E>
std::vector<Index> generate(const Decoder<Scalar, Attention>& model, const Tokens& prompt,
                            const GenerateOptions& options, DecoderCache<Storage>& cache, const Mask& mask,
                            CacheParallel<C, E>& ranks) {
  const Index before = ranks.tokens();
  std::optional<detail::Text<Storage>> text;
  Matrix<Scalar> hidden, logits;
  check_on_all(ranks.communicator(), "generate", [&](Agreed& agreed) {
    const auto prompt_size = static_cast<Index>(std::size(prompt));
    model.check_tokens(prompt, "generate");
    detail::check_shared_cache(model, cache, prompt_size, ranks);
    text.emplace(prompt, options, cache, before);
    hidden.resize(1, model.config().attention.embed_dim);
    logits.resize(1, model.config().vocab_size);
    detail::agree_on_text(agreed, text->tokens, options);
  });
  try {
    detail::write_over_ranks(model, *text, hidden, logits, mask, ranks);
  } catch (...) {
    ranks.take_back(before);
    throw;
  }
  text->keep();
  return std::move(*text).take();
}

}  // namespace diffattn::inline v0_1
