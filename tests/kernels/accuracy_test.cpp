// How large the errors of float are, as a distribution: no larger than those of a plain evaluation in float, over
// random shapes, scores up to ±30, λ from 0 to 2 and all masks. Fixed seeds, so that a number that moves means
// something.
//
// An error is the largest of a result, in units of u·Σ(P1|V| + |λ|·P2|V|); what is compared is its ratio to that of
// reference.hpp in float, case by case. `test_kernels "[accuracy]"` runs 600 cases of up to 2,048 rows and keys.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/backward.hpp"
#include "kernels/grid.hpp"
#include "support/catch.hpp"

using namespace support;

namespace {

struct Ratios {
  std::vector<double> values;

  void add(double ours, double naive) {
    if (naive > 0) values.push_back(ours / naive);
  }
  double quantile(double p) {
    std::sort(values.begin(), values.end());
    return values.at(static_cast<std::size_t>(p * static_cast<double>(values.size() - 1)));
  }
};

/// A random problem. The seeds do not follow --rng-seed.
struct AccuracyCase {
  Operands<float> x;
  Matrix<float> bias_matrix, dout;
  RangeMask range;
  AnyBias<float> bias{AlibiBias{0}};
  bool biased = false;
  float lambda = 0;

  AccuracyCase(unsigned seed, double fewest_log2, double most_pairs) {
    Rng rng(seed);
    const auto between = [&](double low, double high) {
      return std::uniform_real_distribution<double>(low, high)(rng);
    };
    Shape shape{0, 0, static_cast<Index>(between(16, 257)), static_cast<Index>(between(16, 257))};
    do {
      shape.n_q = static_cast<Index>(std::exp2(between(fewest_log2, 11)));
      shape.n_k = static_cast<Index>(std::exp2(between(fewest_log2, 11)));
    } while (static_cast<double>(shape.n_q * shape.n_k) > most_pairs);
    x = random_operands<float>(shape, rng);
    dout = random_matrix<float>(shape.n_q, shape.dv, rng);
    bias_matrix = random_bias<float>(shape.n_q, shape.n_k, rng);
    lambda = static_cast<float>(between(0, 2));
    const float wanted = static_cast<float>(between(1, 30)) * std::sqrt(static_cast<float>(shape.d));
    const float largest =
        std::max((x.q1 * x.k1.transpose()).cwiseAbs().maxCoeff(), (x.q2 * x.k2.transpose()).cwiseAbs().maxCoeff());
    x.q1 *= wanted / largest;
    x.q2 *= wanted / largest;
    switch (static_cast<int>(between(0, 3))) {
      case 0:
        range = {FullMask{}};
        break;
      case 1:
        range = {CausalMask{}};
        break;
      default:
        range = {SlidingWindowMask{static_cast<Index>(between(1, static_cast<double>(shape.n_k) + 1))}};
    }
    biased = between(0, 2) < 1;
    switch (static_cast<int>(between(0, 3))) {
      case 0:
        bias = {AlibiBias{between(0, 0.5)}};
        break;
      case 1:
        bias = {HidingBias{static_cast<Index>(between(1, static_cast<double>(shape.n_k) + 1))}};
        break;
      default:
        bias = {MatrixBias(bias_matrix)};
    }
  }

  template <typename F>
  void with_mask(const F& f) const {
    if (biased) {
      f(with_bias(range, bias));
    } else {
      f(range);
    }
  }
};

double largest_error(const Matrix<float>& out, const Matrix<double>& exact, const Matrix<double>& magnitude) {
  ErrorStatistics errors;
  errors.add<float>(out, exact, magnitude);
  return errors.worst;
}

/// In double: its own error is 1e-9 of what is measured.
template <typename Mask>
void add_values(Ratios& differential, Ratios& standard, const AccuracyCase& c, const Mask& mask) {
  using diffattn::reference::apply_map;
  const Operands<double> x = cast<double>(c.x);
  const Matrix<double> p1 = diffattn::reference::attention_map(x.q1, x.k1, mask);
  const Matrix<double> p2 = diffattn::reference::attention_map(x.q2, x.k2, mask);
  const auto lambda = static_cast<double>(c.lambda);
  const Matrix<double> first = apply_map(p1, x.v, mask), first_magnitude = apply_map(p1, x.v.cwiseAbs(), mask);
  const Matrix<double> exact = first - lambda * apply_map(p2, x.v, mask);
  const Matrix<double> magnitude = first_magnitude + lambda * apply_map(p2, x.v.cwiseAbs(), mask);
  const auto& f = c.x;
  differential.add(
      largest_error(diffattn::diff_attention(f.q1, f.k1, f.q2, f.k2, f.v, c.lambda, mask), exact, magnitude),
      largest_error(diffattn::reference::diff_attention(f.q1, f.k1, f.q2, f.k2, f.v, c.lambda, mask), exact,
                    magnitude));
  standard.add(largest_error(diffattn::attention(f.q1, f.k1, f.v, mask), first, first_magnitude),
               largest_error(diffattn::reference::attention(f.q1, f.k1, f.v, mask), first, first_magnitude));
}

/// Errors of whole gradients (Frobenius), each against the plain evaluation's.
template <typename Mask>
void add_gradients(Ratios& ratios, const AccuracyCase& c, const Mask& mask) {
  const auto& f = c.x;
  const Operands<double> x = cast<double>(f);
  const Matrix<double> dout = c.dout.cast<double>();
  const auto ours = as_array(diffattn::diff_attention_backward(f.q1, f.k1, f.q2, f.k2, f.v, c.lambda, c.dout, mask));
  const auto naive =
      as_array(diffattn::reference::diff_attention_backward(f.q1, f.k1, f.q2, f.k2, f.v, c.lambda, c.dout, mask));
  const auto exact = as_array(diffattn::reference::diff_attention_backward(x.q1, x.k1, x.q2, x.k2, x.v,
                                                                           static_cast<double>(c.lambda), dout, mask));
  for (std::size_t i = 0; i < 5; ++i) {
    ratios.add((ours[i].template cast<double>() - exact[i]).norm(),
               (naive[i].template cast<double>() - exact[i]).norm());
  }
}

/// n_q and n_k from 2^fewest_log2 on.
void check_distribution(unsigned cases, double fewest_log2, double most_pairs) {
  Ratios differential, standard, gradients;
  for (unsigned seed = 0; seed < cases; ++seed) {
    const AccuracyCase c(seed, fewest_log2, most_pairs);
    c.with_mask([&](const auto& mask) {
      add_values(differential, standard, c, mask);
      if (seed % 2 == 0) add_gradients(gradients, c, mask);
    });
  }
  for (Ratios* values : {&differential, &standard}) {
    CHECK(values->quantile(0.5) <= 0.6);
    CHECK(values->quantile(0.95) <= 1.2);
  }
  CHECK(gradients.quantile(0.5) <= 0.8);
  CHECK(gradients.quantile(0.95) <= 1.5);
}

}  // namespace

// Of a handful of keys most rows see one or two, and all evaluations of those make the same error: not the smallest.
TEST_CASE("Errors in float are no larger than those of a plain evaluation") { check_distribution(250, 4, 2e4); }

TEST_CASE("The same over 600 cases of up to 2,048 rows and keys", "[.][accuracy]") {
  check_distribution(600, 0, 4.2e6);
}
