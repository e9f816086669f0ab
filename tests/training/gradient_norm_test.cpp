#include <cmath>
#include <diffattn/training/gradient_norm.hpp>
#include <limits>

#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"
#include "training/parameters.hpp"

using diffattn::clip_gradient_norm;
using diffattn::gradient_norm;
using diffattn::Index;

TEMPLATE_TEST_CASE("The norm is that of all parameters together", "[training][gradient_norm]", float, double) {
  using S = TestType;
  auto rng = support::make_rng();
  SmallModel<S> small(1, 2);
  small.weight << 1, 2;
  small.bias << 2;
  small.norm << 0, 4;
  CHECK(gradient_norm(small) == 5);
  for (const Index cols : {1, 16, 37, 300}) {
    const auto gradient = random_model<S>(rng, 7, cols);
    long double squares = 0;
    diffattn::visit_parameters(
        gradient, [&](std::string_view, const auto& p) { squares += p.template cast<long double>().squaredNorm(); });
    CHECK(std::abs(gradient_norm(gradient) - static_cast<double>(std::sqrt(squares))) <=
          1e-14 * static_cast<double>(std::sqrt(squares)));
  }
}

TEST_CASE("Clipping shortens what is too long, and nothing else", "[training][gradient_norm]") {
  auto rng = support::make_rng();
  auto gradient = random_model<double>(rng);
  const auto before = gradient;
  const double norm = gradient_norm(gradient);
  CHECK(clip_gradient_norm(gradient, 2 * norm) == norm);
  CHECK(same_parameters(gradient, before));

  CHECK(clip_gradient_norm(gradient, norm / 4) == norm);
  CHECK(std::abs(gradient_norm(gradient) - norm / 4) < 1e-6);
  const double factor = norm / 4 / (norm + 1e-6);
  CHECK(support::identical(gradient.weight, factor * before.weight));
  CHECK(support::identical(gradient.lambda, factor * before.lambda));

  SmallModel<double> zero;
  CHECK(clip_gradient_norm(zero, 1) == 0);
  CHECK(zero.weight.isZero(0));
}

TEST_CASE("Clipping divides by the norm and 1e-6, as PyTorch does", "[training][gradient_norm]") {
  // By hand: a norm of 5e-6, where what is added matters, is clipped to 1e-6 · 5 / 6.
  SmallModel<double> tiny(1, 2);
  tiny.weight << 3e-6, 0;
  tiny.bias << 4e-6;
  CHECK(std::abs(clip_gradient_norm(tiny, 1e-6) - 5e-6) < 1e-20);
  CHECK(std::abs(tiny.weight(0, 0) - 0.5e-6) < 1e-20);
  CHECK(std::abs(tiny.bias[0] - 4e-6 / 6) < 1e-20);

  // At the limit itself a little is taken off, below it by more than that nothing.
  SmallModel<double> even(1, 2);
  even.weight << 3, 4;
  CHECK(clip_gradient_norm(even, 5.0) == 5);
  CHECK(std::abs(even.weight(0, 0) - 3 / (1 + 2e-7)) < 1e-14);
  even.weight << 3, 4;
  CHECK(clip_gradient_norm(even, 5.00001) == 5);
  CHECK(even.weight(0, 0) == 3);
}

TEST_CASE("A gradient that is not finite stays for its user to see", "[training][gradient_norm]") {
  auto rng = support::make_rng();
  auto gradient = random_model<float>(rng);
  gradient.norm[3] = std::numeric_limits<float>::quiet_NaN();
  const auto before = gradient;
  CHECK(std::isnan(clip_gradient_norm(gradient, 1e-3)));
  CHECK(support::identical(gradient.weight, before.weight));
  gradient.norm[3] = std::numeric_limits<float>::infinity();
  CHECK(std::isinf(clip_gradient_norm(gradient, 1e-3)));
  CHECK(support::identical(gradient.weight, before.weight));
  // Squares of large floats do not overflow.
  gradient.norm[3] = 1e30F;
  CHECK(std::isfinite(clip_gradient_norm(gradient, 1)));
  CHECK(std::abs(gradient.norm[3] - 1) < 1e-6F);

  for (const double bad : {0.0, -1.0, std::nan("")}) {
    CHECK(support::thrown_by<std::invalid_argument>([&] { clip_gradient_norm(gradient, bad); }) ==
          "clip_gradient_norm: max_norm must be positive");
  }
}
