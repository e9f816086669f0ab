#pragma once

// The grid: shapes around every size at which a kernel changes what it does (a packet, a tile, a strip, a block of
// rows, a chunk of keys), with every mask, against the oracle; and in float against a naive evaluation in float.

#include <algorithm>
#include <array>
#include <iterator>
#include <vector>

#include "kernels/oracle.hpp"
#include "support/tolerances.hpp"

namespace support {

/// Every size and every d occur several times, in different company; n_q is now below and now above n_k.
inline std::vector<Shape> grid_shapes() {
  constexpr std::array<Index, 21> sizes = {1,  2,  3,  7,  8,  15,  16,  17,  31,  33, 47,
                                           48, 49, 63, 64, 65, 127, 128, 129, 255, 257};
  constexpr std::array<Index, 9> widths = {1, 3, 8, 16, 59, 64, 80, 111, 128};
  std::vector<Shape> shapes;
  for (std::size_t w = 0; w < widths.size(); ++w) {
    const Index d = widths[w];
    const std::array<Index, 4> value_widths = {1, d, 2 * d, d + (d % 2 == 0 ? 5 : 10)};
    for (std::size_t t = w % 4; t < sizes.size(); t += 4) {
      const Index n_k = sizes[(5 * t + 4 * w + 1) % sizes.size()];
      shapes.push_back({sizes[t], n_k, d, value_widths[(t / 4 + w) % 4]});
    }
  }
  // More keys than one chunk or one piece holds.
  for (const Shape& shape : {Shape{1, 1030, 16, 32}, Shape{3, 513, 64, 33}, Shape{4, 700, 8, 1}, Shape{5, 600, 59, 118},
                             Shape{26, 800, 3, 17}, Shape{50, 530, 64, 128}, Shape{300, 300, 8, 16}}) {
    shapes.push_back(shape);
  }
  // Few enough queries and keys for rows of this width to stay where they are.
  for (const Shape& shape :
       {Shape{8, 8, 64, 130}, Shape{17, 17, 130, 9}, Shape{13, 20, 260, 37}, Shape{5, 12, 33, 64}}) {
    shapes.push_back(shape);
  }
  return shapes;
}

/// Every range without a bias.
inline std::vector<RangeMask> grid_ranges() {
  return {RangeMask{FullMask{}},           RangeMask{CausalMask{}},         RangeMask{SlidingWindowMask{0}},
          RangeMask{SlidingWindowMask{1}}, RangeMask{SlidingWindowMask{5}}, RangeMask{SlidingWindowMask{100}}};
}

inline std::string describe(const RangeMask& mask) {
  if (const auto* sliding = std::get_if<SlidingWindowMask>(&mask.any)) {
    return "window " + std::to_string(sliding->window);
  }
  return std::holds_alternative<CausalMask>(mask.any) ? "causal" : "full";
}

/// Biases of order 1, a third of them -inf.
template <typename Scalar>
Matrix<Scalar> random_bias(Index n_q, Index n_k, Rng& rng) {
  Matrix<Scalar> bias = random_matrix<Scalar>(n_q, n_k, rng);
  std::uniform_int_distribution<int> three(0, 2);
  for (Index i = 0; i < bias.size(); ++i) {
    if (three(rng) == 0) bias.data()[i] = -std::numeric_limits<Scalar>::infinity();
  }
  return bias;
}

/// A naive evaluation of the same in the same precision.
template <typename Scalar, typename Kernel, typename Mask>
Matrix<Scalar> naive(const Kernel& kernel, const Operands<Scalar>& x, const Mask& mask) {
  if constexpr (Kernel::kDifferential) {
    const Vector<Scalar> lambda = kernel.lambda(x).template cast<Scalar>();
    return diffattn::reference::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, lambda, mask);
  } else {
    return diffattn::reference::attention(x.q1, x.k1, x.v, mask);
  }
}

/// Errors of a kernel and of a naive evaluation, over some shapes, masks and draws.
struct Errors {
  ErrorStatistics kernel;
  ErrorStatistics naive;
};

