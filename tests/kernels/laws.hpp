#pragma once

// Laws of attention that hold without an oracle, for any kernel: check(kernel, operands) for each. Results that are
// computed the same way must be the same bits; others must agree within the error bounds of both.

#include <algorithm>
#include <random>

#include "kernels/oracle.hpp"
#include "support/tolerances.hpp"

namespace support {

template <typename Scalar, typename A, typename B>
void check_agree(const Eigen::MatrixBase<A>& a, const Eigen::MatrixBase<B>& b, const Matrix<Exact>& magnitude) {
  CHECK(worst_error<Scalar>(a, b, magnitude) <= 2 * kErrorFactor);
}

/// Rows of a map sum to 1, or to 0 where nothing is seen: constant values c give (1 − λ)·c.
struct ConstantValues {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel& kernel, Operands<Scalar> x) {
    const Vector<Scalar> c = x.v.row(0);
    x.v.rowwise() = c.transpose();
    const Vector<Exact> lambda = kernel.lambda(x);
    const Index first_seeing = std::max<Index>(0, x.n_q() - x.n_k());
    Matrix<Exact> expected = (Vector<Exact>::Ones(x.n_q()) - lambda) * c.transpose().template cast<Exact>();
    expected.topRows(first_seeing).setZero();
    const Matrix<Exact> magnitude =
        (Vector<Exact>::Ones(x.n_q()) + lambda.cwiseAbs()) * c.transpose().cwiseAbs().template cast<Exact>();
    check_agree<Scalar>(kernel(x, CausalMask{}), expected, magnitude);
  }
};

/// The order of the keys does not matter, as long as each keeps its value.
struct KeyPermutation {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel& kernel, const Operands<Scalar>& x) {
    Eigen::PermutationMatrix<Eigen::Dynamic> shuffle(x.n_k());
    shuffle.setIdentity();
    Rng rng = make_rng(7);
    std::shuffle(shuffle.indices().data(), shuffle.indices().data() + x.n_k(), rng);
    Operands<Scalar> y = x;
    y.k1 = shuffle * x.k1;
    y.k2 = shuffle * x.k2;
    y.v = shuffle * x.v;
    check_agree<Scalar>(kernel(x), kernel(y), expect_full(x, kernel.lambda(x)).magnitude);
  }
};

/// Under a causal mask what comes later changes nothing, not a bit, and NaN and Inf in it do not show.
struct CausalPrefix {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel& kernel, const Operands<Scalar>& x) {
    const Matrix<Scalar> whole = kernel(x, CausalMask{});
    const Expected expected = expect_causal(x, kernel.lambda(x));
    Rng rng = make_rng(8);
    for (const Index later : {Index{1}, Index{2}, x.n_q() / 2, x.n_q() - 1}) {
      if (later < 1 || later >= x.n_q() || later > x.n_k()) continue;
      const Index rows = x.n_q() - later;
      INFO(rows << " rows of " << x.n_q() << ", " << x.n_k() << " keys");
      Operands<Scalar> y = x;
      y.q1.bottomRows(later) = random_matrix<Scalar>(later, x.q1.cols(), rng);
      y.q2.bottomRows(later) = random_matrix<Scalar>(later, x.q2.cols(), rng);
      y.k1.bottomRows(later) = random_matrix<Scalar>(later, x.k1.cols(), rng);
      y.k2.bottomRows(later) = random_matrix<Scalar>(later, x.k2.cols(), rng);
      y.v.bottomRows(later) = random_matrix<Scalar>(later, x.v.cols(), rng);
      CHECK(identical(kernel(y, CausalMask{}).topRows(rows), whole.topRows(rows)));

      y.q1.bottomRows(later).setConstant(kNaN<Scalar>);
      y.k1.bottomRows(later).setConstant(kNaN<Scalar>);
      y.k2.bottomRows(later).setConstant(-kInf<Scalar>);
      CHECK(identical(kernel(y, CausalMask{}).topRows(rows), whole.topRows(rows)));

      // Values that are not finite may be summed another way.
      y.v.bottomRows(later).setConstant(kInf<Scalar>);
      y.v.row(x.n_k() - 1).setConstant(kNaN<Scalar>);
      CHECK(worst_error<Scalar>(kernel(y, CausalMask{}).topRows(rows), expected.value.topRows(rows),
                                expected.magnitude.topRows(rows)) <= kErrorFactor);
    }
  }
};

