// Differential attention of one head: the grid, laws, edges, the official implementation's results.

#include "diffattn/kernels/diff_attention.hpp"

#include <filesystem>

#include "diffattn/io/safetensors.hpp"
#include "kernels/edges.hpp"
#include "kernels/grid.hpp"
#include "kernels/laws.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"

using namespace support;

namespace {

/// With λ = 0 the second map does not matter: attention.
struct ZeroLambda {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel&, const Operands<Scalar>& x) {
    check_agree<Scalar>(DiffAttention{0}(x, CausalMask{}), Attention{}(x, CausalMask{}),
                        expect_causal(x, Attention{}.lambda(x)).magnitude);
  }
};

/// out(λ) = out(0) + λ·(out(1) − out(0)), which is also P1 V − λ·P2 V.
struct AffineInLambda {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel&, const Operands<Scalar>& x) {
    const Matrix<Scalar> zero = DiffAttention{0}(x), one = DiffAttention{1}(x);
    Operands<Scalar> swapped = x;
    std::swap(swapped.q1, swapped.q2);
    std::swap(swapped.k1, swapped.k2);
    const Matrix<Scalar> first = Attention{}(x), second = Attention{}(swapped);
    for (const double value : {-1.5, 0.25, 3.0}) {
      const DiffAttention kernel{value};
      const Matrix<Exact> magnitude = expect_full(x, kernel.lambda(x)).magnitude;
      const auto lambda = static_cast<Scalar>(value);
      check_agree<Scalar>(kernel(x), first - lambda * second, magnitude);
      // Both sides of this one carry errors of `zero` and `one`, up to 1 + 2|λ| times.
      const Exact factor = 1 + 2 * std::abs(static_cast<Exact>(value));
      check_agree<Scalar>(kernel(x), zero + lambda * (one - zero),
                          factor * expect_full(x, DiffAttention{1}.lambda(x)).magnitude);
    }
  }
};

/// Two equal maps cancel when λ = 1.
struct EqualMaps {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel&, Operands<Scalar> x) {
    x.q2 = x.q1;
    x.k2 = x.k1;
    const Expected expected = expect_causal(x, DiffAttention{1}.lambda(x));
    check_agree<Scalar>(DiffAttention{1}(x, CausalMask{}), Matrix<Scalar>::Zero(x.n_q(), x.v.cols()),
                        expected.magnitude);
    // The same keys, and not only equal ones: packed once, the same numbers.
    const Matrix<Scalar> shared = diffattn::diff_attention(x.q1, x.k1, -x.q2, x.k1, x.v, 0.5, CausalMask{});
    const Matrix<Scalar> copied = diffattn::diff_attention(x.q1, x.k1, -x.q2, x.k2, x.v, 0.5, CausalMask{});
    CHECK(identical(shared, copied));
  }
};

/// One λ for all rows, and the same for each.
struct ConstantLambda {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel&, Operands<Scalar> x) {
    x.lambda.setConstant(Scalar(-0.375));
    CHECK(identical(DiffAttentionPerRow{}(x, CausalMask{}), DiffAttention{-0.375}(x, CausalMask{})));
  }
};

}  // namespace

TEMPLATE_TEST_CASE("diff_attention is exact to rounding on the grid", "", DIFFATTN_TEST_SCALARS) {
  const Errors errors = check_ranges<TestType>(DiffAttention{});
  CAPTURE(errors.naive.worst);
  CHECK(errors.kernel.worst <= kErrorFactor);
}

TEMPLATE_TEST_CASE("diff_attention with a bias and a lambda for every row is exact to rounding on the grid", "",
                   DIFFATTN_TEST_SCALARS) {
  const Errors errors = check_biases<TestType>(DiffAttentionPerRow{});
  CAPTURE(errors.naive.worst);
  CHECK(errors.kernel.worst <= kErrorFactor);
}

TEMPLATE_TEST_CASE("diff_attention takes any lambda", "", DIFFATTN_TEST_SCALARS) {
  for (const Shape& shape : {Shape{3, 40, 8, 9}, Shape{40, 300, 8, 9}}) {
    Rng rng = make_rng();
    const auto x = random_operands<TestType>(shape, rng);
    for (const double lambda : {0.0, 1.0, -1.0, 17.5, 1e-30, -1e30, 1e30}) {
      INFO("lambda " << lambda);
      const DiffAttention kernel{lambda};
      const Expected expected = expect_causal(x, kernel.lambda(x));
      CHECK(worst_error<TestType>(kernel(x, CausalMask{}), expected.value, expected.magnitude) <= kErrorFactor);
    }
    // An integer is a number too.
    CHECK(identical(diffattn::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, 2), DiffAttention{2}(x)));
  }
}

