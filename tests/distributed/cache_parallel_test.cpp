// A cache that is spread over ranks: what one rank with the whole cache computes, and what it costs to exchange.

#include "diffattn/distributed/cache_parallel.hpp"

#include <limits>

#include "diffattn/distributed/thread_communicator.hpp"
#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/multihead_diff_attention_v2.hpp"
#include "diffattn/models/decoder.hpp"
#include "distributed/expect.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

using namespace support;
using diffattn::CacheParallel;
using diffattn::CausalMask;
using diffattn::Index;
using diffattn::KvCache;
using diffattn::Matrix;
using diffattn::ThreadCommunicator;
using diffattn::Workspace;

namespace {

/// Calls of so many tokens.
const std::vector<Index> kFedTokens = {7, 1, 1, 5, 1, 2, 1};
constexpr Index kAllTokens = 18;

template <typename Layer, typename Mask>
void check_cache_of(const typename Layer::Config& config, const Mask& mask, const diffattn::KvCacheOptions& options) {
  const Layer layer(config);
  Rng rng = make_rng();
  const auto x = random_matrix<double>(kAllTokens, config.embed_dim, rng);
  Matrix<double> y(kAllTokens, config.embed_dim);
  KvCache<double> whole(options);
  Index at = 0;
  for (const Index count : kFedTokens) {
    y.middleRows(at, count) = layer.forward(x.middleRows(at, count), whole, mask);
    at += count;
  }
  for (const Index size : {1, 2, 3, 4}) {
    INFO(size << " ranks");
    std::vector<Matrix<double>> results(static_cast<std::size_t>(size));
    std::vector<Index> kept(static_cast<std::size_t>(size));
    diffattn::run_ranks(size, [&](ThreadCommunicator& communicator) {
      CacheParallel ranks(communicator);
      KvCache<double> mine(options);
      Workspace workspace;
      Matrix<double> my_y(kAllTokens, config.embed_dim);
      Index first = 0;
      for (const Index count : kFedTokens) {
        ranks.feed(count);
        layer.forward_into(my_y.middleRows(first, count), x.middleRows(first, count), mine, mask, workspace, ranks);
        first += count;
      }
      results[static_cast<std::size_t>(communicator.rank())] = my_y;
      kept[static_cast<std::size_t>(communicator.rank())] = mine.position();
    });
    Index all = 0;
    for (std::size_t rank = 0; rank < results.size(); ++rank) {
      CHECK((results[rank] - y).cwiseAbs().maxCoeff() <= 1e-13);
      CHECK(results[rank] == results[0]);
      all += kept[rank];
    }
    CHECK(all == kAllTokens);
  }
}

}  // namespace

TEST_CASE("Layers behind a cache over ranks are those behind one", "[distributed]") {
  const diffattn::RotaryConfig rotary{};
  check_cache_of<diffattn::MultiheadAttention<double>>(
      {.embed_dim = 16, .num_heads = 4, .num_kv_heads = 2, .rotary = rotary}, CausalMask{}, {});
  check_cache_of<diffattn::MultiheadDiffAttention<double>>(
      {.embed_dim = 16, .num_heads = 4, .num_kv_heads = 1, .num_noise_heads = 2, .rotary = rotary}, CausalMask{}, {});
  check_cache_of<diffattn::MultiheadDiffAttention<double>>({.embed_dim = 16, .num_heads = 2, .rotary = rotary},
                                                           with_bias(CausalMask{}, diffattn::AlibiBias{0.5}),
                                                           {.window = 6});
  check_cache_of<diffattn::MultiheadDiffAttentionV2<double>>(
      {.embed_dim = 16, .num_heads = 2, .num_kv_heads = 1, .rotary = rotary}, CausalMask{}, {});
}

TEST_CASE("A decoder behind a cache over ranks is that behind one", "[distributed]") {
  using Decoder = diffattn::Decoder<double, diffattn::MultiheadDiffAttention<double>>;
  const Decoder decoder({.vocab_size = 23,
                         .num_layers = 2,
                         .hidden_dim = 24,
                         .attention = {.embed_dim = 16, .num_heads = 2, .rotary = diffattn::RotaryConfig{}}});
  const std::vector<Index> tokens = {3, 1, 4, 1, 5, 9, 2, 6};
  const Matrix<double> logits = decoder.logits(tokens);
  std::vector<double> errors(3, 1);
  diffattn::run_ranks(3, [&](ThreadCommunicator& communicator) {
    CacheParallel ranks(communicator);
    auto cache = decoder.make_cache();
    Workspace workspace;
    Matrix<double> mine(8, 23);
    Index at = 0;
    for (const Index count : {5, 1, 1, 1}) {
      ranks.feed(count);
      const std::vector<Index> fed(tokens.begin() + at, tokens.begin() + at + count);
      decoder.logits_into(mine.middleRows(at, count), fed, cache, CausalMask{}, workspace, ranks);
      at += count;
    }
    errors[static_cast<std::size_t>(communicator.rank())] = (mine - logits).cwiseAbs().maxCoeff();
  });
  for (const double error : errors) CHECK(error <= 1e-12);
}

