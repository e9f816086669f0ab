// A value that is not finite, in one of several pieces that are packed apart, or in one operand alone: that no weight
// of 0 meets it must be known for every piece and every operand.

#include "kernels/backward.hpp"
#include "support/catch.hpp"
#include "support/tolerances.hpp"

using namespace support;

namespace {

template <typename Scalar>
inline constexpr Scalar kBad = std::numeric_limits<Scalar>::quiet_NaN();

/// A key that only some rows see, in the first or the last piece of keys: the others have the clean result.
template <typename Kernel>
void check_pieces(const Kernel& kernel, const RangeMask& mask, Index key) {
  INFO("key " << key);
  const Shape shape{40, 1100, 8, 20};
  Rng rng = make_rng();
  auto x = random_operands<float>(shape, rng);
  const Matrix<Exact> bias = dense(mask, shape.n_q, shape.n_k);
  const Expected expected = expect(x, kernel.lambda(x), bias);
  x.v.row(key).setConstant(kBad<float>);
  const Matrix<float> out = kernel(x, mask);
  Index unseen = 0;
  for (Index i = 0; i < shape.n_q; ++i) {
    if (bias(i, key) != kHidden) {
      CHECK(out.row(i).array().isNaN().all());
      continue;
    }
    ++unseen;
    CHECK(worst_error<float>(out.row(i), expected.value.row(i), expected.magnitude.row(i)) <= kErrorFactor);
  }
  CHECK(unseen > 5);
  CHECK(unseen < shape.n_q - 5);
}

template <typename Kernel>
void check_pieces(const Kernel& kernel) {
  check_pieces(kernel, RangeMask{CausalMask{}}, 1080);          // seen by the last 20 queries
  check_pieces(kernel, RangeMask{SlidingWindowMask{1075}}, 5);  // by the first 20
}

Matrix<double> hide(const Shape& shape, Index first_row, Index rows, Index first_key, Index keys) {
  Matrix<double> bias = Matrix<double>::Zero(shape.n_q, shape.n_k);
  bias.block(first_row, first_key, rows, keys).setConstant(-std::numeric_limits<double>::infinity());
  return bias;
}

/// The same gradients as `clean`; NaN is equal to nothing.
void check_same(const Gradients<double>& grad, const Gradients<double>& clean) {
  for (std::size_t i = 0; i < grad.size(); ++i) {
    INFO(kGradientNames[i]);
    if (clean[i].size() == 0) continue;
    CHECK((grad[i] - clean[i]).cwiseAbs().maxCoeff() <= 1e-12 * (1 + clean[i].cwiseAbs().maxCoeff()));
  }
}

}  // namespace

TEST_CASE("NaN in one of several pieces of values reaches the rows that see it and no other") {
  check_pieces(Attention{});
  check_pieces(DiffAttention{});
}

TEST_CASE("NaN in hidden keys of one of several pieces reaches no gradient") {
  const Shape shape{40, 1100, 5, 6};
  for (const Index first : {0, 520, 1050}) {
    Rng rng = make_rng();
    auto x = random_operands<double>(shape, rng);
    const auto dout = random_matrix<double>(shape.n_q, shape.dv, rng);
    const Matrix<double> bias = hide(shape, 0, shape.n_q, first, 30);
    const auto mask = with_bias(FullMask{}, AnyBias<double>{MatrixBias(bias)});
    const Gradients<double> clean = DiffAttentionPerRowBackward{}(x, dout, mask);
    const Gradients<double> standard = AttentionBackward{}(x, dout, mask);
    for (const std::size_t operand : {0U, 1U, 2U}) {
      INFO("hidden keys from " << first << ", operand " << operand);
      Operands<double> bad = x;
      (operand == 0 ? bad.k1 : operand == 1 ? bad.k2 : bad.v).middleRows(first, 30).setConstant(kBad<double>);
      check_same(DiffAttentionPerRowBackward{}(bad, dout, mask), clean);
      check_same(AttentionBackward{}(bad, dout, mask), standard);
    }
  }
}

TEST_CASE("A row whose keys a bias hides gives no gradient, whichever of its operands is NaN") {
  // Its neighbours share tiles with it, so its operands are multiplied with weights of 0 unless that is known.
  const Shape shape{20, 30, 5, 6};
  const Index row = 7;
  Rng rng = make_rng();
  const auto x = random_operands<double>(shape, rng);
  const auto dout = random_matrix<double>(shape.n_q, shape.dv, rng);
  const Matrix<double> bias = hide(shape, row, 1, 0, shape.n_k);
  const auto mask = with_bias(FullMask{}, AnyBias<double>{MatrixBias(bias)});
  const Gradients<double> clean = DiffAttentionPerRowBackward{}(x, dout, mask);
  const Gradients<double> standard = AttentionBackward{}(x, dout, mask);
  CHECK(clean[1].allFinite());
  CHECK(clean[0].row(row).isZero(0));

  Operands<double> bad_q1 = x, bad_q2 = x, bad_lambda = x;
  bad_q1.q1.row(row).setConstant(kBad<double>);
  bad_q2.q2.row(row).setConstant(kBad<double>);
  bad_lambda.lambda[row] = kBad<double>;
  Matrix<double> bad_dout = dout;
  bad_dout.row(row).setConstant(kBad<double>);
  {
    INFO("q1");
    check_same(DiffAttentionPerRowBackward{}(bad_q1, dout, mask), clean);
    check_same(AttentionBackward{}(bad_q1, dout, mask), standard);
  }
  {
    INFO("q2");
    check_same(DiffAttentionPerRowBackward{}(bad_q2, dout, mask), clean);
  }
  {
    INFO("lambda");
    check_same(DiffAttentionPerRowBackward{}(bad_lambda, dout, mask), clean);
  }
  {
    INFO("dout");
    check_same(DiffAttentionPerRowBackward{}(x, bad_dout, mask), clean);
    check_same(AttentionBackward{}(x, bad_dout, mask), standard);
  }
}
