// A stream without end: one frame or a few at a time, in fixed-size matrices, through a window. Memory is what kv_cache.hpp
// says, nothing is allocated once the window is full, and the results are those of the whole sequence at once.

#include <array>
#include <cmath>
#include <cstddef>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <diffattn/layers/rotary.hpp>
#include <limits>
#include <stdexcept>
#include <string>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

using namespace diffattn;

constexpr Index kStreamWidth = 24;

/// The bytes that kv_cache.hpp promises for a full window.
template <typename Storage, typename Layer>
std::size_t promised_bytes(const Layer& layer, Index window, Index page_size, Index chunk) {
  const Index pages = (window - 2 + std::max(chunk, page_size) + page_size - 1) / page_size + 1;
  const Index strip = detail::Tile<float>::kCols, kv_heads = layer.config().num_kv_heads;
  const Index value_columns = layer.v_proj.weight.rows() / kv_heads,
              whole = (value_columns + strip - 1) / strip * strip;
  const Index numbers = layer.k_proj.weight.rows() + kv_heads * whole;
  return static_cast<std::size_t>(pages * page_size * numbers) * sizeof(Storage);
}

/// Ten windows in chunks of kChunk frames; the last `forks` of the stream also from a fork and after a truncation.
template <Index kFrames, typename Storage, typename Layer, typename E>
void check_stream(const Layer& layer, Index window, Index page_size, Index used_page_size, E& executor) {
  INFO("window " << window << ", pages of " << page_size << ", chunks of " << kFrames);
  auto rng = support::make_rng();
  const Index chunks = 11 * window / kFrames + 2;
  const Matrix<float> x = support::random_matrix<float>(chunks * kFrames, kStreamWidth, rng);
  KvCache<Storage> cache({.window = window, .page_size = page_size}), usual({.window = window});
  REQUIRE(cache.options().page_size == used_page_size);

  Eigen::Matrix<float, kFrames, kStreamWidth, Eigen::RowMajor> frame, y, expected;
  Workspace workspace, usual_workspace;
  Matrix<float> streamed(x.rows(), x.cols());
  bool same = true, bounded = true;
  std::size_t allocations = 0;
  for (Index i = 0; i < chunks; ++i) {
    frame = x.middleRows(i * kFrames, kFrames);
    const bool full = cache.position() >= window;
    const std::size_t before = support::allocations();
    layer.forward_into(y, frame, cache, workspace, executor);
    if (full) allocations += support::allocations() - before;
    layer.forward_into(expected, frame, usual, usual_workspace);
    same = same && (y.array() == expected.array()).all();
    if (cache.position() >= window) {
      bounded = bounded && cache.memory_bytes() == promised_bytes<Storage>(layer, window, used_page_size, kFrames);
    }
    streamed.middleRows(i * kFrames, kFrames) = y;
  }
  CHECK(same);
  CHECK(bounded);
  CHECK(allocations == 0);
  const float tolerance = std::is_same_v<Storage, float> ? 1e-5f : 0.05f;
  CHECK((streamed - layer.forward(x, SlidingWindowMask{window})).cwiseAbs().maxCoeff() <= tolerance);
}

template <typename Storage, typename Layer>
void check_streams(const Layer& layer) {
  Serial serial;
  ThreadPool pool(2);
  check_stream<1, Storage>(layer, 100, 0, 256, serial);
  check_stream<1, Storage>(layer, 100, 32, 32, pool);
  check_stream<1, Storage>(layer, 1, 1, 32, serial);
  check_stream<1, Storage>(layer, 300, 100, 128, serial);
  check_stream<3, Storage>(layer, 64, 64, 64, serial);
  check_stream<7, Storage>(layer, 50, 32, 32, serial);
  check_stream<40, Storage>(layer, 90, 20, 32, pool);  // a chunk is more than a page
  check_stream<7, Storage>(layer, 300, 1000, 1024, serial);
}

const MultiheadDiffAttention<float>& stream_diff_layer() {
  static const MultiheadDiffAttention<float> layer({.embed_dim = kStreamWidth,
                                                    .num_heads = 2,
                                                    .num_kv_heads = 1,
                                                    .rotary = RotaryConfig{.table_positions = 64},
                                                    .seed = 3});
  return layer;
}

}  // namespace

TEST_CASE("a stream of frames through MultiheadDiffAttention", "[layers][kv_cache]") {
  check_streams<float>(stream_diff_layer());
  check_streams<Eigen::bfloat16>(stream_diff_layer());
}

