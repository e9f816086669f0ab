// Many sequences at once: each gives what it gives alone.

#include <array>
#include <deque>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <vector>

#include "layers/layer_checks.hpp"
#include "support/allocations.hpp"
#include "support/executors.hpp"
#include "support/failing_allocations.hpp"

namespace {

using namespace diffattn;

constexpr Index kBatchWidth = 24;

template <typename Layer>
Layer batch_layer() {
  auto rng = make_rng();
  Layer layer({.embed_dim = kBatchWidth,
               .num_heads = 4,
               .num_kv_heads = 2,
               .head_dim = 6,
               .rotary = RotaryConfig{.table_positions = 8},
               .bias = true});
  layer_checks::randomize(layer, rng);
  return layer;
}

/// Caches of all kinds: empty, short, over several pages, with windows, reserves and limits, and forks of one another.
template <typename Storage, typename Layer>
std::deque<KvCache<Storage>> batch_caches(const Layer& layer, Index count) {
  using Scalar = typename Layer::Scalar;
  auto rng = make_rng(1);
  const std::array<KvCacheOptions, 4> options = {
      KvCacheOptions{}, {.window = 20}, {.reserve = 700, .max_tokens = 2000}, {.window = 300}};
  const std::array<Index, 6> lengths = {300, 0, 5, 700, 255, 1};
  std::deque<KvCache<Storage>> caches;
  for (Index i = 0; i < count; ++i) {
    if (i % 7 == 6) {
      caches.push_back(caches.front().fork());
      continue;
    }
    caches.emplace_back(options[static_cast<std::size_t>(i % 4)]);
    const Index length = lengths[static_cast<std::size_t>(i % 6)];
    if (length != 0) layer.forward(random_matrix<Scalar>(length, kBatchWidth, rng), caches.back());
  }
  return caches;
}

template <typename Storage>
std::vector<KvCache<Storage>*> batch_pointers(std::deque<KvCache<Storage>>& caches) {
  std::vector<KvCache<Storage>*> pointers;
  for (KvCache<Storage>& cache : caches) pointers.push_back(&cache);
  return pointers;
}

/// `steps` tokens of each sequence, together and alone.
template <typename Storage, typename Layer, typename Mask>
void check_batch_steps(const Layer& layer, Index count, const Mask& mask, support::AnyExecutor executor) {
  using Scalar = typename Layer::Scalar;
  INFO(count << " sequences, " << executor.concurrency() << " workers");
  auto rng = make_rng(2);
  auto caches = batch_caches<Storage>(layer, count), alone = caches;
  const auto batch = batch_pointers(caches);
  Workspace workspace;
  for (int step = 0; step < 4; ++step) {
    const Matrix<Scalar> x = random_matrix<Scalar>(count, kBatchWidth, rng);
    Matrix<Scalar> y(count, kBatchWidth), expected = y;
    layer.forward_into(y, x, batch, mask, workspace, executor);
    for (Index i = 0; i < count; ++i) {
      // As many equal rows as there are sequences, behind one cache each: products round them as they do the batch.
      auto& cache = alone[static_cast<std::size_t>(i)];
      std::deque<KvCache<Storage>> forks(static_cast<std::size_t>(count), cache);
      expected.row(i) = layer.forward(x.row(i).replicate(count, 1), batch_pointers(forks), mask).row(i);
      const Matrix<Scalar> single = layer.forward(x.row(i), cache, mask);
      if (count <= 4) {
        CHECK(identical(Matrix<Scalar>(y.row(i)), single));
      } else {
        CHECK(y.row(i).isApprox(single, 1000 * std::numeric_limits<Scalar>::epsilon()));
      }
      CHECK(batch[static_cast<std::size_t>(i)]->position() == cache.position());
    }
    CHECK(identical(y, expected));
  }
}

template <typename Storage, typename Layer>
void check_batches(const Layer& layer) {
  Serial serial;
  ThreadPool one(1), two(2), three(3);
  support::Backwards backwards;
  for (const Index count : {1, 3, 4, 9}) {
    check_batch_steps<Storage>(layer, count, CausalMask{}, support::AnyExecutor(serial));
    check_batch_steps<Storage>(layer, count, CausalMask{}, support::AnyExecutor(three));
  }
  check_batch_steps<Storage>(layer, 4, CausalMask{}, support::AnyExecutor(one));
  check_batch_steps<Storage>(layer, 4, CausalMask{}, support::AnyExecutor(two));
  check_batch_steps<Storage>(layer, 9, CausalMask{}, support::AnyExecutor(backwards));
  check_batch_steps<Storage>(layer, 4, PrefixMask{3}, support::AnyExecutor(two));
  check_batch_steps<Storage>(layer, 4, SlidingWindowMask{30}, support::AnyExecutor(two));
  check_batch_steps<Storage>(layer, 8, with_bias(CausalMask{}, AlibiBias{alibi_slopes(4)}), support::AnyExecutor(two));
}

struct BatchGaveUp : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Throws at the run with this number.
struct BatchFailingExecutor {
  Index fails_at;
  Index runs = 0;

