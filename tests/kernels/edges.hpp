#pragma once

// The edges of every kernel: rows that see nothing, empty operands, NaN and Inf on either side of a mask, scores and
// values at the ends of the number line.

#include <limits>

#include "kernels/oracle.hpp"
#include "support/tolerances.hpp"

namespace support {

inline std::vector<Shape> edge_shapes() {
  return {{1, 1, 1, 1}, {3, 2, 4, 6}, {4, 40, 8, 9}, {7, 7, 8, 1}, {11, 8, 65, 24}, {40, 33, 8, 20}, {60, 300, 5, 16}};
}

/// Rows that see no key are exactly 0, whatever is in them and in the keys.
template <typename Scalar, typename Kernel>
void check_rows_without_keys(const Kernel& kernel) {
  for (const Shape& shape : edge_shapes()) {
    INFO(describe(shape));
    Rng rng = make_rng();
    auto x = random_operands<Scalar>(shape, rng);
    const Matrix<Scalar> hidden = Matrix<Scalar>::Constant(shape.n_q, shape.n_k, -kInf<Scalar>);
    const auto check_zeros = [&] {
      CHECK(kernel(x, SlidingWindowMask{0}).isZero(0));
      CHECK(kernel(x, with_bias(FullMask{}, HidingBias{0})).isZero(0));
      CHECK(kernel(x, with_bias(CausalMask{}, MatrixBias(hidden))).isZero(0));
      CHECK(kernel(x, CausalMask{}).topRows(std::max<Index>(0, shape.n_q - shape.n_k)).isZero(0));
    };
    check_zeros();
    x.k1.setConstant(kNaN<Scalar>);
    x.v.setConstant(kInf<Scalar>);
    check_zeros();
    x.q1.setConstant(kNaN<Scalar>);
    x.q2.setConstant(kInf<Scalar>);
    check_zeros();
  }
}

template <typename Scalar, typename Kernel>
void check_empty_operands(const Kernel& kernel) {
  Rng rng = make_rng();
  const Matrix<Scalar> no_queries = kernel(random_operands<Scalar>({0, 5, 4, 6}, rng));
  CHECK(no_queries.rows() == 0);
  CHECK(no_queries.cols() == 6);
  for (const Index n_q : {1, 3, 30}) {
    const auto x = random_operands<Scalar>({n_q, 0, 4, 6}, rng);
    for (const RangeMask& mask : {RangeMask{FullMask{}}, RangeMask{CausalMask{}}, RangeMask{SlidingWindowMask{3}}}) {
      const Matrix<Scalar> no_keys = kernel(x, mask);
      CHECK(no_keys.rows() == n_q);
      CHECK(no_keys.cols() == 6);
      CHECK(no_keys.isZero(0));
    }
  }
  const Matrix<Scalar> nothing = kernel(random_operands<Scalar>({0, 0, 4, 6}, rng), CausalMask{});
  CHECK(nothing.rows() == 0);
}

/// NaN and Inf planted in one key and its value: rows that do not see it are what they were, rows that see a NaN show
/// it, in all columns for a key and in its own column for a value.
template <typename Scalar, typename Kernel, typename Mask>
void check_planted(const Kernel& kernel, const Operands<Scalar>& x, const Mask& mask, const Matrix<Exact>& bias) {
  const Expected expected = expect(x, kernel.lambda(x), bias);
  const Matrix<Scalar> clean = kernel(x, mask);
  const auto check_unseen = [&](const Matrix<Scalar>& out, Index i) {
    CHECK(worst_error<Scalar>(out.row(i), expected.value.row(i), expected.magnitude.row(i)) <= kErrorFactor);
  };
  for (const Index key : {Index{0}, x.n_k() / 2, x.n_k() - 1}) {
    // The first, the middle and the last, so that every packet of a strip of values is looked at.
    const Index column = key == 0 ? 0 : key == x.n_k() - 1 ? x.v.cols() - 1 : x.v.cols() / 2;
    INFO(x.n_q() << " x " << x.n_k() << ", planted in key " << key);
    Operands<Scalar> bad_key = x, bad_second_key = x, bad_value = x, infinite = x;
    bad_key.k1(key, 0) = kNaN<Scalar>;
    bad_second_key.k2(key, x.k2.cols() - 1) = kNaN<Scalar>;
    bad_value.v(key, column) = kNaN<Scalar>;
    infinite.k1.row(key).setConstant(kInf<Scalar>);
    infinite.k2.row(key).setConstant(-kInf<Scalar>);
    infinite.v.row(key).setConstant(kInf<Scalar>);
    const Matrix<Scalar> from_key = kernel(bad_key, mask), from_second_key = kernel(bad_second_key, mask),
                         from_value = kernel(bad_value, mask), from_infinite = kernel(infinite, mask);
    for (Index i = 0; i < x.n_q(); ++i) {
      if (bias(i, key) == kHidden) {
        CHECK(identical(from_key.row(i), clean.row(i)));
        CHECK(identical(from_second_key.row(i), clean.row(i)));
        check_unseen(from_value, i);
        check_unseen(from_infinite, i);
        continue;
      }
      CHECK(from_key.row(i).array().isNaN().all());
      CHECK(from_second_key.row(i).array().isNaN().all() == Kernel::kDifferential);
      for (Index c = 0; c < x.v.cols(); ++c) {
        CHECK(std::isnan(from_value(i, c)) == (c == column));
        if (c != column) {
          CHECK(worst_error<Scalar>(from_value.row(i).segment(c, 1), expected.value.row(i).segment(c, 1),
                                    expected.magnitude.row(i).segment(c, 1)) <= kErrorFactor);
        }
      }
    }
  }
}

template <typename Scalar, typename Kernel>
void check_not_finite(const Kernel& kernel) {
  for (const Shape& shape : edge_shapes()) {
    Rng rng = make_rng();
    const auto x = random_operands<Scalar>(shape, rng);
    const Matrix<Scalar> matrix = [&] {
      Matrix<Scalar> bias = random_matrix<Scalar>(shape.n_q, shape.n_k, rng);
      for (Index i = 0; i < bias.size(); i += 3) bias.data()[i] = -kInf<Scalar>;
      return bias;
    }();
    for (const RangeMask& mask : {RangeMask{FullMask{}}, RangeMask{CausalMask{}}, RangeMask{SlidingWindowMask{4}}}) {
      check_planted(kernel, x, mask, dense(mask, shape.n_q, shape.n_k));
    }
    for (const AnyBias<Scalar>& bias :
         {AnyBias<Scalar>{HidingBias{shape.n_k - 1}}, AnyBias<Scalar>{MatrixBias(matrix)}}) {
      const RangeMask mask{CausalMask{}};
      check_planted(kernel, x, with_bias(mask, bias),
                    dense(mask, shape.n_q, shape.n_k) + dense(bias, shape.n_q, shape.n_k));
    }
    // A query that is NaN is nobody else's concern.
    Operands<Scalar> y = x;
    y.q1(0, 0) = kNaN<Scalar>;
    const Matrix<Scalar> clean = kernel(x), out = kernel(y);
    CHECK(out.row(0).array().isNaN().all());
    CHECK(identical(out.bottomRows(shape.n_q - 1), clean.bottomRows(shape.n_q - 1)));
  }
}

/// Scores that decide everything: the keys with the largest share the weight, the others have none.
template <typename Scalar, typename Kernel>
void check_extreme_scores(const Kernel& kernel) {
  for (const Shape& shape : {Shape{2, 6, 1, 4}, Shape{30, 64, 1, 20}, Shape{9, 520, 1, 3}}) {
    INFO(describe(shape));
    Rng rng = make_rng();
    auto x = random_operands<Scalar>(shape, rng);
    for (Index j = 0; j < shape.n_k; ++j) x.k1(j, 0) = x.k2(j, 0) = Scalar(j % 3 == 0 ? 1 : -1);
    const Index winners = (shape.n_k + 2) / 3;
    Vector<Exact> mean = Vector<Exact>::Zero(shape.dv), size = mean;
    for (Index j = 0; j < shape.n_k; j += 3) {
      mean += x.v.row(j).transpose().template cast<Exact>() / Exact(winners);
      size += x.v.row(j).transpose().cwiseAbs().template cast<Exact>() / Exact(winners);
    }
    const Vector<Exact> lambda = kernel.lambda(x), ones = Vector<Exact>::Ones(shape.n_q);
    const Matrix<Exact> expected = (ones - lambda) * mean.transpose();
    const Matrix<Exact> magnitude = (ones + lambda.cwiseAbs()) * size.transpose();
    for (const double score : {1e4, 1e30, -1e4, -1e30}) {
      INFO("scores " << score);
      const auto sign = static_cast<Scalar>(score > 0 ? 1 : -1);
      Operands<Scalar> y = x;
      y.q1.setConstant(Scalar(score));
      y.q2.setConstant(Scalar(score));
      y.k1 *= sign;
      y.k2 *= sign;
      CHECK(worst_error<Scalar>(kernel(y), expected, magnitude) <= kErrorFactor);
    }
  }
}

/// Equal scores, by zeros of either sign, by subnormal operands or by a scale of 0: the mean of the values.
template <typename Scalar, typename Kernel>
void check_equal_scores(const Kernel& kernel) {
  constexpr Scalar kTiny = std::numeric_limits<Scalar>::denorm_min();
  for (const Shape& shape : {Shape{2, 6, 3, 4}, Shape{30, 64, 3, 20}, Shape{9, 520, 3, 3}}) {
    INFO(describe(shape));
    Rng rng = make_rng();
    auto x = random_operands<Scalar>(shape, rng);
    const Expected expected = expect_full(x, kernel.lambda(x), {.scale = 0});
    const auto check = [&](const Matrix<Scalar>& out) {
      CHECK(worst_error<Scalar>(out, expected.value, expected.magnitude) <= kErrorFactor);
    };
    check(kernel(x, FullMask{}, {.scale = 0}));
    for (const Scalar q : {Scalar(0), -Scalar(0), kTiny, -kTiny}) {
      x.q1.setConstant(q);
      x.q2.setConstant(q);
      check(kernel(x));
    }
    // Subnormal values: right to a few of the smallest steps.
    x.v = (x.v * Scalar(1000)).array().round().matrix() * kTiny;
    const Expected tiny = expect_full(x, kernel.lambda(x));
    const Matrix<Exact> error = (kernel(x).template cast<Exact>() - tiny.value).cwiseAbs();
    const Matrix<Exact> steps = tiny.magnitude * kErrorFactor * kUnitRoundoff<Scalar>;
    const auto per_key = static_cast<Exact>(shape.n_k) * static_cast<Exact>(kTiny);
    CHECK((error.array() <= steps.array() + (1 + kernel.lambda(x).cwiseAbs().maxCoeff()) * per_key).all());
  }
}

}  // namespace support
