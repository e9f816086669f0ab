// Learned biases: what they add to scores, and the gradient of their table, by differences.

#include "diffattn/kernels/learned_bias.hpp"

#include <limits>
#include <string>
#include <utility>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "diffattn/kernels/mask.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/learned_mask.hpp"
#include "support/numerical_gradient.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

using diffattn::AlibiBias;
using diffattn::CausalMask;
using diffattn::FullMask;
using diffattn::Heads;
using diffattn::Index;
using diffattn::IndexedBias;
using diffattn::Matrix;
using diffattn::MatrixBias;
using diffattn::PaddingMask;
using diffattn::RelativeBias;
using diffattn::ShapeError;
using diffattn::SlidingWindowMask;
using support::excess;
using support::identical;
using support::LearnedMask;
using support::numerical_gradient;
using support::random_matrix;
using support::thrown_by;

/// Operands of several heads, G of keys and values, both kernels'.
template <typename Scalar>
struct LearnedOperands {
  LearnedOperands(Index n_q, Index n_k, Heads h, support::Rng& rng)
      : heads(h),
        q(random_matrix<Scalar>(n_q, 2 * h.num_heads * 5, rng)),
        k(random_matrix<Scalar>(n_k, 2 * h.num_kv_heads * 5, rng)),
        v(random_matrix<Scalar>(n_k, h.num_kv_heads * 7, rng)),
        dout(random_matrix<Scalar>(n_q, h.num_heads * 7, rng)),
        lambda(random_matrix<Scalar>(n_q, h.num_heads, rng)) {}

  template <typename Mask>
  Matrix<Scalar> differential(const Mask& mask) const {
    return diffattn::multihead_diff_attention(q, k, v, lambda, heads, mask);
  }
  template <typename Mask>
  Matrix<Scalar> standard(const Mask& mask) const {
    return diffattn::multihead_attention(q.leftCols(q.cols() / 2), k.leftCols(k.cols() / 2), v, heads, mask);
  }
  template <typename Mask>
  auto differential_gradients(const Mask& mask) const {
    return diffattn::multihead_diff_attention_backward(q, k, v, lambda, dout, heads, mask);
  }
  template <typename Mask>
  auto standard_gradients(const Mask& mask) const {
    return diffattn::multihead_attention_backward(q.leftCols(q.cols() / 2), k.leftCols(k.cols() / 2), v, dout, heads,
                                                  mask);
  }

  Heads heads;
  Matrix<Scalar> q, k, v, dout, lambda;
};

/// dbias of both kernels by differences; the other gradients are those under the same biases as a matrix.
void check_learned(Index n_q, Index n_k, Heads heads, Matrix<double>& table, const LearnedMask& mask,
                   support::Rng& rng) {
  INFO("n_q " << n_q << ", n_k " << n_k << ", heads " << heads.num_heads << " of " << heads.num_kv_heads);
  const LearnedOperands<double> x(n_q, n_k, heads, rng);
  const auto gradients = x.differential_gradients(mask);
  const auto of_difference = [&] { return x.differential(mask).cwiseProduct(x.dout).sum(); };
  CHECK(excess(gradients.dbias, numerical_gradient(table, of_difference)) <= 0);
  const auto of_standard = [&] { return x.standard(mask).cwiseProduct(x.dout).sum(); };
  CHECK(excess(x.standard_gradients(mask).dbias, numerical_gradient(table, of_standard)) <= 0);

  Matrix<double> dense(heads.num_heads * n_q, n_k);
  for (Index head = 0; head < heads.num_heads; ++head) {
    for (Index i = 0; i < n_q; ++i) {
      const auto [begin, end] = mask.visible_keys(i, n_q, n_k);
      for (Index j = 0; j < n_k; ++j) {
        const bool seen = j >= begin && j < end;
        dense(head * n_q + i, j) = seen ? mask.bias(head, i, j, n_q, n_k) : -std::numeric_limits<double>::infinity();
      }
    }
  }
  const auto as_matrix = with_bias(FullMask{}, MatrixBias(dense));
  CHECK(x.differential(mask).isApprox(x.differential(as_matrix), 1e-13));
  const auto expected = x.differential_gradients(as_matrix);
  CHECK(gradients.dq.isApprox(expected.dq, 1e-11));
  CHECK(gradients.dk.isApprox(expected.dk, 1e-11));
  CHECK(gradients.dv.isApprox(expected.dv, 1e-11));
  CHECK(gradients.dlambda.isApprox(expected.dlambda, 1e-11));
}

}  // namespace