TEMPLATE_TEST_CASE("diff_attention obeys its laws", "", DIFFATTN_TEST_SCALARS) {
  check_all_laws<TestType>(DiffAttention{});
  check_all_laws<TestType>(DiffAttentionPerRow{});
  check_laws<TestType, DiffAttention, ZeroLambda, AffineInLambda, EqualMaps, ConstantLambda>(DiffAttention{});
}

TEMPLATE_TEST_CASE("diff_attention: a row that sees no key is 0", "", DIFFATTN_TEST_SCALARS) {
  check_rows_without_keys<TestType>(DiffAttention{});
  check_rows_without_keys<TestType>(DiffAttention{-2});
}

TEMPLATE_TEST_CASE("diff_attention of nothing is empty, and to nothing is 0", "", DIFFATTN_TEST_SCALARS) {
  check_empty_operands<TestType>(DiffAttentionPerRow{});
}

TEMPLATE_TEST_CASE("diff_attention: NaN and Inf reach the rows that see them and no other", "", DIFFATTN_TEST_SCALARS) {
  check_not_finite<TestType>(DiffAttention{});
}

TEMPLATE_TEST_CASE("diff_attention: a NaN lambda is its own row's", "", DIFFATTN_TEST_SCALARS) {
  for (const Index n : {3, 40}) {
    Rng rng = make_rng();
    auto x = random_operands<TestType>({n, n, 8, 5}, rng);
    const Matrix<TestType> clean = DiffAttentionPerRow{}(x);
    x.lambda(1) = kNaN<TestType>;
    const Matrix<TestType> out = DiffAttentionPerRow{}(x);
    CHECK(out.row(1).array().isNaN().all());
    CHECK(identical(out.row(0), clean.row(0)));
    CHECK(identical(out.bottomRows(n - 2), clean.bottomRows(n - 2)));
  }
}

TEMPLATE_TEST_CASE("diff_attention holds at extreme and at equal scores", "", DIFFATTN_TEST_SCALARS) {
  check_extreme_scores<TestType>(DiffAttention{});
  check_equal_scores<TestType>(DiffAttention{});
}

namespace {

struct Recorded {
  std::string name;
  Operands<double> x;
  Matrix<double> out;
  double lambda;
  RangeMask mask;
};

/// Operands and results recorded in float64 from the official implementation's arithmetic.
std::vector<Recorded> recorded_operators() {
  std::vector<Recorded> all;
  for (const auto& entry : std::filesystem::directory_iterator(DIFFATTN_TEST_DATA "/golden")) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("op_", 0) != 0) continue;
    const diffattn::Safetensors file(entry.path());
    Recorded recorded{name, {}, file.matrix<double>("out"), std::stod(file.metadata().at("lambda")), {}};
    for (const auto& [tensor, matrix] :
         {std::pair("q1", &recorded.x.q1), std::pair("k1", &recorded.x.k1), std::pair("q2", &recorded.x.q2),
          std::pair("k2", &recorded.x.k2), std::pair("v", &recorded.x.v)}) {
      *matrix = file.matrix<double>(tensor);
    }
    const std::string mask = file.metadata().at("mask");
    if (mask == "causal") recorded.mask.any = CausalMask{};
    if (mask == "sliding_window") recorded.mask.any = SlidingWindowMask{std::stol(file.metadata().at("window"))};
    all.push_back(std::move(recorded));
  }
  return all;
}

}  // namespace

TEST_CASE("diff_attention agrees with the official implementation") {
  const std::vector<Recorded> all = recorded_operators();
  REQUIRE(all.size() == 6);
  for (const Recorded& recorded : all) {
    INFO(recorded.name);
    const Operands<double>& x = recorded.x;
    const DiffAttention kernel{recorded.lambda};
    const Expected exact = expect(x, kernel.lambda(x), dense(recorded.mask, x.n_q(), x.n_k()));
    const auto relative = [&](const Matrix<double>& out) {
      return static_cast<double>(
          ((out - recorded.out).array().abs().cast<Exact>() / exact.magnitude.array()).maxCoeff());
    };
    CHECK(relative(kernel(x, recorded.mask)) <= 1e-12);
    CHECK(relative(diffattn::reference::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, recorded.lambda, recorded.mask)) <=
          1e-12);

    // Scores here go up to 17, more than three times those of the grid: so do errors, and the recorded results
    // themselves are 35 units of float64 away from exact.
    constexpr double kFactor = 4 * kErrorFactor;
    const Operands<float> y = {x.q1.cast<float>(), x.k1.cast<float>(), x.q2.cast<float>(),
                               x.k2.cast<float>(), x.v.cast<float>(),  {}};
    const Expected rounded = expect(y, kernel.lambda(y), dense(recorded.mask, y.n_q(), y.n_k()));
    CHECK(worst_error<float>(kernel(y, recorded.mask), rounded.value, rounded.magnitude) <= kFactor);
    CHECK(worst_error<double>(kernel(x, recorded.mask), exact.value, exact.magnitude) <= kFactor);
  }
}