namespace {

/// Bytes that a rank sends for one new token of 4 heads, of width 16 with values of 32, behind a cache.
template <typename Layer>
std::uint64_t bytes_for_a_token(Index size) {
  const Layer layer({.embed_dim = 128, .num_heads = 4, .head_dim = 16});
  std::uint64_t sent = 0;
  diffattn::run_ranks(size, [&](ThreadCommunicator& communicator) {
    CacheParallel ranks(communicator);
    KvCache<float> cache;
    Workspace workspace;
    Matrix<float> x = Matrix<float>::Ones(9, 128), y = x;
    ranks.feed(9);
    layer.forward_into(y, x, cache, CausalMask{}, workspace, ranks);
    ranks.feed(1);
    const auto before = communicator.bytes_sent();
    layer.forward_into(y.topRows(1), x.topRows(1), cache, CausalMask{}, workspace, ranks);
    if (communicator.rank() == 0) sent = communicator.bytes_sent() - before;
  });
  return sent;
}

}  // namespace

TEST_CASE("Decoding exchanges dv + 4 numbers a row and head, standard heads dv + 2", "[distributed]") {
  CHECK(bytes_for_a_token<diffattn::MultiheadDiffAttention<float>>(1) == 0);
  CHECK(bytes_for_a_token<diffattn::MultiheadDiffAttention<float>>(2) == 4 * (32 + 4) * sizeof(float));
  CHECK(bytes_for_a_token<diffattn::MultiheadDiffAttention<float>>(3) == 2 * 4 * (32 + 4) * sizeof(float));
  CHECK(bytes_for_a_token<diffattn::MultiheadAttention<float>>(2) == 4 * (16 + 2) * sizeof(float));
  CHECK(bytes_for_a_token<diffattn::MultiheadAttention<float>>(3) == 2 * 4 * (16 + 2) * sizeof(float));
}

namespace {

/// A mask that one rank cannot answer.
struct MaskThatFails {
  bool fails;

  diffattn::KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    if (fails) throw std::runtime_error("no mask here");
    return CausalMask{}.visible_keys(query, n_q, n_k);
  }
};

template <typename Layer>
void check_failure() {
  const Layer layer({.embed_dim = 16, .num_heads = 2});
  const Matrix<float> x = Matrix<float>::Ones(6, 16), expected = layer.forward(x);
  std::vector<std::string> errors(2);
  std::vector<double> differences(2, 1);
  diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
    const auto rank = static_cast<std::size_t>(communicator.rank());
    CacheParallel ranks(communicator);
    KvCache<float> cache;
    Workspace workspace;
    Matrix<float> y = x;
    for (const Index count : {2, 3}) {
      ranks.feed(count);
      layer.forward_into(y.topRows(count), x.topRows(count), cache, MaskThatFails{false}, workspace, ranks);
    }
    ranks.feed(1);
    errors[rank] = said_by(
        [&] { layer.forward_into(y.topRows(1), x.topRows(1), cache, MaskThatFails{rank == 1}, workspace, ranks); });
    ranks.take_back();
    ranks.feed(1);
    layer.forward_into(y.topRows(1), x.topRows(1), cache, MaskThatFails{false}, workspace, ranks);
    differences[rank] = static_cast<double>((y.topRows(1) - expected.bottomRows(1)).cwiseAbs().maxCoeff());
  });
  CHECK(errors == std::vector<std::string>{"rank 1: no mask here", "no mask here"});
  for (const double difference : differences) CHECK(difference <= 1e-6);
}

}  // namespace

TEST_CASE("A rank that fails while decoding is an error on all, and the caches go on", "[distributed]") {
  check_failure<diffattn::MultiheadDiffAttention<float>>();
  check_failure<diffattn::MultiheadAttention<float>>();
}

namespace {

/// A causal mask that fails when it has been asked so often.
struct MaskThatFailsLater {
  Index* asked;
  Index fails_at;

  diffattn::KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    if (++*asked == fails_at) throw std::runtime_error("no mask here");
    return CausalMask{}.visible_keys(query, n_q, n_k);
  }
};

}  // namespace

TEST_CASE("A rank that fails at any moment of a call is an error on all", "[distributed]") {
  const diffattn::MultiheadDiffAttention<float> layer({.embed_dim = 16, .num_heads = 2});
  const Matrix<float> x = Matrix<float>::Ones(6, 16);  // more than few rows: a mask is asked in both phases
  for (Index fails_at = 1;; ++fails_at) {
    std::vector<std::string> errors(2);
    Index asked_of_failing = 0;
    diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
      CacheParallel ranks(communicator);
      KvCache<float> cache;
      Workspace workspace;
      Matrix<float> y = x;
      Index asked = 0;
      const MaskThatFailsLater mask{&asked, communicator.rank() == 0 ? fails_at : 0};  // which keeps the tokens
      ranks.feed(6);
      errors[static_cast<std::size_t>(communicator.rank())] =
          said_by([&] { layer.forward_into(y, x, cache, mask, workspace, ranks); });
      if (communicator.rank() == 0) asked_of_failing = asked;
      diffattn::check_on_all(communicator, "afterwards", [] {});
    });
    if (asked_of_failing < fails_at) {
      CHECK(fails_at > 12);
      CHECK(errors == std::vector<std::string>(2));
      break;
    }
    REQUIRE(errors == std::vector<std::string>{"no mask here", "rank 0: no mask here"});
  }
}

