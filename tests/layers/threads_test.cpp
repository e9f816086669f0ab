// Layers and caches on many threads: what is thrown on any of them reaches the caller, one layer serves all, forks
// share pages, and the bits are always the same. Run under ThreadSanitizer, too (preset thread-sanitize).

#include <atomic>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <stdexcept>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/parameters_of.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

using namespace diffattn;
using support::identical;
using support::random_matrix;
using Layer = MultiheadDiffAttention<float>;

const Layer& layer() {
  static const Layer instance(
      {.embed_dim = 32, .num_heads = 2, .num_kv_heads = 1, .rotary = RotaryConfig{.table_positions = 64}, .seed = 7});
  return instance;
}

/// A bias that somebody has written, which gives up at one query; that of another row if `query` is none.
struct FailingBias {
  Index fails_at = -1;

  double operator()(Index /*head*/, Index query, Index key, Index /*n_q*/, Index /*n_k*/) const {
    if (query == fails_at) throw std::runtime_error("no bias for query " + std::to_string(query));
    return 0.01 * static_cast<double>(key % 7);
  }
};

/// A mask whose copies fail from the given one on.
struct FailingCopy {
  explicit FailingCopy(int number) : left(number) {}
  FailingCopy(const FailingCopy& other) : left(other.left - 1), memory(other.memory) {
    if (left < 0) throw std::runtime_error("no copy");
  }
  FailingCopy& operator=(const FailingCopy& other) {
    const FailingCopy copy(other);
    left = copy.left;
    memory = copy.memory;
    return *this;
  }
  KeyRange visible_keys(Index query, Index n_q, Index n_k) const { return CausalMask{}.visible_keys(query, n_q, n_k); }

  int left;
  std::vector<double> memory = std::vector<double>(100);
};

/// An executor of somebody's that fails in the given run.
struct FailingExecutor {
  int runs = 0;

  static Index concurrency() { return 2; }
  template <typename Task>
  void run(Index count, Task&& task) {
    if (runs-- == 0) throw std::runtime_error("executor");
    Serial::run(count, task);
  }
};

