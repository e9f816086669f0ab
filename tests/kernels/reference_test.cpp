// The specification itself, against results worked out by hand and the laws.

#include "diffattn/kernels/reference.hpp"

#include "kernels/oracle.hpp"
#include "support/catch.hpp"
#include "support/tolerances.hpp"

using namespace support;
namespace reference = diffattn::reference;

TEMPLATE_TEST_CASE("The reference agrees with a result worked out by hand", "", float, double, long double) {
  const auto u = static_cast<TestType>(kUnitRoundoff<TestType>);
  // Scores are log 1, log 2 and log 5: the weights are 1/8, 2/8 and 5/8.
  Matrix<TestType> q(1, 1), k(3, 1), v(3, 2);
  q << 1;
  k << 0, std::log(TestType(2)), std::log(TestType(5));
  v << 8, 0, 16, 4, 24, 8;
  const Matrix<TestType> p = reference::attention_map(q, k, FullMask{});
  CHECK(std::abs(p(0, 0) - TestType(0.125)) <= 8 * u);
  CHECK(std::abs(p(0, 1) - TestType(0.25)) <= 8 * u);
  CHECK(std::abs(p(0, 2) - TestType(0.625)) <= 8 * u);
  const Matrix<TestType> out = reference::attention(q, k, v, FullMask{});
  CHECK(std::abs(out(0, 0) - 20) <= 20 * 16 * u);
  CHECK(std::abs(out(0, 1) - 6) <= 6 * 16 * u);

  // The second map has equal weights, and λ = 3/4.
  const Matrix<TestType> zero = Matrix<TestType>::Zero(1, 1);
  const Matrix<TestType> difference = reference::diff_attention(q, k, zero, k, v, 0.75);
  CHECK(std::abs(difference(0, 0) - (20 - 12)) <= 32 * 16 * u);
  CHECK(std::abs(difference(0, 1) - (6 - 3)) <= 9 * 16 * u);
}

TEST_CASE("The reference scales by 1/sqrt(d), or as it is told") {
  Matrix<double> q(1, 4), k(2, 4);
  q << 1, 1, 1, 1;
  k << 1, 1, 1, 1, 0, 0, 0, 0;
  const auto odds = [&](const AttentionOptions& options) {
    const Matrix<double> p = reference::attention_map(q, k, FullMask{}, options);
    return std::log(p(0, 0) / p(0, 1));
  };
  CHECK(std::abs(odds({}) - 2) <= 1e-14);
  CHECK(std::abs(odds({.scale = 0.25}) - 1) <= 1e-14);
  CHECK(odds({.scale = 0}) == 0);
}

TEMPLATE_TEST_CASE("The reference's maps are zero where masked and sum to 1 elsewhere", "", float, double,
                   long double) {
  for (const Shape& shape : {Shape{5, 9, 3, 1}, Shape{9, 5, 3, 1}, Shape{1, 1, 1, 1}}) {
    Rng rng = make_rng();
    const auto q = random_matrix<TestType>(shape.n_q, shape.d, rng),
               k = random_matrix<TestType>(shape.n_k, shape.d, rng);
    for (const RangeMask& mask : {RangeMask{FullMask{}}, RangeMask{CausalMask{}}, RangeMask{SlidingWindowMask{3}}}) {
      const Matrix<Exact> bias = dense(mask, shape.n_q, shape.n_k);
      const Matrix<TestType> p = reference::attention_map(q, k, mask);
      for (Index i = 0; i < shape.n_q; ++i) {
        for (Index j = 0; j < shape.n_k; ++j) CHECK((p(i, j) > 0) == (bias(i, j) == 0));
        const bool sees = (bias.row(i).array() == 0).any();
        CHECK(std::abs(p.row(i).sum() - TestType(sees)) <= 16 * static_cast<TestType>(kUnitRoundoff<TestType>));
      }
    }
  }
}

TEST_CASE("The reference hides what is masked, and shows what is not") {
  Rng rng = make_rng();
  auto x = random_operands<double>({4, 4, 2, 3}, rng);
  const auto run = [&](const auto& mask) {
    return reference::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, x.lambda, mask);
  };
  const auto padding = with_bias(FullMask{}, HidingBias{3});
  const Matrix<double> causal = run(CausalMask{}), padded = run(padding);
  x.k1(3, 0) = x.k2(3, 1) = x.v(3, 2) = kNaN<double>;
  CHECK(identical(run(CausalMask{}).topRows(3), causal.topRows(3)));
  CHECK(run(CausalMask{}).row(3).array().isNaN().all());
  CHECK(identical(run(padding), padded));
  CHECK(run(SlidingWindowMask{0}).isZero(0));
  CHECK(run(with_bias(CausalMask{}, HidingBias{0})).isZero(0));
}

TEST_CASE("The reference of nothing is empty, and to nothing is 0") {
  const Matrix<double> none(0, 2), two = Matrix<double>::Ones(2, 2);
  CHECK(reference::attention(none, two, two).rows() == 0);
  CHECK(identical(reference::attention(two, none, none), Matrix<double>::Zero(2, 2)));
  CHECK(identical(reference::diff_attention(two, none, two, none, none, 0.5), Matrix<double>::Zero(2, 2)));
}