  static Index concurrency() { return 1; }
  template <typename Task>
  void run(Index count, Task&& task) {
    if (runs++ == fails_at) throw BatchGaveUp("gave up");
    Serial::run(count, task);
  }
};

}  // namespace

TEMPLATE_TEST_CASE("Many sequences at once give what each gives alone", "[layers][batch]", MultiheadAttention<float>,
                   MultiheadDiffAttention<float>, MultiheadDiffAttentionV2<float>, MultiheadDiffAttention<double>) {
  const auto layer = batch_layer<TestType>();
  check_batches<typename TestType::Scalar>(layer);
  Serial serial;
  check_batch_steps<Eigen::bfloat16>(layer, 9, CausalMask{}, support::AnyExecutor(serial));
  check_batch_steps<Eigen::half>(layer, 4, SlidingWindowMask{30}, support::AnyExecutor(serial));
}

TEST_CASE("A batch of caches is any range of pointers to them; an empty one is no error", "[layers][batch]") {
  const auto layer = batch_layer<MultiheadDiffAttention<float>>();
  auto rng = make_rng();
  KvCache<float> a, b, c, d;
  const Matrix<float> x = random_matrix<float>(2, kBatchWidth, rng);
  std::vector<KvCache<float>*> vector = {&a, &b};
  const std::array<KvCache<float>*, 2> array = {&c, &d};
  const Matrix<float> y = layer.forward(x, vector);
  CHECK(identical(layer.forward(x, array), y));
  CHECK(identical(layer.forward(x, std::span<KvCache<float>* const>(vector)), layer.forward(x, std::span(array))));
  CHECK(a.position() == 2);
  CHECK(d.position() == 2);

  const std::vector<KvCache<float>*> none;
  CHECK(layer.forward(Matrix<float>(0, kBatchWidth), none).rows() == 0);
  CHECK(layer.forward(Matrix<float>(0, kBatchWidth), none, CausalMask{}).cols() == kBatchWidth);

  // Strides and storage orders as everywhere.
  Matrix<float> wide = Matrix<float>::Zero(2, 2 * kBatchWidth);
  const Eigen::MatrixXf column_major = x;
  Workspace workspace;
  KvCache<float> e, f;
  const std::array<KvCache<float>*, 2> fresh = {&e, &f};
  layer.forward_into(wide.rightCols(kBatchWidth), column_major, fresh, workspace);
  CHECK(identical(Matrix<float>(wide.rightCols(kBatchWidth)), y));
  CHECK(wide.leftCols(kBatchWidth).isZero(0));
}

