// Numbers at the end of their range: only a bias of -inf masks. A finite one of any size is a score like any other,
// however it is stored, in values and gradients, on every path of the kernels; and so are scores of any finite size,
// and scales of any sign.

#include <limits>

#include "diffattn/kernels/backward.hpp"
#include "kernels/backward.hpp"
#include "kernels/grid.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"

using namespace support;

namespace {

/// One shape for each path: a handful, a few rows in place, row blocks within a chunk and over several.
std::vector<Shape> path_shapes() {
  return {{2, 3, 5, 4}, {7, 8, 33, 17}, {1, 300, 16, 33}, {3, 700, 8, 5}, {40, 60, 16, 24}, {50, 600, 8, 20}};
}

template <typename Number>
struct ConstantBias {
  Number value;
  Number operator()(Index, Index, Index, Index, Index) const { return value; }
};

/// `value`, but for every third key, which is hidden, and one in each row, which is not biased if `one`.
template <typename Number>
struct SomeBias {
  Number value;
  bool one;
  Number operator()(Index /*head*/, Index query, Index key, Index, Index n_k) const {
    if (one && key == (query * 7) % n_k) return 0;
    return key % 3 == 1 && key + 1 < n_k ? -std::numeric_limits<Number>::infinity() : value;
  }
};

/// What a row of equal scores must give: the mean of the values it sees, times 1 − λ.
template <typename Scalar, typename Bias>
void check_mean(const Shape& shape, const Bias& bias) {
  INFO(describe(shape));
  Rng rng = make_rng();
  auto x = random_operands<Scalar>(shape, rng);
  const auto mask = with_bias(FullMask{}, bias);
  Matrix<Scalar> mean = Matrix<Scalar>::Zero(shape.n_q, shape.dv);
  for (Index i = 0; i < shape.n_q; ++i) {
    Scalar count = 0;
    for (Index j = 0; j < shape.n_k; ++j) {
      if (bias(0, i, j, shape.n_q, shape.n_k) == -std::numeric_limits<double>::infinity()) continue;
      mean.row(i) += x.v.row(j);
      count += 1;
    }
    mean.row(i) /= count;
  }
  const Scalar tolerance = 200 * std::numeric_limits<Scalar>::epsilon();
  CHECK((diffattn::attention(x.q1, x.k1, x.v, mask) - mean).cwiseAbs().maxCoeff() <= tolerance);
  CHECK((diffattn::reference::attention(x.q1, x.k1, x.v, mask) - mean).cwiseAbs().maxCoeff() <= tolerance);
  const Matrix<Scalar> difference = diffattn::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, Scalar(0.25), mask);
  CHECK((difference - Scalar(0.75) * mean).cwiseAbs().maxCoeff() <= tolerance);

  // dV = Aᵀ·1: every value has the weight that it had.
  const Matrix<Scalar> ones = Matrix<Scalar>::Ones(shape.n_q, shape.dv);
  const auto ours = diffattn::attention_backward(x.q1, x.k1, x.v, ones, mask);
  const auto exact = diffattn::reference::attention_backward(x.q1, x.k1, x.v, ones, mask);
  const Scalar most = exact.dv.cwiseAbs().maxCoeff();
  CHECK((ours.dv - exact.dv).cwiseAbs().maxCoeff() <= tolerance * (most + 1));
  CHECK(ours.dv.sum() == Approx(static_cast<double>(shape.n_q * shape.dv)).epsilon(1e-3));
}

/// One score among the lowest that are: it has all the weight.
template <typename Scalar, typename Number>
void check_one(const Shape& shape, Number value) {
  INFO(describe(shape));
  Rng rng = make_rng();
  const auto x = random_operands<Scalar>(shape, rng);
  const auto mask = with_bias(FullMask{}, SomeBias<Number>{value, true});
  const Matrix<Scalar> out = diffattn::attention(x.q1, x.k1, x.v, mask);
  const Matrix<Scalar> difference = diffattn::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, Scalar(0.25), mask);
  for (Index i = 0; i < shape.n_q; ++i) {
    const Matrix<Scalar> expected = x.v.row((i * 7) % shape.n_k);
    CHECK((out.row(i) - expected).cwiseAbs().maxCoeff() <= 8 * std::numeric_limits<Scalar>::epsilon());
    CHECK((difference.row(i) - Scalar(0.75) * expected).cwiseAbs().maxCoeff() <=
          8 * std::numeric_limits<Scalar>::epsilon());
  }
}

/// Scores that are low for the first keys and grow: what was kept of the first must be scaled down.
template <typename Scalar>
struct RisingBias {
  Scalar operator()(Index, Index, Index key, Index, Index n_k) const {
    return key < n_k / 2 ? std::numeric_limits<Scalar>::lowest() : Scalar(0);
  }
};

}  // namespace

TEMPLATE_TEST_CASE("A row of the lowest number there is has the mean of the values", "[kernels][extremes]",
                   DIFFATTN_TEST_SCALARS) {
  using Limits = std::numeric_limits<TestType>;
  for (const Shape& shape : path_shapes()) {
    check_mean<TestType>(shape, ConstantBias<TestType>{Limits::lowest()});
    check_mean<TestType>(shape, ConstantBias<TestType>{Limits::lowest() / 2});
    check_mean<TestType>(shape, SomeBias<TestType>{Limits::lowest(), false});
    check_mean<TestType>(shape, SomeBias<TestType>{Limits::max(), false});
  }
}

TEST_CASE("A bias that float cannot hold is the lowest number, not a mask", "[kernels][extremes]") {
  for (const Shape& shape : path_shapes()) {
    check_mean<float>(shape, ConstantBias<double>{std::numeric_limits<double>::lowest()});
    check_mean<float>(shape, ConstantBias<double>{-1e300});
    check_mean<float>(shape, SomeBias<double>{-1e39, false});
  }
}

