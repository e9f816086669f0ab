#include <diffattn/layers/lambda.hpp>

#include "layers/layer_checks.hpp"
#include "support/scalars.hpp"

using diffattn::DiffLambda;
using diffattn::Index;
using diffattn::lambda_init;

TEST_CASE("lambda_init follows the schedule of the paper, counted from 0", "[layers][lambda]") {
  for (const Index depth : {0, 1, 2, 5, 27, 100}) {
    INFO("depth " << depth);
    const long double exact = 0.8L - 0.6L * std::exp(-0.3L * static_cast<long double>(depth));
    CHECK(std::abs(lambda_init(static_cast<double>(depth)) - exact) <= 2e-16L);
  }
  CHECK(std::abs(lambda_init(0) - 0.2) < 1e-15);
}

TEMPLATE_TEST_CASE("λ is exp(λq1·λk1) − exp(λq2·λk2) + λ_init", "[layers][lambda]", DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  auto rng = make_rng();
  const double spread = GENERATE(0.1, 0.5);
  for (const Index d : {1, 3, 8, 64, 129}) {
    INFO("d " << d << ", spread " << spread);
    DiffLambda<S> lambda(d, 0.35);
    for (auto* vector : {&lambda.q1, &lambda.k1, &lambda.q2, &lambda.k2}) {
      *vector = static_cast<S>(spread) * random_matrix<S>(d, 1, rng);
    }
    const auto exp_dot = [](const auto& q, const auto& k) {
      return std::exp(q.template cast<long double>().dot(k.template cast<long double>()));
    };
    const auto magnitude = [](const auto& q, const auto& k) {
      return q.template cast<long double>().cwiseAbs().dot(k.template cast<long double>().cwiseAbs());
    };
    const long double first = exp_dot(lambda.q1, lambda.k1), second = exp_dot(lambda.q2, lambda.k2);
    // exp turns the absolute error of its argument into a relative one.
    const long double steps = static_cast<long double>(d) + 1;
    const long double bound =
        std::numeric_limits<S>::epsilon() * (first * (2 + steps * magnitude(lambda.q1, lambda.k1)) +
                                             second * (2 + steps * magnitude(lambda.q2, lambda.k2)) + 1);
    CHECK(std::abs(static_cast<long double>(lambda.value()) - (first - second + 0.35L)) <= bound);
  }
}

TEST_CASE("λ may be negative and above 1", "[layers][lambda]") {
  DiffLambda<double> lambda(1, 0.8);
  lambda.q1(0) = lambda.k1(0) = 1;
  CHECK(std::abs(lambda.value() - (std::exp(1.0) - 1 + 0.8)) < 1e-15);
  lambda.q2(0) = lambda.k2(0) = 2;
  CHECK(std::abs(lambda.value() - (std::exp(1.0) - std::exp(4.0) + 0.8)) < 1e-14);
}
