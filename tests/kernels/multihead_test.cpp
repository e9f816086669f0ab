// Several heads in one call: what each head gives by itself, whatever the grouping, layout and executor.

#include "diffattn/core/parallel_threads.hpp"
#include "kernels/oracle.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/scalars.hpp"
#include "support/tolerances.hpp"

using namespace support;
using diffattn::Heads;
using diffattn::Workspace;

namespace {

struct Case {
  Index n_q, n_k, num_heads, num_kv_heads;
};

std::vector<Case> cases() {
  return {{1, 40, 1, 1}, {1, 700, 4, 4}, {1, 300, 4, 2}, {2, 300, 4, 2}, {3, 300, 4, 2}, {2, 33, 4, 1},   {3, 9, 6, 2},
          {7, 8, 6, 2},  {40, 40, 1, 0}, {40, 40, 3, 3}, {30, 60, 4, 2}, {60, 30, 6, 1}, {25, 300, 2, 0}, {0, 5, 2, 1}};
}

constexpr Index kD = 6, kDv = 10;

/// Bitwise where both calls take the same path; a few rows, alone or grouped, may not.
template <typename Scalar, typename Out>
void check_head(const Out& out, const Matrix<Scalar>& alone, const Expected& expected) {
  if (alone.rows() > 8) CHECK(identical(out, alone));
  CHECK(worst_error<Scalar>(out, expected.value, expected.magnitude) <= kErrorFactor);
}

template <typename Scalar, typename F>
void for_each_executor(const F& f) {
  diffattn::Serial serial;
  diffattn::ThreadPool pool(3);
  Backwards backwards;
  for (AnyExecutor executor : {AnyExecutor(serial), AnyExecutor(pool), AnyExecutor(backwards)}) f(executor);
}

}  // namespace

TEMPLATE_TEST_CASE("multihead_attention_into is attention head by head", "", DIFFATTN_TEST_SCALARS) {
  for (const Case& c : cases()) {
    INFO(c.n_q << " x " << c.n_k << ", heads " << c.num_heads << ", " << c.num_kv_heads);
    const Index kv_heads = c.num_kv_heads == 0 ? c.num_heads : c.num_kv_heads, group = c.num_heads / kv_heads;
    Rng rng = make_rng();
    const auto q = random_matrix<TestType>(c.n_q, c.num_heads * kD, rng);
    const auto k = random_matrix<TestType>(c.n_k, kv_heads * kD, rng);
    const auto v = random_matrix<TestType>(c.n_k, kv_heads * kDv, rng);
    Matrix<TestType> first;
    for_each_executor<TestType>([&](AnyExecutor& executor) {
      Workspace workspace;
      Matrix<TestType> out(c.n_q, c.num_heads * kDv);
      diffattn::multihead_attention_into(out, q, k, v, Heads{c.num_heads, c.num_kv_heads}, RangeMask{CausalMask{}}, {},
                                         workspace, executor);
      if (first.size() == 0) first = out;
      CHECK(identical(out, first));
    });
    for (Index h = 0; h < c.num_heads; ++h) {
      Operands<TestType> x;
      x.q1 = q.middleCols(h * kD, kD);
      x.k1 = k.middleCols(h / group * kD, kD);
      x.v = v.middleCols(h / group * kDv, kDv);
      check_head<TestType>(first.middleCols(h * kDv, kDv), Attention{}(x, CausalMask{}),
                           expect_causal(x, Attention{}.lambda(x)));
    }
  }
}