struct LinearInValues {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel& kernel, const Operands<Scalar>& x) {
    Rng rng = make_rng(9);
    Operands<Scalar> y = x, sum = x;
    y.v = random_matrix<Scalar>(x.v.rows(), x.v.cols(), rng);
    sum.v = Scalar(2) * x.v - Scalar(0.5) * y.v;
    const Vector<Exact> lambda = kernel.lambda(x);
    const Matrix<Exact> magnitude =
        2 * expect_causal(x, lambda).magnitude + Exact(0.5) * expect_causal(y, lambda).magnitude;
    const Matrix<Scalar> combined = Scalar(2) * kernel(x, CausalMask{}) - Scalar(0.5) * kernel(y, CausalMask{});
    check_agree<Scalar>(kernel(sum, CausalMask{}), combined, magnitude);
  }
};

/// Adding one number to all scores of a row changes nothing.
struct ScoreShift {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel& kernel, const Operands<Scalar>& x) {
    const Vector<Scalar> shift = Vector<Scalar>::LinSpaced(x.n_q(), Scalar(-3), Scalar(4));
    const Matrix<Scalar> bias = shift.replicate(1, x.n_k());
    check_agree<Scalar>(kernel(x, with_bias(FullMask{}, MatrixBias(bias))), kernel(x),
                        expect_full(x, kernel.lambda(x)).magnitude);
  }
};

/// A window that reaches back to the first key is the causal mask, to the bit.
struct WideWindow {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel& kernel, const Operands<Scalar>& x) {
    const Matrix<Scalar> causal = kernel(x, CausalMask{});
    for (const Index window : {x.n_k(), x.n_k() + 1, std::numeric_limits<Index>::max()}) {
      CHECK(identical(kernel(x, SlidingWindowMask{window}), causal));
    }
  }
};

/// Padding that a bias hides might as well not be there.
struct Padding {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel& kernel, const Operands<Scalar>& x) {
    const Index valid = x.n_k() / 2 + 1;
    Operands<Scalar> y = x;
    y.k1 = x.k1.topRows(valid);
    y.k2 = x.k2.topRows(valid);
    y.v = x.v.topRows(valid);
    check_agree<Scalar>(kernel(x, with_bias(FullMask{}, HidingBias{valid})), kernel(y),
                        expect_full(y, kernel.lambda(y)).magnitude);
  }
};

/// A negative scale is that of negated queries, and any scale one of scaled queries.
struct Scale {
  template <typename Kernel, typename Scalar>
  static void check(const Kernel& kernel, const Operands<Scalar>& x) {
    Operands<Scalar> y = x;
    y.q1 = -x.q1;
    y.q2 = -x.q2;
    CHECK(identical(kernel(x, CausalMask{}, {.scale = -0.125}), kernel(y, CausalMask{}, {.scale = 0.125})));
    y.q1 = x.q1 * Scalar(1024);
    y.q2 = x.q2 * Scalar(1024);
    CHECK(identical(kernel(x, CausalMask{}, {.scale = 128}), kernel(y, CausalMask{}, {.scale = 0.125})));
  }
};

/// All of the above for shapes on every path of the kernels: a few rows, one block and chunk, several of both.
template <typename Scalar, typename Kernel, typename... Laws>
void check_laws(const Kernel& kernel) {
  unsigned stream = 0;
  for (const Shape& shape :
       {Shape{1, 9, 4, 5}, Shape{3, 3, 8, 16}, Shape{4, 530, 8, 3}, Shape{20, 20, 3, 7}, Shape{15, 15, 70, 20},
        Shape{50, 33, 16, 20}, Shape{30, 300, 8, 18}, Shape{270, 270, 8, 4}}) {
    INFO(describe(shape));
    Rng rng = make_rng(stream++);
    const auto x = random_operands<Scalar>(shape, rng);
    (Laws::check(kernel, x), ...);
  }
}

template <typename Scalar, typename Kernel>
void check_all_laws(const Kernel& kernel) {
  check_laws<Scalar, Kernel, ConstantValues, KeyPermutation, CausalPrefix, LinearInValues, ScoreShift, WideWindow,
             Padding, Scale>(kernel);
}

}  // namespace support
