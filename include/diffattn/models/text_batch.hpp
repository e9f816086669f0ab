#pragma once

// The one loop of generate (generate.hpp), for one text or many: prompts are fed, then every step chooses a token for
// each text that goes on and feeds them all at once. Texts that have ended take no further part.
//
// Tested by tests/models/generate_test.cpp and generate_batch_test.cpp.

#include <algorithm>
#include <cstddef>
#include <deque>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/models/decoder_cache.hpp"
#include "diffattn/models/generate_options.hpp"
#include "diffattn/models/token_sampler.hpp"

namespace diffattn::inline v0_1::detail {

/// How many tokens prompt and text may have together behind `position` tokens in `cache`, which others may share. Throws,
/// naming `where`, unless the options can be and the prompt has its place.
template <typename Storage>
std::size_t most_tokens(const char* where, const GenerateOptions& options, Index prompt_size,
                        const DecoderCache<Storage>& cache, Index position) {
  if (options.max_new_tokens < 0) {
    throw_invalid({where, ": max_new_tokens must be at least 0, got ", options.max_new_tokens});
  }
  check_positive(where, "prefill_chunk", options.prefill_chunk);
  if (options.max_length) check_positive(where, "max_length", *options.max_length);
  if (prompt_size == 0) throw_invalid({where, ": the prompt is empty"});
  Index room = std::numeric_limits<Index>::max();
  if (options.max_length) room = *options.max_length - position;
  if (prompt_size > room) throw_invalid({where, ": the prompt has ", prompt_size, " tokens, there is room for ", room});
  // A prompt that is too long for the cache itself, the decoder refuses.
  if (const Index most = cache.options().max_tokens; most != 0) room = std::min(room, most - position);
  return static_cast<std::size_t>(prompt_size + std::min(options.max_new_tokens, room - prompt_size));
}

/// A text on its way. What it feeds to its cache stays there only if it is kept.
template <typename Storage>
class Text {
  using Transaction = CacheTransaction<Storage>;

 public:
  /// Throws for options that cannot be, and for a prompt that has no place.
  template <typename Tokens>
  Text(const Tokens& prompt, const GenerateOptions& how, DecoderCache<Storage>& behind)
      : Text(prompt, how, behind, behind.position()) {}
  /// The same where the cache has some of the `position` tokens before.
  template <typename Tokens>
  Text(const Tokens& prompt, const GenerateOptions& how, DecoderCache<Storage>& behind, Index position)
      : options(how),
        cache(behind),
        sampler(how),
        tokens(std::data(prompt), std::data(prompt) + std::size(prompt)),
        prompt_size_(tokens.size()),
        most_(most_tokens("generate", how, static_cast<Index>(prompt_size_), behind, position)),
        transaction_(behind, Transaction::Calls::several) {}

  bool has_room() const { return tokens.size() < most_; }

  /// Adds a token that was chosen. Whether text goes on behind it.
  bool add(Index token) {
    tokens.push_back(token);
    const auto& stops = options.stop_tokens;
    if (options.on_token && !options.on_token(token)) return false;
    return has_room() && std::find(stops.begin(), stops.end(), token) == stops.end();
  }

  void keep() noexcept { transaction_.keep(); }

  /// What was written, without the prompt.
  std::vector<Index> take() && {
    tokens.erase(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(prompt_size_));
    return std::move(tokens);
  }

  const GenerateOptions& options;
  DecoderCache<Storage>& cache;
  TokenSampler sampler;
  std::vector<Index> tokens;  ///< prompt and text

 private:
  std::size_t prompt_size_, most_;
  Transaction transaction_;
};

/// Writes all texts to their ends. Whatever is thrown, all caches are as before.
template <typename Scalar, typename Model, typename Storage, typename Mask, typename E>
void write_texts(const Model& model, std::deque<Text<Storage>>& texts, const Mask& mask, E& executor) {
  static_assert(!spreads_sequences<E>,
                "diffattn: over ranks, include diffattn/distributed/generate_over_ranks.hpp; one text at a time");
  Workspace workspace;
  Matrix<Scalar> logits(static_cast<Index>(texts.size()), model.config().vocab_size);
  std::vector<Text<Storage>*> going;
  Index row = 0;
  for (Text<Storage>& text : texts) {
    auto scores = logits.middleRows(row, 1);
    model.last_logits_into(scores, text.tokens, text.cache, mask, text.options.prefill_chunk, workspace, executor);
    if (!text.has_room()) continue;
    going.push_back(&text);
    ++row;  // the next text overwrites the scores of one that has ended
  }
  std::vector<Index> chosen(going.size());
  std::vector<DecoderCache<Storage>*> caches(going.size());
  while (!going.empty()) {
    executor.run(static_cast<Index>(going.size()), [&](Index i, Index /*worker*/) {
      const auto at = static_cast<std::size_t>(i);
      const std::span<const Scalar> scores(&logits(i, 0), static_cast<std::size_t>(logits.cols()));
      chosen[at] = going[at]->sampler.next(scores, std::span<const Index>(going[at]->tokens));
    });
    std::size_t left = 0;
    for (std::size_t i = 0; i < going.size(); ++i) {
      if (!going[i]->add(chosen[i])) continue;
      chosen[left] = chosen[i];
      caches[left] = &going[i]->cache;
      going[left++] = going[i];
    }
    going.resize(left);
    const auto batch = std::span(caches).first(left);
    model.logits_into(logits.topRows(static_cast<Index>(left)), std::span(chosen).first(left), batch, mask, workspace,
                      executor);
  }
  for (Text<Storage>& text : texts) text.keep();
}

}  // namespace diffattn::inline v0_1::detail