TEMPLATE_TEST_CASE("multihead_diff_attention_into is diff_attention head by head", "", DIFFATTN_TEST_SCALARS) {
  for (const Case& c : cases()) {
    for (const bool shared_keys : {false, true}) {
      INFO(c.n_q << " x " << c.n_k << ", heads " << c.num_heads << ", " << c.num_kv_heads << ", shared "
                 << shared_keys);
      const Index kv_heads = c.num_kv_heads == 0 ? c.num_heads : c.num_kv_heads, group = c.num_heads / kv_heads;
      const Index maps = shared_keys ? 1 : 2;
      Rng rng = make_rng();
      const auto q = random_matrix<TestType>(c.n_q, c.num_heads * 2 * kD, rng);
      const auto k = random_matrix<TestType>(c.n_k, kv_heads * maps * kD, rng);
      const auto v = random_matrix<TestType>(c.n_k, kv_heads * kDv, rng);
      const auto lambda = random_matrix<TestType>(c.n_q, c.num_heads, rng);
      Matrix<TestType> first, first_constant;
      for_each_executor<TestType>([&](AnyExecutor& executor) {
        Workspace workspace;
        const Heads heads{c.num_heads, c.num_kv_heads};
        const RangeMask mask{CausalMask{}};
        Matrix<TestType> out(c.n_q, c.num_heads * kDv), constant(c.n_q, c.num_heads * kDv);
        diffattn::multihead_diff_attention_into(out, q, k, v, lambda, heads, mask, {}, workspace, executor);
        diffattn::multihead_diff_attention_into(constant, q, k, v, 0.75, heads, mask, {}, workspace, executor);
        if (first.size() == 0) first = out, first_constant = constant;
        CHECK(identical(out, first));
        CHECK(identical(constant, first_constant));
      });
      for (Index h = 0; h < c.num_heads; ++h) {
        const Index g = h / group;
        Operands<TestType> x;
        x.q1 = q.middleCols(2 * h * kD, kD);
        x.q2 = q.middleCols((2 * h + 1) * kD, kD);
        x.k1 = k.middleCols(maps * g * kD, kD);
        x.k2 = k.middleCols((maps * g + maps - 1) * kD, kD);
        x.v = v.middleCols(g * kDv, kDv);
        x.lambda = lambda.col(h);
        check_head<TestType>(first.middleCols(h * kDv, kDv), DiffAttentionPerRow{}(x, CausalMask{}),
                             expect_causal(x, DiffAttentionPerRow{}.lambda(x)));
        check_head<TestType>(first_constant.middleCols(h * kDv, kDv), DiffAttention{}(x, CausalMask{}),
                             expect_causal(x, DiffAttention{}.lambda(x)));
      }
    }
  }
}

TEST_CASE("Several heads by the simplest calls, with nothing but the operands") {
  Rng rng = make_rng();
  const Index n_q = 30, n_k = 40;
  const Heads heads{4, 2};
  const auto q = random_matrix<float>(n_q, 8 * kD, rng), k = random_matrix<float>(n_k, 4 * kD, rng);
  const auto v = random_matrix<float>(n_k, 2 * kDv, rng), lambda = random_matrix<float>(n_q, 4, rng);
  const Matrix<float> q1 = q.leftCols(4 * kD), k1 = k.leftCols(2 * kD);
  Workspace workspace;
  Matrix<float> out(n_q, 4 * kDv), simple(n_q, 4 * kDv);

  diffattn::multihead_attention_into(out, q1, k1, v, heads, FullMask{}, {}, workspace);
  CHECK(identical(diffattn::multihead_attention(q1, k1, v, heads), out));
  diffattn::multihead_attention_into(simple, q1, k1, v, heads);
  CHECK(identical(simple, out));
  diffattn::multihead_attention_into(out, q1, k1, v, heads, CausalMask{}, {.scale = 0.5}, workspace);
  CHECK(identical(diffattn::multihead_attention(q1, k1, v, heads, CausalMask{}, {.scale = 0.5}), out));

  diffattn::multihead_diff_attention_into(out, q, k, v, lambda, heads, FullMask{}, {}, workspace);
  CHECK(identical(diffattn::multihead_diff_attention(q, k, v, lambda, heads), out));
  diffattn::multihead_diff_attention_into(simple, q, k, v, lambda, heads);
  CHECK(identical(simple, out));
  // num_kv_heads left out: as many as num_heads.
  const auto v4 = random_matrix<float>(n_k, 4 * kDv, rng);
  CHECK(identical(diffattn::multihead_attention(q1, k, v4, {4}), diffattn::multihead_attention(q1, k, v4, {4, 4})));
}