/// Runs f(i) on `count` threads at once.
template <typename F>
void on_threads(int count, const F& f) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back([&f, i] { f(i); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

TEST_CASE("What a bias throws on any thread reaches the caller, and everything goes on", "[layers]") {
  auto rng = support::make_rng();
  const Matrix<float> x = random_matrix<float>(300, 32, rng), dy = random_matrix<float>(300, 32, rng);
  const auto good = with_bias(CausalMask{}, FailingBias{});
  Layer::Tape tape;
  const Matrix<float> expected = layer().forward(x, good, tape);
  Layer grad = zeros_like(layer());
  const Matrix<float> dx = layer().backward(dy, tape, grad);
  for (const Index threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    support::AnyExecutor executor(pool);
    Workspace workspace;
    Matrix<float> y(300, 32), dx_again(300, 32);
    for (const Index at : {0, 150, 299}) {
      const auto bad = with_bias(CausalMask{}, FailingBias{at});
      const std::string message = "no bias for query " + std::to_string(at);
      CHECK(support::thrown_by<std::runtime_error>([&] { layer().forward_into(y, x, bad, workspace, executor); }) ==
            message);
      Layer::Tape other;
      CHECK(support::thrown_by<std::runtime_error>(
                [&] { layer().forward_into(y, x, bad, other, workspace, executor); }) == message);
      Layer unused = zeros_like(layer());
      CHECK_THROWS_AS(layer().backward_into(dx_again, dy, other, unused, workspace, executor), std::invalid_argument);
      CHECK(!workspace.in_use());
      layer().forward_into(y, x, good, workspace, executor);
      CHECK(identical(y, expected));
    }
    Layer again = zeros_like(layer());
    layer().backward_into(dx_again, dy, tape, again, workspace, executor);
    CHECK(identical(dx_again, dx));
    CHECK(support::parameters_of(again) == support::parameters_of(grad));
  }
}

TEST_CASE("A mask that cannot be copied leaves the tape refusing, and not broken", "[layers]") {
  auto rng = support::make_rng();
  const Matrix<float> x = random_matrix<float>(9, 32, rng);
  Layer::Tape tape;
  const Matrix<float> expected = layer().forward(x, FailingCopy(9), tape);
  CHECK_THROWS_AS(layer().forward(x, FailingCopy(0), tape), std::runtime_error);
  Layer grad = zeros_like(layer());
  CHECK_THROWS_AS(layer().backward(x, tape, grad), std::invalid_argument);
  CHECK(identical(layer().forward(x, FailingCopy(9), tape), expected));
}

TEST_CASE("A cache is as before when an executor throws, at whichever run", "[layers][kv_cache]") {
  auto rng = support::make_rng();
  const Matrix<float> x = random_matrix<float>(250, 32, rng), next = random_matrix<float>(20, 32, rng);
  KvCache<float> cache, untouched;
  layer().forward(x, cache);
  layer().forward(x, untouched);
  const Matrix<float> expected = layer().forward(next, untouched);
  Matrix<float> y(20, 32);
  Workspace workspace;
  int runs = 0;
  for (bool threw = true; threw; ++runs) {
    FailingExecutor failing{runs};
    support::AnyExecutor executor(failing);
    try {
      layer().forward_into(y, next, cache, workspace, executor);
      threw = false;
    } catch (const std::runtime_error&) {
      CHECK(cache.position() == 250);
      CHECK(!workspace.in_use());
    }
  }
  CHECK(runs > 5);
  CHECK(identical(y, expected));
}

TEST_CASE("One layer serves many threads, each with a cache of its own", "[layers][kv_cache]") {
  auto rng = support::make_rng();
  const Matrix<float> x = random_matrix<float>(60, 32, rng), whole = layer().forward(x);
  KvCache<float> one;
  const Matrix<float> prompt = layer().forward(Matrix<float>(x.topRows(50)), one);
  const Matrix<float> rest = layer().forward(Matrix<float>(x.bottomRows(10)), one);
  std::atomic<int> wrong = 0;
  on_threads(4, [&](int) {
    for (int round = 0; round < 5; ++round) {
      KvCache<float> cache;
      wrong += !identical(layer().forward(x), whole);
      wrong += !identical(layer().forward(Matrix<float>(x.topRows(50)), cache), prompt);
      wrong += !identical(layer().forward(Matrix<float>(x.bottomRows(10)), cache), rest);
    }
  });
  CHECK(wrong == 0);
}

TEST_CASE("Forks of one cache go on from different threads", "[layers][kv_cache]") {
  auto rng = support::make_rng();
  const Matrix<float> x = random_matrix<float>(300, 32, rng), tails = random_matrix<float>(40, 32, rng);
  const auto tail = [&](int i) { return Matrix<float>(tails.middleRows(i * 10, 10)); };
  std::vector<Matrix<float>> expected;
  for (int i = 0; i < 4; ++i) {
    KvCache<float> fresh;
    layer().forward(x, fresh);
    expected.push_back(layer().forward(tail(i), fresh));
  }
  for (int round = 0; round < 20; ++round) {
    std::vector<KvCache<float>> forks(4);
    layer().forward(x, forks[0]);
    for (std::size_t i = 1; i < 4; ++i) forks[i] = forks[0].fork();
    std::atomic<int> wrong = 0;
    // All share the page that each adds to; some let go of it while others still read.
    on_threads(4, [&](int i) {
      KvCache<float>& cache = forks[static_cast<std::size_t>(i)];
      wrong += !identical(layer().forward(tail(i), cache), expected[static_cast<std::size_t>(i)]);
      if (i % 2 == 0) cache = KvCache<float>();
    });
    CHECK(wrong == 0);
  }
}

TEST_CASE("A thousand times the same bits, on 1, 2, 3, 4 and 8 threads", "[layers][.]") {
  auto rng = support::make_rng();
  const Matrix<float> x = random_matrix<float>(130, 32, rng), dy = random_matrix<float>(130, 32, rng);
  const Matrix<float> token = random_matrix<float>(1, 32, rng);
  Layer::Tape tape;
  const Matrix<float> expected = layer().forward(x, CausalMask{}, tape);
  Layer grad = zeros_like(layer());
  const Matrix<float> dx = layer().backward(dy, tape, grad);
  KvCache<float> cache;
  layer().forward(x, cache);
  const Matrix<float> next = [&] {
    KvCache<float> fork = cache.fork();
    return layer().forward(token, fork);
  }();
  for (const Index threads : {1, 2, 3, 4, 8}) {
    ThreadPool pool(threads);
    support::AnyExecutor executor(pool);
    Workspace workspace;
    Matrix<float> y(130, 32), dx_again(130, 32), next_again(1, 32);
    Layer again = zeros_like(layer());
    for (int round = 0; round < 1000; ++round) {
      layer().forward_into(y, x, CausalMask{}, tape, workspace, executor);
      set_zero(again);
      layer().backward_into(dx_again, dy, tape, again, workspace, executor);
      KvCache<float> fork = cache.fork();
      layer().forward_into(next_again, token, fork, workspace, executor);
      INFO(threads << " threads, round " << round);
      REQUIRE(identical(y, expected));
      REQUIRE(identical(dx_again, dx));
      REQUIRE(support::parameters_of(again) == support::parameters_of(grad));
      REQUIRE(identical(next_again, next));
    }
  }
}