TEST_CASE("A relative bias reads the column of key − query, clamped to its reach", "[kernels][learned_bias]") {
  Matrix<float> table(2, 5);
  table << 1, 2, 3, 4, 5, 10, 20, 30, 40, 50;
  const RelativeBias bias(table);
  CHECK(bias.reach() == 2);
  CHECK(bias(0, 4, 4, 9, 9) == 3);
  CHECK(bias(1, 4, 5, 9, 9) == 40);
  CHECK(bias(0, 4, 3, 9, 9) == 2);
  CHECK(bias(0, 4, 2, 9, 9) == 1);
  CHECK(bias(0, 8, 0, 9, 9) == 1);
  CHECK(bias(1, 0, 8, 9, 9) == 50);
  CHECK(bias(0, 0, 7, 1, 9) == 2);  // the only query stands at position 8
  CHECK(bias(0, 3, 0, 5, 2) == 3);  // and here query 3 at 0
}

TEST_CASE("An indexed bias reads the column that it is told", "[kernels][learned_bias]") {
  Matrix<double> table(2, 3);
  table << 1, 2, 3, 4, 5, 6;
  const IndexedBias bias(table, [](Index query, Index key, Index, Index) { return (query + key) % 3; });
  CHECK(bias(0, 1, 1, 4, 4) == 3);
  CHECK(bias(1, 3, 0, 4, 4) == 4);
}

TEST_CASE("The gradient of a learned bias, by differences", "[kernels][learned_bias]") {
  auto rng = support::make_rng();
  for (const auto& [n_q, n_k] : {std::pair<Index, Index>{4, 4}, {3, 11}, {9, 2}, {1, 300}, {20, 270}, {110, 40}}) {
    for (const Heads heads : {Heads{1, 1}, Heads{4, 2}}) {
      Matrix<double> table = random_matrix<double>(heads.num_heads, 7, rng);
      check_learned(n_q, n_k, heads, table, with_bias(FullMask{}, RelativeBias(table)), rng);
      check_learned(n_q, n_k, heads, table, with_bias(CausalMask{}, RelativeBias(table)), rng);
    }
    Matrix<double> table = random_matrix<double>(2, 5, rng);
    const auto column = [](Index query, Index key, Index, Index) { return (7 * query + 3 * key) % 5; };
    check_learned(n_q, n_k, {2, 1}, table, with_bias(CausalMask{}, IndexedBias(table, column)), rng);
  }
}

TEST_CASE("A learned bias nests with fixed ones, masks and padding; only it has a gradient",
          "[kernels][learned_bias]") {
  auto rng = support::make_rng();
  Matrix<double> table = random_matrix<double>(2, 9, rng);
  const auto check = [&](const LearnedMask& mask) { check_learned(13, 40, {2, 2}, table, mask, rng); };
  check(with_bias(with_bias(CausalMask{}, RelativeBias(table)), AlibiBias{0.1}));
  check(with_bias(with_bias(CausalMask{}, AlibiBias{0.1}), RelativeBias(table)));
  check(both(with_bias(FullMask{}, RelativeBias(table)), PaddingMask{33}));
  check(both(with_bias(FullMask{}, AlibiBias{0.2}), with_bias(CausalMask{}, RelativeBias(table))));
  check(with_bias(both(SlidingWindowMask{6}, PaddingMask{30}), RelativeBias(table)));
}

TEST_CASE("An entry of −inf masks, has no gradient and lets nothing through", "[kernels][learned_bias]") {
  auto rng = support::make_rng();
  constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();
  LearnedOperands<double> x(6, 9, {2, 2}, rng);
  Matrix<double> table = random_matrix<double>(2, 5, rng);
  table.col(0).setConstant(-kInfinity);  // all that is two keys or more behind the query
  const LearnedMask mask = with_bias(CausalMask{}, RelativeBias(table));
  const Matrix<double> expected = x.differential_gradients(mask).dbias;
  CHECK(expected.allFinite());
  CHECK(expected.col(0).isZero(0));
  CHECK_FALSE(expected.isZero());
  // Keys 0 and 1 are hidden from all: query 0 stands at 3.
  x.k.topRows(2).setConstant(kNaN);
  x.v.topRows(2).setConstant(kInfinity);
  CHECK(x.differential_gradients(mask).dbias.isApprox(expected, 1e-12));
  CHECK(x.standard_gradients(mask).dbias.allFinite());
  // A query that sees nothing has no gradient.
  table.setConstant(-kInfinity);
  CHECK(x.differential_gradients(mask).dbias.isZero(0));
}