TEST_CASE("Two biases whose sum is below all numbers mask nothing", "[kernels][extremes]") {
  const auto lowest = ConstantBias<float>{std::numeric_limits<float>::lowest()};
  Rng rng = make_rng();
  const auto x = random_operands<float>({7, 300, 8, 12}, rng);
  const Matrix<float> out = diffattn::attention(x.q1, x.k1, x.v, with_bias(with_bias(FullMask{}, lowest), lowest));
  CHECK((out.rowwise() - x.v.colwise().mean()).cwiseAbs().maxCoeff() < 1e-5f);
}

TEMPLATE_TEST_CASE("One score among the lowest has all the weight", "[kernels][extremes]", DIFFATTN_TEST_SCALARS) {
  for (const Shape& shape : path_shapes()) {
    check_one<TestType>(shape, std::numeric_limits<TestType>::lowest());
    check_one<TestType>(shape, std::numeric_limits<TestType>::lowest() / 4);
  }
}

TEMPLATE_TEST_CASE("Values of the lowest scores do not stay in a sum that larger ones follow", "[kernels][extremes]",
                   DIFFATTN_TEST_SCALARS) {
  for (const Shape& shape : path_shapes()) {
    INFO(describe(shape));
    Rng rng = make_rng();
    const auto x = random_operands<TestType>(shape, rng);
    const auto mask = with_bias(FullMask{}, RisingBias<TestType>{});
    const Index half = shape.n_k / 2;
    const Matrix<TestType> k1 = x.k1.bottomRows(shape.n_k - half), k2 = x.k2.bottomRows(shape.n_k - half);
    const Matrix<TestType> v = x.v.bottomRows(shape.n_k - half);
    const TestType tolerance = 100 * std::numeric_limits<TestType>::epsilon();
    const Matrix<TestType> out = diffattn::attention(x.q1, x.k1, x.v, mask);
    CHECK((out - diffattn::reference::attention(x.q1, k1, v)).cwiseAbs().maxCoeff() <= tolerance);
    const Matrix<TestType> difference = diffattn::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, TestType(0.5), mask);
    const Matrix<TestType> expected = diffattn::reference::diff_attention(x.q1, k1, x.q2, k2, v, TestType(0.5));
    CHECK((difference - expected).cwiseAbs().maxCoeff() <= tolerance);
  }
}

TEMPLATE_TEST_CASE("Scores near the largest number overflow nowhere", "[kernels][extremes]", DIFFATTN_TEST_SCALARS) {
  using Limits = std::numeric_limits<TestType>;
  for (const Shape& shape : path_shapes()) {
    INFO(describe(shape));
    Rng rng = make_rng();
    auto x = random_operands<TestType>(shape, rng);
    // s·q·k is ±0.9 of the largest number for key 0 and 1, times log2(e) more than all.
    x.q1.setZero(), x.k1.setZero();
    x.q1.col(0).setConstant(1);
    x.k1(0, 0) = Limits::max() * TestType(0.9);
    x.k1(1, 0) = -Limits::max() * TestType(0.9);
    const AttentionOptions options{.scale = 1.0};
    const Matrix<TestType> out = diffattn::attention(x.q1, x.k1, x.v, FullMask{}, options);
    CHECK((out.rowwise() - x.v.row(0)).cwiseAbs().maxCoeff() <= 4 * Limits::epsilon());
    const Matrix<TestType> biased =
        diffattn::attention(x.q1, x.k1, x.v, with_bias(FullMask{}, ConstantBias<TestType>{1}), options);
    CHECK((biased.rowwise() - x.v.row(0)).cwiseAbs().maxCoeff() <= 4 * Limits::epsilon());
  }
}

TEMPLATE_TEST_CASE("Scales of any sign and size", "[kernels][extremes]", DIFFATTN_TEST_SCALARS) {
  for (const Shape& shape : path_shapes()) {
    Rng rng = make_rng();
    const auto x = random_operands<TestType>(shape, rng);
    const Matrix<TestType> dout = random_matrix<TestType>(shape.n_q, shape.dv, rng);
    for (const double scale : {0.0, -0.0, 1.0, -1.0, 0.37, -0.73, 1e-20, -1e-42, 1e-300, 3.0}) {
      INFO(describe(shape) << ", scale " << scale);
      const AttentionOptions options{.scale = scale};
      const auto check = [&](const auto& mask, const Matrix<Exact>& bias) {
        const Expected expected = expect(x, DiffAttention{}.lambda(x), bias, options);
        CHECK(worst_error<TestType>(DiffAttention{}(x, mask, options), expected.value, expected.magnitude) <=
              3 * kErrorFactor);
        const auto exact = expect_gradients(AttentionBackward{}, x, dout, bias, options);
        const auto ours = AttentionBackward{}(x, dout, mask, options);
        for (std::size_t i = 0; i < ours.size(); ++i) {
          if (ours[i].size() == 0) continue;
          // Of a scale that is next to nothing, what is left of a gradient may be below the normal numbers.
          const Exact error = (ours[i].template cast<Exact>() - exact[i]).norm();
          CHECK(error <= 1e3L * kUnitRoundoff<TestType> * exact[i].norm() + std::numeric_limits<TestType>::min());
        }
      };
      check(RangeMask{CausalMask{}}, dense(RangeMask{CausalMask{}}, shape.n_q, shape.n_k));
      const AnyBias<TestType> alibi{AlibiBias{0.5}};
      check(with_bias(RangeMask{FullMask{}}, alibi), dense(alibi, shape.n_q, shape.n_k));
    }
  }
}
