#pragma once

// A prompt whose rows are spread over ranks goes into a cache that is spread over them, and text goes on behind it, on
// any communicator: what one rank with the whole cache computes.

#include <Eigen/Core>
#include <cmath>
#include <diffattn/distributed/cache_parallel.hpp>
#include <diffattn/distributed/generate_over_ranks.hpp>
#include <diffattn/distributed/sequence_parallel.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/models/generate.hpp>
#include <string>
#include <vector>

#include "distributed/expect.hpp"

namespace prefill_cases {

using diffattn::CacheParallel;
using diffattn::CausalMask;
using diffattn::Communicator;
using diffattn::Index;
using diffattn::KvCache;
using diffattn::Matrix;
using diffattn::SequenceParallel;
using diffattn::Workspace;
using support::expect;

using Layer = diffattn::MultiheadDiffAttention<double>;
using Model = diffattn::Decoder<double, Layer>;
using Tokens = std::vector<Index>;

constexpr Index kPrompt = 37, kAll = 43;

inline void expect_close(const Matrix<double>& a, const Matrix<double>& b, double bound, const std::string& what) {
  expect(a.rows() == b.rows() && a.cols() == b.cols(), what + " of the same shape");
  const double difference = (a - b).cwiseAbs().maxCoeff();
  expect(difference <= bound, what + " that differs by no more than rounding, got " + std::to_string(difference));
}

/// A layer: prompt, three tokens, then one at a time.
template <typename Storage, typename Mask, Communicator C>
void layer_goes_on(C& communicator, const Mask& mask, const diffattn::KvCacheOptions& options, double bound) {
  const Layer layer(
      {.embed_dim = 16, .num_heads = 4, .num_kv_heads = 2, .num_noise_heads = 2, .rotary = diffattn::RotaryConfig{}});
  Matrix<double> x(kAll, 16);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = std::sin(static_cast<double>(i + i * i % 37));
  KvCache<Storage> whole(options), mine(options);
  Matrix<double> expected(kAll, 16), y(kAll, 16);
  expected.topRows(kPrompt) = layer.forward(x.topRows(kPrompt), whole, mask);

  SequenceParallel prompt(communicator, kPrompt);
  Workspace workspace;
  Matrix<double> my_y(prompt.placement().mine(), 16);
  layer.forward_into(my_y, prompt.placement().rows_of(x.topRows(kPrompt)), mine, mask, workspace, prompt);
  y.topRows(kPrompt) = prompt.gather(my_y);
  expect(mine.position() == prompt.placement().mine(), "this rank's rows in its cache");

  CacheParallel ranks(communicator);
  ranks.prefilled(prompt.placement());
  Index at = kPrompt;
  for (const Index count : {3, 1, 1, 1}) {
    expected.middleRows(at, count) = layer.forward(x.middleRows(at, count), whole, mask);
    ranks.feed(count);
    layer.forward_into(y.middleRows(at, count), x.middleRows(at, count), mine, mask, workspace, ranks);
    at += count;
  }
  expect(ranks.tokens() == kAll && ranks.kept_before(kAll) == mine.position(), "all tokens in the caches");
  expect_close(y, expected, bound, "y");
}

template <Communicator C>
void layers_go_on(C& communicator) {
  layer_goes_on<double>(communicator, CausalMask{}, {}, 1e-13);
  layer_goes_on<double>(communicator, CausalMask{}, {.window = 6, .page_size = 32}, 1e-13);
  layer_goes_on<double>(communicator, with_bias(CausalMask{}, diffattn::AlibiBias{0.5}), {.window = 9}, 1e-13);
  // The queries meet keys and values as they are stored, whether they come with them or later.
  layer_goes_on<Eigen::bfloat16>(communicator, CausalMask{}, {}, 1e-12);
}

inline const Model& model() {
  static const Model instance = [] {
    Model decoder({.vocab_size = 23,
                   .num_layers = 2,
                   .hidden_dim = 24,
                   .attention = {.embed_dim = 16, .num_heads = 2, .rotary = diffattn::RotaryConfig{}},
                   .seed = 3});
    decoder.embedding *= 50;  // no two tokens are about as good
    return decoder;
  }();
  return instance;
}

inline Tokens prompt_of(Index size) {
  Tokens prompt;
  for (Index i = 0; i < size; ++i) prompt.push_back((7 * i + i * i) % 23);
  return prompt;
}

template <Communicator C>
void decoder_goes_on(C& communicator) {
  const Tokens prompt = prompt_of(kPrompt), next = {4, 11};
  auto whole = model().make_cache();
  const Matrix<double> expected = model().logits(prompt, whole), expected_next = model().logits(next, whole);
  SequenceParallel rows(communicator, kPrompt);
  auto mine = model().make_cache();
  Workspace workspace;
  Matrix<double> my_logits(rows.placement().mine(), 23), logits(2, 23);
  model().logits_into(my_logits, rows.placement().elements_of(prompt), mine, CausalMask{}, workspace, rows);
  expect_close(rows.gather(my_logits), expected, 1e-10, "logits of the prompt");
  CacheParallel ranks(communicator);
  ranks.prefilled(rows.placement());
  ranks.feed(2);
  model().logits_into(logits, next, mine, CausalMask{}, workspace, ranks);
  expect_close(logits, expected_next, 1e-10, "logits behind it");
}

template <Communicator C>
void text_is_that_of_one_rank(C& communicator, Index size, const diffattn::GenerateOptions& options) {
  const Tokens prompt = prompt_of(size);
  auto whole = model().make_cache();
  const Tokens expected = generate(model(), prompt, options, whole);
  auto mine = model().make_cache();
  CacheParallel ranks(communicator);
  const std::string what = "the text behind " + std::to_string(size) + " tokens";
  expect(generate(model(), prompt, options, mine, ranks) == expected, what);
  expect(ranks.tokens() == whole.position(), "as many tokens fed as to one rank");
  expect(mine.position() == ranks.kept_before(ranks.tokens()), "a part of them in this rank's cache");
  Index all = mine.position();
  communicator.all_reduce(std::span<Index>(&all, 1));
  expect(all == whole.position(), "every token in the cache of one rank");
  // Behind it, from the last token on.
  const Tokens last = {expected.back()}, more = generate(model(), last, options, whole);
  expect(generate(model(), last, options, mine, ranks) == more, what + ", and behind that");
  expect(ranks.tokens() == whole.position(), "as many tokens fed as to one rank");
  // Without a cache, after which another text may follow.
  CacheParallel alone(communicator);
  for (int i = 0; i < 2; ++i) expect(generate(model(), prompt, options, alone) == expected, what + " without a cache");
}

template <Communicator C>
void texts(C& communicator) {
  text_is_that_of_one_rank(communicator, 30, {.max_new_tokens = 8});
  text_is_that_of_one_rank(communicator, 9, {.max_new_tokens = 8, .temperature = 2, .top_k = 12, .seed = 5});
  for (const Index size : {1, 2, 3, 4, 5}) {
    text_is_that_of_one_rank(communicator, size, {.max_new_tokens = 3, .prefill_chunk = 2});
  }
}

template <Communicator C>
void all_of_them(C& communicator) {
  layers_go_on(communicator);
  decoder_goes_on(communicator);
  texts(communicator);
}

}  // namespace prefill_cases