TEST_CASE("a stream of frames through MultiheadDiffAttentionV2", "[layers][kv_cache]") {
  const MultiheadDiffAttentionV2<float> layer(
      {.embed_dim = kStreamWidth, .num_heads = 2, .rotary = RotaryConfig{.table_positions = 64}, .seed = 4});
  check_streams<float>(layer);
  check_streams<Eigen::bfloat16>(layer);
}

TEST_CASE("a stream of frames through MultiheadAttention", "[layers][kv_cache]") {
  const MultiheadAttention<float> layer(
      {.embed_dim = kStreamWidth, .num_heads = 4, .rotary = RotaryConfig{.table_positions = 64}, .seed = 5});
  check_streams<float>(layer);
  check_streams<Eigen::bfloat16>(layer);
}

TEST_CASE("chunks of any length up to the window come without allocations once the longest has come", "[layers]") {
  if (!support::counts_allocations()) return;
  const auto& layer = stream_diff_layer();
  auto rng = support::make_rng();
  const Index window = 96;
  KvCache<float> cache({.window = window, .page_size = 32});
  Workspace workspace;
  const Matrix<float> x = support::random_matrix<float>(window, kStreamWidth, rng);
  Matrix<float> y(window, kStreamWidth);
  const auto feed = [&](Index n) { layer.forward_into(y.topRows(n), x.topRows(n), cache, workspace); };
  for (int i = 0; i < 3; ++i) feed(80);
  feed(3);
  feed(3);  // the other kernel's scratch
  const std::size_t before = support::allocations(), held = cache.memory_bytes();
  for (const Index n : {1, 80, 2, 7, 79, 1, 1, 33, 80, 80, 1, 64, 5}) feed(n);
  CHECK(support::allocations() == before);
  CHECK(cache.memory_bytes() == held);
  CHECK(held == promised_bytes<float>(layer, window, 32, 80));

  // A prompt that is longer than the window takes what it needs, and gives it back.
  const Matrix<float> prompt = support::random_matrix<float>(1000, kStreamWidth, rng);
  KvCache<float> prompted({.window = window, .page_size = 32});
  layer.forward(prompt, prompted);
  CHECK(prompted.memory_bytes() == promised_bytes<float>(layer, window, 32, 1));
}

TEST_CASE("forks and truncations of a stream go on as the whole sequence does", "[layers][kv_cache]") {
  const auto& layer = stream_diff_layer();
  auto rng = support::make_rng();
  const Index page_size = GENERATE(32, 64, 256), window = 70, n = 600;
  INFO("pages of " << page_size);
  const Matrix<float> x = support::random_matrix<float>(n, kStreamWidth, rng);
  Matrix<float> other = x;
  other.bottomRows(n - 350) = support::random_matrix<float>(n - 350, kStreamWidth, rng);
  const Matrix<float> expected = layer.forward(x, SlidingWindowMask{window}),
                      other_expected = layer.forward(other, SlidingWindowMask{window});
  KvCache<float> cache({.window = window, .page_size = page_size});
  layer.forward(x.topRows(350), cache);
  KvCache<float> fork = cache.fork();
  for (Index i = 350; i < n; ++i) {
    CHECK((layer.forward(x.row(i), cache) - expected.row(i)).cwiseAbs().maxCoeff() <= 1e-5f);
    CHECK((layer.forward(other.row(i), fork) - other_expected.row(i)).cwiseAbs().maxCoeff() <= 1e-5f);
    if (i == 500) {  // back as far as the pages reach, and once more
      Index back = 0;
      for (Index tokens = 500; tokens > 400; --tokens) {
        KvCache<float> shorter = fork;
        try {
          shorter.truncate(tokens);
        } catch (const std::invalid_argument&) {
          break;
        }
        back = tokens;
      }
      const Index kept = 501 - window + 1;  // the first position that the next query sees
      CHECK(back == std::max<Index>(kept / page_size * page_size + window - 1, 401));
      fork.truncate(back);
      for (Index again = back; again <= i; ++again) {
        CHECK((layer.forward(other.row(again), fork) - other_expected.row(again)).cwiseAbs().maxCoeff() <= 1e-5f);
      }
    }
  }
  fork.clear();
  CHECK((layer.forward(x.topRows(200), fork) - expected.topRows(200)).cwiseAbs().maxCoeff() <= 1e-5f);
}

