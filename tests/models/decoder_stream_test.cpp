// A stream of tokens without end through a Decoder: one at a time, into a fixed-size row, through a window. No call takes
// memory once the window is full, and the logits are those of the whole text.

#include <array>
#include <cstddef>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <diffattn/models/decoder.hpp>
#include <random>
#include <type_traits>
#include <vector>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using namespace diffattn;

constexpr Index kStreamVocabulary = 17;

template <typename Attention, Index kTokens, typename Storage, typename E>
void check_token_stream(Index window, Index page_size, E& executor) {
  INFO("window " << window << ", pages of " << page_size << ", " << kTokens << " at a time");
  const Decoder<float, Attention> model(
      {.vocab_size = kStreamVocabulary,
       .num_layers = 2,
       .hidden_dim = 20,
       .attention = {.embed_dim = 16, .num_heads = 2, .rotary = RotaryConfig{.table_positions = 32}}});
  auto rng = support::make_rng();
  std::vector<Index> tokens(static_cast<std::size_t>((11 * window / kTokens + 2) * kTokens));
  for (Index& token : tokens) token = std::uniform_int_distribution<Index>(0, kStreamVocabulary - 1)(rng);
  const Matrix<float> expected = model.logits(tokens, SlidingWindowMask{window});

  auto cache = model.template make_cache<Storage>({.window = window, .page_size = page_size});
  Workspace workspace;
  Eigen::Matrix<float, kTokens, kStreamVocabulary, Eigen::RowMajor> y;
  std::array<Index, kTokens> next;
  std::size_t allocations = 0, held = 0;
  float error = 0;
  bool bounded = true;
  for (std::size_t at = 0; at < tokens.size(); at += kTokens) {
    std::copy_n(tokens.begin() + static_cast<std::ptrdiff_t>(at), kTokens, next.begin());
    const bool full = cache.position() >= window;
    const std::size_t before = support::allocations();
    model.logits_into(y, next, cache, workspace, executor);
    if (full) allocations += support::allocations() - before;
    if (full && held == 0) held = cache.memory_bytes();
    bounded = bounded && (!full || cache.memory_bytes() == held);
    error = std::max(error, (y - expected.middleRows(static_cast<Index>(at), kTokens)).cwiseAbs().maxCoeff());
  }
  CHECK(allocations == 0);
  CHECK(bounded);
  CHECK(error <= (std::is_same_v<Storage, float> ? 1e-5f : 0.02f));
}

template <typename Attention>
void check_token_streams() {
  Serial serial;
  ThreadPool pool(2);
  check_token_stream<Attention, 1, float>(40, 32, serial);
  check_token_stream<Attention, 1, float>(100, 0, pool);
  check_token_stream<Attention, 1, Eigen::bfloat16>(40, 32, serial);
  check_token_stream<Attention, 6, float>(70, 64, serial);
  check_token_stream<Attention, 6, Eigen::bfloat16>(70, 64, pool);
}

}  // namespace

TEST_CASE("a stream of tokens through a Decoder leaves the heap alone", "[models]") {
  check_token_streams<MultiheadDiffAttention<float>>();
  check_token_streams<MultiheadDiffAttentionV2<float>>();
  check_token_streams<MultiheadAttention<float>>();
}