TEST_CASE("dbias is 0 where there is no pair", "[kernels][learned_bias]") {
  auto rng = support::make_rng();
  const Matrix<double> table = random_matrix<double>(2, 5, rng);
  for (const auto& [n_q, n_k] : {std::pair<Index, Index>{0, 4}, {4, 0}, {0, 0}}) {
    const LearnedOperands<double> x(n_q, n_k, {2, 1}, rng);
    const Matrix<double> dbias =
        x.differential_gradients(LearnedMask(with_bias(FullMask{}, RelativeBias(table)))).dbias;
    CHECK(dbias.rows() == 2);
    CHECK(dbias.cols() == 5);
    CHECK(dbias.isZero(0));
  }
}

TEST_CASE("One head by itself, λ a number, and what is not asked for", "[kernels][learned_bias]") {
  auto rng = support::make_rng();
  const Matrix<double> q1 = random_matrix<double>(30, 6, rng), q2 = random_matrix<double>(30, 6, rng);
  const Matrix<double> k1 = random_matrix<double>(30, 6, rng), k2 = random_matrix<double>(30, 6, rng);
  const Matrix<double> v = random_matrix<double>(30, 4, rng), dout = random_matrix<double>(30, 4, rng);
  Matrix<double> table = random_matrix<double>(1, 21, rng);
  const LearnedMask mask = with_bias(CausalMask{}, RelativeBias(table));
  const auto gradients = diffattn::diff_attention_backward(q1, k1, q2, k2, v, 0.6, dout, mask);
  const auto of_difference = [&] {
    return diffattn::diff_attention(q1, k1, q2, k2, v, 0.6, mask).cwiseProduct(dout).sum();
  };
  CHECK(excess(gradients.dbias, numerical_gradient(table, of_difference)) <= 0);
  const auto [dq, dk, dv, dbias] = diffattn::attention_backward(q1, k1, v, dout, mask);
  const auto of_standard = [&] { return diffattn::attention(q1, k1, v, mask).cwiseProduct(dout).sum(); };
  CHECK(excess(dbias, numerical_gradient(table, of_standard)) <= 0);

  // The same of the others without dbias.
  diffattn::AttentionGradients<double> without;
  attention_backward_into(without, q1, k1, v, dout, mask);
  CHECK(identical(without.dq, dq));
  CHECK(identical(without.dk, dk));
  CHECK(identical(without.dv, dv));
  // And into matrices of one's own.
  Matrix<double> to_q(30, 6), to_k(30, 6), to_v(30, 4), frame = Matrix<double>::Constant(3, 25, 7);
  diffattn::Workspace workspace;
  diffattn::multihead_attention_backward_into({to_q, to_k, to_v, frame.block(1, 2, 1, 21)}, q1, k1, v, dout, Heads{1},
                                              mask, {}, workspace);
  CHECK(identical(to_q, dq));
  CHECK(identical(frame.block(1, 2, 1, 21), dbias));
  frame.block(1, 2, 1, 21).setConstant(7);
  CHECK((frame.array() == 7).all());
}

TEST_CASE("dbias in float, and of a table of another scalar", "[kernels][learned_bias]") {
  auto rng = support::make_rng();
  const LearnedOperands<double> x(200, 300, {2, 1}, rng);
  LearnedOperands<float> in_float(0, 0, {2, 1}, rng);
  in_float.q = x.q.cast<float>();
  in_float.k = x.k.cast<float>();
  in_float.v = x.v.cast<float>();
  in_float.dout = x.dout.cast<float>();
  in_float.lambda = x.lambda.cast<float>();
  const Matrix<float> table = random_matrix<float>(2, 31, rng);
  const Matrix<double> same = table.cast<double>();
  const Matrix<double> exact = x.differential_gradients(LearnedMask(with_bias(CausalMask{}, RelativeBias(same)))).dbias;
  const Matrix<float> dbias =
      in_float.differential_gradients(LearnedMask(with_bias(CausalMask{}, RelativeBias(table)))).dbias;
  CHECK((dbias.cast<double>() - exact).norm() < 2e-6 * exact.norm());
  CHECK(identical(in_float.differential_gradients(LearnedMask(with_bias(CausalMask{}, RelativeBias(same)))).dbias,
                  dbias));
  CHECK(identical(x.differential_gradients(LearnedMask(with_bias(CausalMask{}, RelativeBias(table)))).dbias, exact));
}