TEST_CASE("a page size is rounded up, or refused by name", "[layers][kv_cache]") {
  for (const auto& [asked, used] :
       {std::array<Index, 2>{0, 256}, {1, 32}, {32, 32}, {33, 64}, {256, 256}, {257, 512}, {1 << 24, 1 << 24}}) {
    CHECK(KvCache<float>({.page_size = asked}).options().page_size == used);
  }
  CHECK(KvCache<float>().options().page_size == 256);
  CHECK(support::thrown_by<std::invalid_argument>([] { KvCache<float> bad({.page_size = -1}); }) ==
        "KvCache: page_size must be 0 or more, got -1");
  CHECK(support::thrown_by<std::invalid_argument>([] { KvCache<float> bad({.page_size = (1 << 24) + 1}); }) ==
        "KvCache: page_size, tokens a page, must be at most 16777216, got 16777217");
}

TEST_CASE("a window that may never be full takes no more than max_tokens", "[layers][kv_cache]") {
  const auto& layer = stream_diff_layer();
  auto rng = support::make_rng();
  KvCache<float> cache({.max_tokens = 64, .window = 50, .page_size = 32});
  layer.forward(support::random_matrix<float>(64, kStreamWidth, rng), cache);
  KvCache<float> plain({.page_size = 32});
  layer.forward(support::random_matrix<float>(64, kStreamWidth, rng), plain);
  CHECK(cache.memory_bytes() == plain.memory_bytes());
}

TEST_CASE("angles are right a million positions out, and nothing is allocated there", "[layers][rotary]") {
  auto rng = support::make_rng();
  const Index dim = 64, first = GENERATE(Index{1000000}, Index{99999989});
  const Rotary<double> rotary(RotaryConfig{}, dim);
  Matrix<double> x = support::random_matrix<double>(3, 2 * dim, rng);
  const Matrix<double> before = x;
  const std::size_t allocations = support::allocations();
  rotary.apply(x, 2, first);
  CHECK(support::allocations() == allocations);
  const long double unit = std::numeric_limits<double>::epsilon() / 2;
  for (Index row = 0; row < 3; ++row) {
    for (Index i = 0; i < dim / 2; ++i) {
      const long double angle = static_cast<long double>(first + row) *
                                std::pow(10000.0L, -2.0L * static_cast<long double>(i) / static_cast<long double>(dim));
      for (Index head = 0; head < 2; ++head) {
        const Index at = head * dim + 2 * i;
        const long double a = before(row, at), b = before(row, at + 1);
        // A frequency that is rounded to double is off by that part of the angle.
        const long double bound = (2 + 4 * angle) * unit * (std::abs(a) + std::abs(b)) + 4 * unit;
        CHECK(std::abs(x(row, at) - (a * std::cos(angle) - b * std::sin(angle))) <= bound);
        CHECK(std::abs(x(row, at + 1) - (b * std::cos(angle) + a * std::sin(angle))) <= bound);
      }
    }
  }
}

TEST_CASE("a frame a million positions out attends as it would near the start", "[layers][kv_cache]") {
  // Turning is by differences of positions, so a frame sees its window alike wherever the two stand.
  const MultiheadDiffAttention<float> layer(
      {.embed_dim = 8, .num_heads = 1, .rotary = RotaryConfig{.table_positions = 64}, .seed = 8});
  auto rng = support::make_rng();
  const Index window = 20, chunk = 4000;
  const Matrix<float> x = support::random_matrix<float>(60, 8, rng), filler = Matrix<float>::Ones(chunk, 8);
  KvCache<float> cache({.window = window, .page_size = 32});
  Matrix<float> y(chunk, 8);
  Workspace workspace;
  for (Index i = 0; i < 1000000 / chunk; ++i) layer.forward_into(y, filler, cache, workspace);
  const Matrix<float> expected = layer.forward(x, SlidingWindowMask{window});
  Matrix<float> frame(1, 8);
  layer.forward_into(frame, x.row(0), cache, workspace);
  const std::size_t allocations = support::allocations();
  float error = 0;
  for (Index i = 1; i < x.rows(); ++i) {
    layer.forward_into(frame, x.row(i), cache, workspace);
    if (i >= window - 1) error = std::max(error, (frame - expected.row(i)).cwiseAbs().maxCoeff());
  }
  CHECK(support::allocations() == allocations);
  CHECK(cache.position() == 1000060);
  CHECK(error <= 2e-5f);
}
