// Scores that grow from chunk to chunk of the keys: what earlier chunks gave is rescaled, again and again.

#include "kernels/oracle.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"
#include "support/tolerances.hpp"

using namespace support;

namespace {

template <typename Scalar, typename Kernel>
void check_rising(const Kernel& kernel) {
  for (const Index n_q : {2, 9, 60}) {
    INFO(n_q << " queries");
    Rng rng = make_rng();
    auto x = random_operands<Scalar>({n_q, 1100, 4, 20}, rng);
    for (Index j = 0; j < x.n_k(); ++j) {
      x.k1.row(j) *= Scalar(1) + static_cast<Scalar>(j) / 100;
      x.k2.row(j) *= Scalar(1) + static_cast<Scalar>(j) / 150;
    }
    // The bound is for scores of order 1; these are ten times as large, and so are the errors of their weights.
    const Expected full = expect_full(x, kernel.lambda(x)), causal = expect_causal(x, kernel.lambda(x));
    CHECK(worst_error<Scalar>(kernel(x), full.value, full.magnitude) <= 10 * kErrorFactor);
    CHECK(worst_error<Scalar>(kernel(x, CausalMask{}), causal.value, causal.magnitude) <= 10 * kErrorFactor);
  }
}

/// Keys of score 0, then of a score that leaves them no weight: by a little, by more than a float, than a double holds.
template <typename Scalar, typename Kernel>
void check_steps(const Kernel& kernel) {
  for (const Index n_q : {2, 9, 60}) {
    for (const double score : {40.0, 90.0, 300.0, 741.0, 1e4}) {
      INFO(n_q << " queries, score " << score);
      const Index n_k = 900, from = 600;
      Rng rng = make_rng();
      auto x = random_operands<Scalar>({n_q, n_k, 1, 20}, rng);
      x.q1.setOnes();
      x.q2.setOnes();
      x.k1.setZero();
      x.k1.bottomRows(n_k - from).setConstant(static_cast<Scalar>(score));
      x.k2 = x.k1;
      Operands<Scalar> rest = x;
      rest.k1 = x.k1.bottomRows(n_k - from);
      rest.k2 = rest.k1;
      rest.v = x.v.bottomRows(n_k - from);
      const Expected expected = expect_full(rest, kernel.lambda(x));
      CHECK(worst_error<Scalar>(kernel(x), expected.value, expected.magnitude) <= kErrorFactor);
    }
  }
}

}  // namespace

TEMPLATE_TEST_CASE("attention follows scores that rise from chunk to chunk", "", DIFFATTN_TEST_SCALARS) {
  check_rising<TestType>(Attention{});
  check_steps<TestType>(Attention{});
}

TEMPLATE_TEST_CASE("diff_attention follows scores that rise from chunk to chunk", "", DIFFATTN_TEST_SCALARS) {
  check_rising<TestType>(DiffAttention{});
  check_steps<TestType>(DiffAttention{});
}
