// Bitwise the same result from any executor and any number of threads, and a workspace that stops growing.

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/kernels/decode.hpp"
#include "kernels/backward.hpp"
#include "kernels/operands.hpp"
#include "kernels/pages.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/scalars.hpp"
#include "support/tolerances.hpp"
#ifdef _OPENMP
#include "diffattn/core/parallel_openmp.hpp"
#endif

using namespace support;
using diffattn::Workspace;

namespace {

/// Calls f(name, executor) for executors of every kind.
template <typename F>
void for_each_executor(const F& f) {
  for (Index threads = 1; threads <= 4; ++threads) {
    diffattn::ThreadPool pool(threads);
    f("a pool of " + std::to_string(threads), AnyExecutor(pool));
  }
#ifdef _OPENMP
  for (const int threads : {1, 3}) {
    diffattn::OpenMP openmp{threads};
    f("OpenMP with " + std::to_string(threads), AnyExecutor(openmp));
  }
#endif
  for (const Index workers : {1, 3, 40}) {
    Backwards backwards{workers};
    f("backwards, " + std::to_string(workers) + " workers", AnyExecutor(backwards));
  }
}

template <typename Scalar, typename Kernel>
void check_executors(const Kernel& kernel) {
  for (const Shape& shape : {Shape{1, 1500, 8, 16}, Shape{3, 600, 5, 7}, Shape{150, 170, 9, 21}, Shape{300, 40, 4, 3},
                             Shape{12, 15, 70, 20}, Shape{0, 4, 2, 2}, Shape{6, 0, 2, 2}}) {
    Rng rng = make_rng();
    const auto x = random_operands<Scalar>(shape, rng);
    const Matrix<Scalar> serial = kernel(x, CausalMask{});
    for_each_executor([&](const std::string& name, AnyExecutor executor) {
      INFO(describe(shape) << ", " << name);
      Workspace workspace;
      Matrix<Scalar> out(shape.n_q, shape.dv);
      kernel.into(out, x, CausalMask{}, workspace, executor);
      CHECK(identical(out, serial));
      kernel.into(out, x, CausalMask{}, workspace, executor);
      CHECK(identical(out, serial));
    });
  }
}

/// The second of two equal calls finds all it needs, and so does a smaller one.
template <typename Kernel>
void check_workspace(const Kernel& kernel) {
  diffattn::ThreadPool pool(3);
  AnyExecutor threads(pool);
  diffattn::Serial one;
  AnyExecutor serial(one);
  for (AnyExecutor* executor : {&serial, &threads}) {
    for (const Shape& shape : {Shape{1, 900, 8, 16}, Shape{100, 300, 9, 21}}) {
      INFO(describe(shape));
      Rng rng = make_rng();
      const auto x = random_operands<float>(shape, rng);
      const auto small = random_operands<float>({shape.n_q, shape.n_k / 2, 5, 6}, rng);
      Workspace workspace;
      Matrix<float> out(shape.n_q, shape.dv), small_out(shape.n_q, 6);
      kernel.into(out, x, CausalMask{}, workspace, *executor);
      const Matrix<float> first = out;
      kernel.into(out, x, CausalMask{}, workspace, *executor);
      const std::size_t capacity = workspace.capacity();
      CHECK(capacity > 0);
      for (int i = 0; i < 3; ++i) {
        kernel.into(small_out, small, CausalMask{}, workspace, *executor);
        CHECK(identical(small_out, kernel(small, CausalMask{})));
        kernel.into(out, x, CausalMask{}, workspace, *executor);
        CHECK(identical(out, first));
      }
      CHECK(workspace.capacity() == capacity);
    }
  }
}

}  // namespace

TEMPLATE_TEST_CASE("attention is the same from every executor", "", DIFFATTN_TEST_SCALARS) {
  check_executors<TestType>(Attention{});
}

TEMPLATE_TEST_CASE("diff_attention is the same from every executor", "", DIFFATTN_TEST_SCALARS) {
  check_executors<TestType>(DiffAttentionPerRow{});
}

TEST_CASE("A workspace serves calls of its size for ever") {
  check_workspace(Attention{});
  check_workspace(DiffAttention{});
}

