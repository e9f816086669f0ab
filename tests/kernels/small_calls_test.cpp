// Small calls of every shape: 1 to 40 queries and keys, d and dv from 1 to 130, every mask, values and gradients. Most
// calls in a test or a first program are such, and each of them takes a path that a benchmark never sees. At every
// width of packet (DIFFATTN_PACKET_BYTES) and under sanitizers, an offset that is not a whole packet shows.

#include "kernels/backward.hpp"
#include "kernels/grid.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"

using namespace support;

namespace {

/// Calls f(shape, rng) for `count` random shapes, small ones as often as large ones.
template <typename F>
void for_small_shapes(int count, const F& f) {
  Rng rng = make_rng();
  const auto up_to = [&](double most) {
    return static_cast<Index>(std::exp2(std::uniform_real_distribution<double>(0, std::log2(most + 1))(rng)));
  };
  for (int i = 0; i < count; ++i) {
    const Shape shape{up_to(40), up_to(40), up_to(130), up_to(130)};
    INFO(describe(shape));
    f(shape, rng);
  }
}

template <typename Scalar>
RangeMask random_range(const Shape& shape, Rng& rng) {
  switch (rng() % 3) {
    case 0:
      return {FullMask{}};
    case 1:
      return {CausalMask{}};
    default:
      return {SlidingWindowMask{static_cast<Index>(rng() % static_cast<std::uint64_t>(shape.n_k + 1))}};
  }
}

template <typename Scalar, typename Kernel, typename Mask>
void check_values(const Kernel& kernel, const Operands<Scalar>& x, const Mask& mask, const Matrix<Exact>& bias) {
  const Expected expected = expect(x, kernel.lambda(x), bias);
  CHECK(worst_error<Scalar>(kernel(x, mask), expected.value, expected.magnitude) <= kErrorFactor);
}

template <typename Scalar, typename Kernel, typename Mask>
void check_gradients(const Kernel& kernel, const Operands<Scalar>& x, const Matrix<Scalar>& dout, const Mask& mask,
                     const Matrix<Exact>& bias) {
  const Gradients<Exact> expected = expect_gradients(kernel, x, dout, bias);
  const Exact magnitude = expect_gradients(DiffAttentionPerRowBackward{}, x, dout, bias)[5].cwiseAbs().sum();
  const Gradients<Scalar> ours = kernel(x, dout, mask);
  for (std::size_t i = 0; i < ours.size(); ++i) {
    if (ours[i].size() == 0) continue;
    INFO(kGradientNames[i]);
    // One visible key has no gradient of its score: what is left is the rounding of dout·v.
    const Exact scale = i == 5 ? magnitude : dout.norm() * (x.v.norm() + 1) * (x.q1.norm() + x.k1.norm() + 1);
    CHECK((ours[i].template cast<Exact>() - expected[i]).norm() <= 8 * kUnitRoundoff<Scalar> * (scale + 1));
  }
}

}  // namespace

TEMPLATE_TEST_CASE("Small calls of every shape and mask", "[kernels][small]", DIFFATTN_TEST_SCALARS) {
  for_small_shapes(250, [](const Shape& shape, Rng& rng) {
    const auto x = random_operands<TestType>(shape, rng);
    const RangeMask range = random_range<TestType>(shape, rng);
    const Matrix<Exact> seen = dense(range, shape.n_q, shape.n_k);
    check_values(Attention{}, x, range, seen);
    check_values(DiffAttentionPerRow{}, x, range, seen);

    const Matrix<TestType> matrix = random_bias<TestType>(shape.n_q, shape.n_k, rng);
    const AnyBias<TestType> bias{MatrixBias(matrix)};
    const Matrix<Exact> both = seen + dense(bias, shape.n_q, shape.n_k);
    check_values(Attention{}, x, with_bias(range, bias), both);
    check_values(DiffAttentionPerRow{}, x, with_bias(range, bias), both);
  });
}

TEMPLATE_TEST_CASE("Gradients of small calls of every shape and mask", "[kernels][small]", DIFFATTN_TEST_SCALARS) {
  for_small_shapes(80, [](const Shape& shape, Rng& rng) {
    const auto x = random_operands<TestType>(shape, rng);
    const Matrix<TestType> dout = random_matrix<TestType>(shape.n_q, shape.dv, rng);
    const RangeMask range = random_range<TestType>(shape, rng);
    const Matrix<Exact> seen = dense(range, shape.n_q, shape.n_k);
    check_gradients(AttentionBackward{}, x, dout, range, seen);
    check_gradients(DiffAttentionPerRowBackward{}, x, dout, range, seen);
    const AnyBias<TestType> alibi{AlibiBias{0.25}};
    check_gradients(DiffAttentionPerRowBackward{}, x, dout, with_bias(range, alibi),
                    seen + dense(alibi, shape.n_q, shape.n_k));
  });
}

TEST_CASE("Which packets these tests ran with", "[kernels][small]") {
  const std::string packets = std::to_string(sizeof(diffattn::simd::Packet<float>)) + "-byte packets";
#ifdef DIFFATTN_PACKET_BYTES
  WARN(packets << " of the compiler's own vectors, with every alignment checked");
  CHECK(sizeof(diffattn::simd::Packet<float>) == DIFFATTN_PACKET_BYTES);
#else
  WARN(packets << " of Eigen: " << Eigen::SimdInstructionSetsInUse());
#if defined(__AVX512F__)
  CHECK(sizeof(diffattn::simd::Packet<float>) == 64);
#elif defined(__AVX2__)
  CHECK(sizeof(diffattn::simd::Packet<float>) == 32);
#endif
#endif
}
