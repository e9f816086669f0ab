// The backward kernels against recorded gradients of the official code, against the oracle, and against naive float.

#include <filesystem>

#include "diffattn/io/safetensors.hpp"
#include "kernels/backward.hpp"
#include "kernels/grid.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"

using namespace support;

namespace {

/// Relative to the whole gradient: single entries cancel. The worst of a few hundred draws is 7e-15 in double.
constexpr double kDoubleBound = 5e-14;

struct Comparison {
  double kernel = 0;  // Σ squared relative errors
  double naive = 0;
};

/// Shapes around a tile, a block of rows, a strip and a chunk, and enough blocks for several parts.
std::vector<Shape> shapes() {
  return {{1, 1, 1, 1},      {2, 3, 5, 4},     {7, 1, 8, 8},    {12, 33, 16, 32}, {23, 40, 3, 70},
          {24, 24, 64, 128}, {25, 31, 17, 9},  {48, 64, 32, 1}, {50, 20, 8, 33},  {13, 300, 40, 12},
          {96, 130, 24, 40}, {100, 20, 8, 33}, {97, 257, 5, 6}, {450, 90, 8, 16}, {1600, 200, 2, 3}};
}

template <typename Scalar, typename Kernel, typename Mask>
void compare(Comparison& sum, const Kernel& kernel, const Operands<Scalar>& x, const Matrix<Scalar>& dout,
             const Mask& mask, const Matrix<Exact>& bias) {
  const Gradients<Exact> expected = expect_gradients(kernel, x, dout, bias);
  const Exact magnitude = expect_gradients(DiffAttentionPerRowBackward{}, x, dout, bias)[5].cwiseAbs().sum();
  const double error = gradient_error(kernel(x, dout, mask), expected, magnitude);
  if constexpr (std::is_same_v<Scalar, double>) {
    CHECK(error <= kDoubleBound);
  } else {
    const double naive = gradient_error(Kernel::reference(x, dout, erase<Scalar>(mask)), expected, magnitude);
    CHECK(error <= 2 * std::max(naive, 4e-7));  // a handful of roundings is a matter of luck
    sum.kernel += error * error;
    sum.naive += naive * naive;
  }
}

template <typename Scalar, typename Kernel>
void check_grid(const Kernel& kernel) {
  Comparison sum;
  unsigned stream = 0;
  for (const Shape& shape : shapes()) {
    Rng rng = make_rng(stream++);
    const auto x = random_operands<Scalar>(shape, rng);
    const auto dout = random_matrix<Scalar>(shape.n_q, shape.dv, rng);
    for (const RangeMask& mask : {RangeMask{FullMask{}}, RangeMask{CausalMask{}}, RangeMask{SlidingWindowMask{5}}}) {
      INFO(describe(shape) << ", " << describe(mask));
      compare(sum, kernel, x, dout, mask, dense(mask, shape.n_q, shape.n_k));
    }
    const Matrix<Scalar> matrix = random_bias<Scalar>(shape.n_q, shape.n_k, rng);
    for (const AnyBias<Scalar>& added : {AnyBias<Scalar>{MatrixBias(matrix)}, AnyBias<Scalar>{AlibiBias{0.25}}}) {
      INFO(describe(shape) << ", a bias");
      const RangeMask range{CausalMask{}};
      compare(sum, kernel, x, dout, with_bias(range, added),
              dense(range, shape.n_q, shape.n_k) + dense(added, shape.n_q, shape.n_k));
    }
  }
  // The issue allows float32 twice the error of a naive evaluation.
  if constexpr (std::is_same_v<Scalar, float>) CHECK(std::sqrt(sum.kernel) <= 1.2 * std::sqrt(sum.naive));
}

}  // namespace

TEMPLATE_TEST_CASE("attention_backward agrees with the oracle", "", DIFFATTN_TEST_SCALARS) {
  check_grid<TestType>(AttentionBackward{});
}

TEMPLATE_TEST_CASE("diff_attention_backward agrees with the oracle", "", DIFFATTN_TEST_SCALARS) {
  check_grid<TestType>(DiffAttentionBackward{});
  check_grid<TestType>(DiffAttentionPerRowBackward{});
}

TEST_CASE("diff_attention_backward agrees with the official implementation") {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(DIFFATTN_TEST_DATA "/golden")) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("op_", 0) != 0) continue;
    INFO(name);
    ++files;
    const diffattn::Safetensors file(entry.path());
    const Operands<double> x{
        file.matrix<double>("q1"), file.matrix<double>("k1"),
        file.matrix<double>("q2"), file.matrix<double>("k2"),
        file.matrix<double>("v"),  Vector<double>::Constant(1, std::stod(file.metadata().at("lambda")))};
    RangeMask mask{FullMask{}};
    if (file.metadata().at("mask") == "causal") mask.any = CausalMask{};
    if (file.metadata().at("mask") == "sliding_window") {
      mask.any = SlidingWindowMask{std::stol(file.metadata().at("window"))};
    }
    const Matrix<double> dout = file.matrix<double>("dout");
    const Gradients<double> result = DiffAttentionBackward{}(x, dout, mask);
    const Gradients<double> plain = DiffAttentionBackward::reference(x, dout, mask);
    for (std::size_t i = 0; i < result.size(); ++i) {
      INFO(kGradientNames[i]);
      const Matrix<double> expected = file.matrix<double>(kGradientNames[i]);
      const double bound = 1e-9 * expected.cwiseAbs().maxCoeff();
      REQUIRE(expected.size() == result[i].size());
      for (Index e = 0; e < expected.size(); ++e) {
        REQUIRE(std::abs(result[i].data()[e] - expected.data()[e]) <= bound);
        REQUIRE(std::abs(plain[i].data()[e] - expected.data()[e]) <= bound);
      }
    }
  }
  CHECK(files == 6);
}