TEST_CASE("A batch refuses what does not fit in the name of the sequence, and changes no cache", "[layers][batch]") {
  const auto layer = batch_layer<MultiheadDiffAttention<float>>();
  const MultiheadDiffAttention<float> other({.embed_dim = kBatchWidth, .num_heads = 2, .head_dim = 6});
  auto rng = make_rng();
  KvCache<float> a, b, full(KvCacheOptions{.max_tokens = 3}), of_other;
  const Matrix<float> start = random_matrix<float>(3, kBatchWidth, rng);
  for (KvCache<float>* cache : {&a, &b, &full}) layer.forward(start, *cache);
  other.forward(start, of_other);
  const auto refusal = [&](const std::vector<KvCache<float>*>& caches, Index rows, const auto& mask) {
    std::string message;
    try {
      layer.forward(random_matrix<float>(rows, kBatchWidth, rng), caches, mask);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    for (const KvCache<float>* cache : {&a, &b, &full, &of_other}) CHECK(cache->position() == 3);
    return message;
  };
  const CausalMask causal;
  CHECK(refusal({&a, &b, &full}, 3, causal) ==
        "MultiheadDiffAttention: sequence 2: the cache holds at most 3 tokens and has 3, cannot append 1");
  CHECK(
      refusal({&a, &of_other}, 2, causal)
          .find("MultiheadDiffAttention: sequence 1: the cache must hold 2 heads of 2 x 6 key and 12 value columns") ==
      0);
  CHECK(refusal({&a, &b, &full, &b}, 4, causal) ==
        "MultiheadDiffAttention: sequence 3: its cache is that of sequence 1 too; did you mean a fork() of it?");
  CHECK(refusal({&a, nullptr}, 2, causal) == "MultiheadDiffAttention: sequence 1: its cache is a null pointer");
  CHECK(refusal({&a, &b}, 3, causal) ==
        "MultiheadDiffAttention: there must be a cache for each of the 3 rows of x, got 2");
  CHECK(refusal({}, 1, causal) == "MultiheadDiffAttention: there must be a cache for each of the 1 rows of x, got 0");
  CHECK(refusal({&a, &b}, 2, SlidingWindowMask{-1}) ==
        "MultiheadDiffAttention: sequence 0: the window of SlidingWindowMask must be 0 or more, got -1");
  const std::vector<KvCache<float>*> both = {&a, &b};
  CHECK(thrown_by<ShapeError>([&] { layer.forward(Matrix<float>::Ones(2, 7), both); }) ==
        "MultiheadDiffAttention: x must be 2 x 24, got 2 x 7");
  Matrix<float> y(3, kBatchWidth);
  Workspace workspace;
  CHECK_THROWS_AS(layer.forward_into(y, start.topRows(2), both, workspace), ShapeError);
  CHECK_NOTHROW(layer.forward(start.topRows(2), both));
  CHECK(b.position() == 4);
}

TEST_CASE("A batch leaves all its caches as they were, whatever is thrown", "[layers][batch]") {
  const auto layer = batch_layer<MultiheadDiffAttention<float>>();
  auto rng = make_rng(3);
  const Matrix<float> x = random_matrix<float>(5, kBatchWidth, rng);
  auto reference = batch_caches<float>(layer, 5);
  const auto before = reference;
  const Matrix<float> expected = layer.forward(x, batch_pointers(reference));
  const auto check = [&](std::deque<KvCache<float>>& caches) {
    for (std::size_t i = 0; i < caches.size(); ++i) CHECK(caches[i].position() == before[i].position());
    auto forks = caches;
    CHECK(identical(layer.forward(x, batch_pointers(forks)), expected));
  };

  for (Index fails_at = 0;; ++fails_at) {
    INFO("run " << fails_at);
    auto caches = before;
    Matrix<float> y(5, kBatchWidth);
    Workspace workspace;
    BatchFailingExecutor executor{fails_at};
    try {
      layer.forward_into(y, x, batch_pointers(caches), workspace, executor);
    } catch (const BatchGaveUp&) {
      check(caches);
      continue;
    }
    CHECK(fails_at > 5);
    break;
  }

  for (const auto failures : {support::Failures::one, support::Failures::all_later}) {
    auto caches = before;
    const auto batch = batch_pointers(caches);
    Matrix<float> y(5, kBatchWidth);
    const std::size_t failed = support::for_every_failing_allocation([&] { y = layer.forward(x, batch); },
                                                                     [&](bool threw) {
                                                                       CHECK(threw);
                                                                       check(caches);
                                                                     },
                                                                     failures);
    CHECK((failed > 0) == support::fails_allocations());
    if (failed > 0) CHECK(identical(y, expected));
  }
}

TEST_CASE("A batch takes nothing from the heap after a first call", "[layers][batch]") {
  const auto layer = batch_layer<MultiheadDiffAttention<float>>();
  auto rng = make_rng();
  ThreadPool pool(2);
  const Matrix<float> x = random_matrix<float>(6, kBatchWidth, rng);
  for (const bool windowed : {false, true}) {
    std::deque<KvCache<float>> caches;
    for (Index i = 0; i < 6; ++i) {
      caches.emplace_back(windowed ? KvCacheOptions{.window = 30 + i} : KvCacheOptions{.reserve = 1300});
    }
    const auto batch = batch_pointers(caches);
    Matrix<float> y(6, kBatchWidth);
    Workspace workspace;
    const auto decode = [&](Index steps) {
      for (Index i = 0; i < steps; ++i) layer.forward_into(y, x, batch, workspace, pool);
    };
    decode(1200);
    if (!windowed) {
      for (auto& cache : caches) cache.truncate(100);
    }
    const std::size_t before = support::allocations();
    decode(600);
    CHECK(support::allocations() == before);
  }
}