TEST_CASE("A result that is NaN is no failure of a rank", "[distributed]") {
  const diffattn::MultiheadDiffAttention<float> layer({.embed_dim = 16, .num_heads = 2});
  std::vector<int> nan(2);
  diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
    CacheParallel ranks(communicator);
    KvCache<float> cache;
    Workspace workspace;
    Matrix<float> x = Matrix<float>::Ones(2, 16), y = x;
    x(1, 3) = std::numeric_limits<float>::quiet_NaN();
    ranks.feed(2);
    layer.forward_into(y, x, cache, workspace, ranks);
    nan[static_cast<std::size_t>(communicator.rank())] = !y.row(0).hasNaN() && y.row(1).hasNaN();
  });
  CHECK(nan == std::vector<int>(2, 1));
}

TEST_CASE("What is wrong with the arguments of one rank, or its cache, is an error on all", "[distributed]") {
  const diffattn::MultiheadDiffAttention<float> layer({.embed_dim = 16, .num_heads = 2});
  const auto errors_of = [&](Index max_tokens, const auto& call) {
    std::vector<std::string> errors(2);
    diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
      CacheParallel ranks(communicator);
      KvCache<float> cache({.max_tokens = max_tokens});
      Workspace workspace;
      const Matrix<float> x = Matrix<float>::Ones(3, 16);
      Matrix<float> y = x;
      for (int before = 0; before < 2; ++before) {  // rank 0 keeps the first, rank 1 the second
        ranks.feed(2);
        layer.forward_into(y.topRows(2), x.topRows(2), cache, workspace, ranks);
      }
      ranks.feed(2);
      errors[static_cast<std::size_t>(communicator.rank())] = said_by([&] {
        call(
            [&](Index rows, Index cols) {
              layer.forward_into(y.topRows(rows), x.topLeftCorner(rows, cols), cache, workspace, ranks);
            },
            communicator.rank() == 1);
      });
      diffattn::check_on_all(communicator, "afterwards", [] {});
    });
    return errors;
  };
  const auto rows = errors_of(0, [](const auto& forward, bool odd) { forward(odd ? 3 : 2, 16); });
  CHECK(rows[1].find("was for 2 tokens and ") != std::string::npos);
  CHECK(rows[0] == "rank 1: " + rows[1]);
  const auto none = errors_of(0, [](const auto& forward, bool odd) { forward(odd ? 0 : 2, 16); });
  CHECK(none[0] == "rank 1: " + none[1]);
  const auto width = errors_of(0, [](const auto& forward, bool odd) { forward(2, odd ? 15 : 16); });
  CHECK(width[1] == "MultiheadDiffAttention: x must be 2 x 16, got 2 x 15");
  CHECK(width[0] == "rank 1: " + width[1]);
  // Rank 0 alone keeps the tokens of the third call.
  const auto room = errors_of(3, [](const auto& forward, bool) { forward(2, 16); });
  CHECK(room[0] == "MultiheadDiffAttention: the cache holds at most 3 tokens and has 2, cannot append 2");
  CHECK(room[1] == "rank 0: " + room[0]);
}

TEST_CASE("A call without a feed() of its own is refused", "[distributed]") {
  const diffattn::MultiheadDiffAttention<float> layer({.embed_dim = 16, .num_heads = 2});
  std::vector<std::string> again(2), others(2);
  diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
    const auto rank = static_cast<std::size_t>(communicator.rank());
    CacheParallel ranks(communicator);
    KvCache<float> cache;
    Workspace workspace;
    Matrix<float> x = Matrix<float>::Ones(2, 16), y = x;
    ranks.feed(2);
    others[rank] = said_by([&] { layer.forward_into(y.topRows(1), x.topRows(1), cache, workspace, ranks); });
    layer.forward_into(y, x, cache, workspace, ranks);
    again[rank] = said_by([&] { layer.forward_into(y, x, cache, workspace, ranks); });
  });
  for (std::size_t rank = 0; rank < 2; ++rank) {
    CHECK(others[rank].find("was for 2 tokens and ") != std::string::npos);
    CHECK(again[rank].find("every call needs a feed() of its own") != std::string::npos);
  }
}

TEST_CASE("Ranks that feed different numbers of tokens are refused", "[distributed]") {
  std::vector<std::string> errors(2);
  diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
    CacheParallel ranks(communicator);
    errors[static_cast<std::size_t>(communicator.rank())] = said_by([&] { ranks.feed(1 + communicator.rank()); });
  });
  for (const std::string& error : errors) {
    CHECK(error == "CacheParallel: ranks disagree on tokens to feed: rank 0 has 1, rank 1 has 2");
  }
}