template <typename Scalar, typename Kernel, typename Mask>
void add_case(Errors& errors, const Kernel& kernel, const Operands<Scalar>& x, const Mask& mask,
              const Matrix<Exact>& bias) {
  const Expected expected = expect(x, kernel.lambda(x), bias);
  const Matrix<Scalar> out = kernel(x, mask);
  CHECK(worst_error<Scalar>(out, expected.value, expected.magnitude) <= kErrorFactor);
  errors.kernel.add<Scalar>(out, expected.value, expected.magnitude);
  if constexpr (std::is_same_v<Scalar, float>) {
    errors.naive.add<Scalar>(naive(kernel, x, mask), expected.value, expected.magnitude);
  }
}

/// A kernel may err half as much again as a naive evaluation. The largest error of one result is a matter of luck (one
/// large score decides it, and either can be the lucky one), so what is compared at each shape is the root mean square
/// over masks and draws; below the floor it is the noise of a handful of roundings.
inline constexpr double kNaiveFactor = 1.5;
inline constexpr double kRmsFloor = 0.7;

/// More draws where a shape has few scores, or few results to take the root mean square of.
template <typename Scalar>
Index draws(const Shape& shape) {
  const Index fewest = shape.n_q * std::min(shape.n_k, shape.dv);
  return std::is_same_v<Scalar, float> ? std::min<Index>(20, 1 + 600 / fewest) : 1;
}

/// Runs add(errors, x, rng) for every shape and draw; returns the errors of everything together.
template <typename Scalar, typename Add>
Errors check_shapes(const Add& add) {
  Errors all;
  unsigned stream = 0;
  for (const Shape& shape : grid_shapes()) {
    INFO(describe(shape));
    Errors here;
    for (Index draw = 0; draw < draws<Scalar>(shape); ++draw) {
      Rng rng = make_rng(stream++);
      add(here, random_operands<Scalar>(shape, rng), rng);
    }
    if constexpr (std::is_same_v<Scalar, float>) {
      CHECK(here.kernel.rms() <= kNaiveFactor * std::max(here.naive.rms(), kRmsFloor));
    }
    all.kernel.worst = std::max(all.kernel.worst, here.kernel.worst);
    all.naive.worst = std::max(all.naive.worst, here.naive.worst);
  }
  if constexpr (std::is_same_v<Scalar, float>) CHECK(all.kernel.worst <= kNaiveFactor * all.naive.worst);
  return all;
}

template <typename Scalar, typename Kernel>
Errors check_ranges(const Kernel& kernel) {
  return check_shapes<Scalar>([&](Errors& errors, const Operands<Scalar>& x, Rng&) {
    for (const RangeMask& mask : grid_ranges()) {
      INFO(describe(mask));
      add_case(errors, kernel, x, mask, dense(mask, x.n_q(), x.n_k()));
    }
  });
}

template <typename Scalar, typename Kernel>
Errors check_biases(const Kernel& kernel) {
  const std::array<RangeMask, 3> ranges = {{{CausalMask{}}, {FullMask{}}, {SlidingWindowMask{20}}}};
  return check_shapes<Scalar>([&](Errors& errors, const Operands<Scalar>& x, Rng& rng) {
    const Matrix<Scalar> matrix = random_bias<Scalar>(x.n_q(), x.n_k(), rng);
    const std::array<AnyBias<Scalar>, 3> biases = {
        {{AlibiBias{0.25}}, {HidingBias{x.n_k() / 2 + 1}}, {MatrixBias(matrix)}}};
    for (std::size_t b = 0; b < biases.size(); ++b) {
      const RangeMask& range = ranges[(b + static_cast<std::size_t>(x.n_q())) % ranges.size()];
      INFO("bias " << b << ", " << describe(range));
      const Matrix<Exact> both = dense(range, x.n_q(), x.n_k()) + dense(biases[b], x.n_q(), x.n_k());
      add_case(errors, kernel, x, with_bias(range, biases[b]), both);
    }
  });
}

}  // namespace support