TEST_CASE("dbias is the same from any number of threads", "[kernels][learned_bias]") {
  auto rng = support::make_rng();
  const LearnedOperands<float> x(900, 500, {4, 1}, rng);  // several parts for the key head
  const Matrix<float> table = random_matrix<float>(4, 41, rng);
  const LearnedMask mask = with_bias(CausalMask{}, RelativeBias(table));
  const auto expected = x.differential_gradients(mask);
  const auto check = [&](auto& executor) {
    diffattn::MultiheadDiffAttentionGradients<float, Matrix<float>, true> got;
    diffattn::Workspace workspace;
    for (int round = 0; round < 2; ++round) {
      multihead_diff_attention_backward_into(got, x.q, x.k, x.v, x.lambda, x.dout, x.heads, mask, {}, workspace,
                                             executor);
      CHECK(identical(got.dbias, expected.dbias));
      CHECK(identical(got.dk, expected.dk));
    }
  };
  for (const Index threads : {2, 3}) {
    diffattn::ThreadPool pool(threads);
    support::AnyExecutor executor(pool);
    check(executor);
  }
  support::Backwards backwards{5};
  support::AnyExecutor executor(backwards);
  check(executor);
}

TEST_CASE("What a learned bias refuses", "[kernels][learned_bias]") {
  auto rng = support::make_rng();
  const LearnedOperands<double> x(6, 6, {2, 1}, rng);
  const Matrix<double> three = Matrix<double>::Zero(3, 5), even = Matrix<double>::Zero(2, 4);
  const Matrix<double> turned = Matrix<double>::Zero(5, 2), good = Matrix<double>::Zero(2, 5);
  const auto column = [](Index query, Index key, Index, Index) { return query == 4 && key == 2 ? 5 : 0; };
  const auto of = [&](const LearnedMask& mask) { return thrown_by<ShapeError>([&] { x.differential(mask); }); };
  CHECK(of(with_bias(FullMask{}, RelativeBias(three))) ==
        "multihead_diff_attention: the table of RelativeBias must have 2 rows, one for every head, got 3 x 5");
  CHECK(of(with_bias(FullMask{}, IndexedBias(turned, column))) ==
        "multihead_diff_attention: the table of IndexedBias must have 2 rows, one for every head, got 5 x 2; did you "
        "mean table.transpose()?");
  CHECK(thrown_by<ShapeError>([&] { RelativeBias bias(even); }) ==
        "RelativeBias: the table must have 2·reach + 1 columns, an odd number, got 2 x 4");
  CHECK(of(with_bias(FullMask{}, IndexedBias(good, column))) ==
        "IndexedBias: query 4 and key 2 were to read column 5 of a table that has 5");
  const auto behind = [](Index query, Index key, Index, Index) { return key - query; };
  of(with_bias(FullMask{}, IndexedBias(good, behind)));

  Matrix<double> dq(6, 10), dk(6, 5), dv(6, 7), dbias(2, 4);
  diffattn::Workspace workspace;
  const auto backward = [&](const auto& mask) {
    diffattn::multihead_attention_backward_into({dq, dk, dv, dbias}, x.q.leftCols(10), x.k.leftCols(5), x.v, x.dout,
                                                x.heads, mask, {}, workspace);
  };
  CHECK(thrown_by<ShapeError>([&] { backward(LearnedMask(with_bias(FullMask{}, RelativeBias(good)))); }) ==
        "multihead_attention_backward: dbias must be 2 x 5, got 2 x 4");
  CHECK(thrown_by<std::invalid_argument>([&] { backward(CausalMask{}); }) ==
        "multihead_attention_backward: dbias is the gradient of a learned bias, and the mask has none");
}