TEST_CASE("diff_attention holds a panel and packed operands, and no map") {
  const Index n = 3000;
  Rng rng = make_rng();
  const auto x = random_operands<float>({n, n, 4, 4}, rng);
  Workspace workspace;
  Matrix<float> out(n, 4);
  DiffAttention{}.into(out, x, CausalMask{}, workspace);
  CHECK(workspace.capacity() < sizeof(float) * static_cast<std::size_t>(n) * 200);  // a map has n·n
}

TEST_CASE("A thousand times the same bits of every kernel, on 1, 2, 3, 4 and 8 threads", "[kernels][.]") {
  Rng rng = make_rng();
  // Few rows against many keys, a small problem, row blocks with a rest, and row blocks in several pieces of keys.
  struct Case {
    Operands<float> x;
    Matrix<float> dout, standard, differential;
    Gradients<float> standard_gradients, differential_gradients;
  };
  std::vector<Case> cases;
  for (const Shape& shape :
       {Shape{1, 1500, 8, 16}, Shape{12, 15, 20, 20}, Shape{150, 170, 9, 21}, Shape{60, 600, 5, 7}}) {
    Case one{random_operands<float>(shape, rng), random_matrix<float>(shape.n_q, shape.dv, rng), {}, {}, {}, {}};
    one.standard = Attention{}(one.x, CausalMask{});
    one.differential = DiffAttentionPerRow{}(one.x, CausalMask{});
    one.standard_gradients = AttentionBackward{}(one.x, one.dout, CausalMask{});
    one.differential_gradients = DiffAttentionBackward{}(one.x, one.dout, CausalMask{});
    cases.push_back(std::move(one));
  }
  // Two heads behind a cache, of one row and of enough for row blocks.
  const auto k = random_matrix<float>(700, 2 * 2 * 8, rng), v = random_matrix<float>(700, 2 * 16, rng);
  const Pages<float> pages(k, v, 2, 2, rng);
  const auto decode = [&](const Matrix<float>& q, Matrix<float>& out, Workspace& workspace, AnyExecutor& executor) {
    diffattn::decode_diff_attention_into(out, q, pages.packed, 0.4f, diffattn::Heads{2, 2}, CausalMask{}, {}, workspace,
                                         executor);
  };
  const Matrix<float> one_row = random_matrix<float>(1, 2 * 2 * 8, rng),
                      rows = random_matrix<float>(70, 2 * 2 * 8, rng);
  Matrix<float> one_decoded(1, 32), rows_decoded(70, 32), decoded;
  {
    diffattn::Serial serial;
    AnyExecutor executor(serial);
    Workspace workspace;
    decode(one_row, one_decoded, workspace, executor);
    decode(rows, rows_decoded, workspace, executor);
  }
  for (const Index threads : {1, 2, 3, 4, 8}) {
    diffattn::ThreadPool pool(threads);
    AnyExecutor executor(pool);
    Workspace workspace;
    for (int round = 0; round < 1000; ++round) {
      INFO(threads << " threads, round " << round);
      for (const Case& one : cases) {
        Matrix<float> out(one.x.n_q(), one.x.v.cols());
        Attention{}.into(out, one.x, CausalMask{}, workspace, executor);
        REQUIRE(identical(out, one.standard));
        DiffAttentionPerRow{}.into(out, one.x, CausalMask{}, workspace, executor);
        REQUIRE(identical(out, one.differential));
        const auto standard = AttentionBackward{}(one.x, one.dout, CausalMask{}, {}, executor);
        const auto differential = DiffAttentionBackward{}(one.x, one.dout, CausalMask{}, {}, executor);
        for (std::size_t i = 0; i < standard.size(); ++i) {
          REQUIRE(identical(standard[i], one.standard_gradients[i]));
          REQUIRE(identical(differential[i], one.differential_gradients[i]));
        }
      }
      decoded.resize(1, 32);
      decode(one_row, decoded, workspace, executor);
      REQUIRE(identical(decoded, one_decoded));
      decoded.resize(70, 32);
      decode(rows, decoded, workspace, executor);
      REQUIRE(identical(decoded, rows_decoded));
    }
  }
}
