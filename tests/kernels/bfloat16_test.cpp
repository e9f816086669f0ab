// Operands of bfloat16: scores, softmax and the difference of the maps in float, its weights rounded once. Against an
// evaluation in double of the same operands, on every path of the kernels; against what a composition of stock kernels
// loses; and numbers at the end of their range.

#include <algorithm>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/kernels/attention.hpp>
#include <diffattn/kernels/decode.hpp>
#include <diffattn/kernels/diff_attention.hpp>
#include <limits>
#include <string>
#include <vector>

#include "kernels/grid.hpp"
#include "kernels/pages.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"

using namespace support;
using diffattn::Heads;
using diffattn::Workspace;

namespace {

using Half = Eigen::bfloat16;
/// Half a unit in the last of 8 bits.
constexpr double kHalfRoundoff = 1.0 / 256;

template <typename Scalar>
Matrix<Scalar> widened(const Matrix<Half>& m) {
  return m.cast<float>().cast<Scalar>();
}

template <typename Scalar>
Operands<Scalar> widened(const Operands<Half>& x) {
  return {widened<Scalar>(x.q1), widened<Scalar>(x.k1), widened<Scalar>(x.q2),
          widened<Scalar>(x.k2), widened<Scalar>(x.v),  {}};
}

/// λ is float: it is not an operand that is multiplied in bfloat16.
Operands<Half> random_halves(const Shape& shape, Rng& rng) { return random_operands<Half>(shape, rng); }

/// What is attended with: one type of executor, so that each kernel is compiled once.
template <typename Out, typename Mask>
Out differential(const Operands<Half>& x, const Matrix<float>& lambda, const Mask& mask) {
  Out out(x.n_q(), x.v.cols());
  Workspace workspace;
  diffattn::Serial serial;
  diffattn::diff_attention_into(out, x.q1, x.k1, x.q2, x.k2, x.v, lambda, mask, {}, workspace, AnyExecutor(serial));
  return out;
}

template <typename Out, typename Mask>
Out standard(const Operands<Half>& x, const Mask& mask) {
  Out out(x.n_q(), x.v.cols());
  Workspace workspace;
  diffattn::Serial serial;
  diffattn::attention_into(out, x.q1, x.k1, x.v, mask, {}, workspace, AnyExecutor(serial));
  return out;
}

/// The exact result, and what rounding may make of it: a weight of A = P1 − λ·P2 that is off by 2^-8 of itself, and
/// float's own error, which is one of P1 and P2.
struct HalfExpected {
  Matrix<double> value, weights, magnitude;
};

template <typename Mask>
HalfExpected expect_half(const Operands<Half>& halves, const Matrix<float>& lambda, const Mask& mask) {
  const Operands<double> x = widened<double>(halves);
  const Matrix<double> p1 = diffattn::reference::attention_map(x.q1, x.k1, mask);
  const Matrix<double> p2 = lambda.size() == 0 ? Matrix<double>::Zero(x.n_q(), x.n_k()).eval()
                                               : diffattn::reference::attention_map(x.q2, x.k2, mask);
  const Matrix<double> noise = lambda.size() == 0 ? p2 : (lambda.cast<double>().col(0).asDiagonal() * p2).eval();
  const Matrix<double> a = p1 - noise;
  return {a * x.v, a.cwiseAbs() * x.v.cwiseAbs(), (p1 + noise.cwiseAbs()) * x.v.cwiseAbs()};
}

/// The largest error, as a part of what rounding allows.
double excess(const Matrix<float>& out, const HalfExpected& expected) {
  const auto allowed = 1.02 * kHalfRoundoff * expected.weights.array() + 100 * 0x1p-24 * expected.magnitude.array() +
                       std::numeric_limits<float>::min();
  return ((out.cast<double>() - expected.value).array().abs() / allowed).maxCoeff();
}

/// One shape and more for each path: a handful, few rows in place, blocks; odd widths, odd numbers of keys, chunks.
std::vector<Shape> half_shapes() {
  return {{1, 1, 1, 1},     {2, 3, 5, 4},   {7, 8, 33, 17},   {12, 12, 64, 128}, {1, 300, 16, 33},  {3, 701, 7, 5},
          {40, 61, 16, 24}, {13, 33, 1, 1}, {50, 601, 9, 20}, {64, 256, 64, 65}, {97, 513, 31, 70}, {5, 31, 130, 3}};
}

template <typename Mask>
void check_half(const Operands<Half>& x, const Matrix<float>& lambda, const Mask& mask) {
  CHECK(excess(differential<Matrix<float>>(x, lambda, mask), expect_half(x, lambda, mask)) <= 1);
  CHECK(excess(standard<Matrix<float>>(x, mask), expect_half(x, Matrix<float>(), mask)) <= 1);
}

}  // namespace

TEST_CASE("bfloat16 operands on every path and under every mask") {
  Rng rng = make_rng();
  for (const Shape& shape : half_shapes()) {
    INFO(describe(shape));
    const Operands<Half> x = random_halves(shape, rng);
    const auto lambda = random_matrix<float>(shape.n_q, 1, rng);
    for (const RangeMask& mask : grid_ranges()) {
      INFO(describe(mask));
      check_half(x, lambda, mask);
    }
    const Matrix<float> biases = random_bias<float>(shape.n_q, shape.n_k, rng);
    const RangeMask causal{CausalMask{}};
    check_half(x, lambda, with_bias(causal, AnyBias<float>{MatrixBias(biases)}));
    check_half(x, lambda, with_bias(causal, AnyBias<float>{AlibiBias{0.25}}));
  }
}

TEST_CASE("An output of bfloat16 is that of float, rounded once") {
  Rng rng = make_rng();
  for (const Shape& shape : half_shapes()) {
    INFO(describe(shape));
    const Operands<Half> x = random_halves(shape, rng);
    const auto lambda = random_matrix<float>(shape.n_q, 1, rng);
    const RangeMask mask{CausalMask{}};
    CHECK(identical(widened<float>(differential<Matrix<Half>>(x, lambda, mask)),
                    widened<float>(differential<Matrix<float>>(x, lambda, mask).cast<Half>())));
    CHECK(identical(widened<float>(standard<Matrix<Half>>(x, mask)),
                    widened<float>(standard<Matrix<float>>(x, mask).cast<Half>())));
  }
}

TEST_CASE("bfloat16 operands in any storage") {
  Rng rng = make_rng();
  const Shape shape{37, 301, 18, 35};
  const Operands<Half> x = random_halves(shape, rng);
  const auto lambda = random_matrix<float>(shape.n_q, 1, rng);
  const RangeMask mask{SlidingWindowMask{100}};
  const Matrix<float> expected = differential<Matrix<float>>(x, lambda, mask);
  using Columns = Eigen::Matrix<Half, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;
  using Any = Eigen::Ref<const Columns, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;
  Columns q1 = x.q1, k1 = x.k1, q2 = x.q2, k2 = x.k2, v = x.v;
  Workspace workspace;
  diffattn::Serial serial;
  Eigen::MatrixXf out(shape.n_q, shape.dv);
  diffattn::diff_attention_into(out, Any(q1), Any(k1), Any(q2), Any(k2), Any(v), lambda, mask, {}, workspace,
                                AnyExecutor(serial));
  CHECK(identical(out, expected));
}

TEST_CASE("Threads and heads change no bit of bfloat16 results, and scratch is taken once") {
  Rng rng = make_rng();
  const Index n_q = 60, n_k = 530, d = 16, dv = 24;
  const RangeMask mask{CausalMask{}};
  for (const Index num_noise_heads : {4, 2}) {
    const Heads heads{4, 2, num_noise_heads};
    const auto q = random_matrix<Half>(n_q, heads.query_heads() * d, rng), k = random_matrix<Half>(n_k, 4 * d, rng);
    const auto v = random_matrix<Half>(n_k, 2 * dv, rng);
    const auto lambda = random_matrix<float>(n_q, 4, rng);
    Matrix<float> out(n_q, 4 * dv), other = out;
    Workspace workspace;
    diffattn::Serial serial;
    diffattn::ThreadPool pool(3);
    diffattn::multihead_diff_attention_into(out, q, k, v, lambda, heads, mask, {}, workspace, AnyExecutor(serial));
    diffattn::multihead_diff_attention_into(other, q, k, v, lambda, heads, mask, {}, workspace, AnyExecutor(pool));
    CHECK(identical(out, other));
    for (Index h = 0; h < 4; ++h) {
      Operands<Half> x;
      x.q1 = q.middleCols(heads.query_head(h, 0) * d, d);
      x.q2 = q.middleCols(heads.query_head(h, 1) * d, d);
      x.k1 = k.middleCols(h / 2 * 2 * d, d);
      x.k2 = k.middleCols((h / 2 * 2 + 1) * d, d);
      x.v = v.middleCols(h / 2 * dv, dv);
      CHECK(identical(out.middleCols(h * dv, dv), differential<Matrix<float>>(x, lambda.col(h), mask)));
    }
    diffattn::multihead_diff_attention_into(out, q, k, v, lambda, heads, mask, {}, workspace, AnyExecutor(serial));
    const std::size_t capacity = workspace.capacity();
    diffattn::multihead_diff_attention_into(out, q, k, v, lambda, heads, mask, {}, workspace, AnyExecutor(serial));
    CHECK(workspace.capacity() == capacity);
  }
}

TEST_CASE("Maps that share keys of bfloat16, as DIFF V2 has them") {
  Rng rng = make_rng();
  for (const Shape& shape : {Shape{3, 270, 16, 16}, Shape{60, 270, 16, 16}}) {
    Operands<Half> x = random_halves(shape, rng);
    x.k2 = x.k1;
    const auto lambda = random_matrix<float>(shape.n_q, 1, rng);
    Matrix<Half> q(shape.n_q, 2 * shape.d);
    q << x.q1, x.q2;
    Matrix<float> out(shape.n_q, shape.dv);
    Workspace workspace;
    diffattn::Serial serial;
    const RangeMask mask{CausalMask{}};
    diffattn::multihead_diff_attention_into(out, q, x.k1, x.v, lambda, Heads{1, 1}, mask, {}, workspace,
                                            AnyExecutor(serial));
    CHECK(excess(out, expect_half(x, lambda, mask)) <= 1);
  }
}

TEST_CASE("What a mask hides never leaks into bfloat16 results, and what it shows does") {
  Rng rng = make_rng();
  constexpr float kNaNs[] = {kNaN<float>, kInf<float>};
  for (const Shape& shape : {Shape{5, 6, 4, 3}, Shape{2, 303, 8, 5}, Shape{40, 303, 9, 34}}) {
    INFO(describe(shape));
    const RangeMask causal{CausalMask{}};
    const auto lambda = random_matrix<float>(shape.n_q, 1, rng);
    const Operands<Half> x = random_halves(shape, rng);
    const Matrix<float> expected = differential<Matrix<float>>(x, lambda, causal);
    for (const float bad : kNaNs) {
      // The last key, which the last query alone sees; the one before it, which is the other of its pair or not.
      for (const Index key : {shape.n_k - 1, shape.n_k - 2}) {
        const Index seeing = shape.n_k - key;
        if (seeing > shape.n_q) continue;
        Operands<Half> y = x;
        y.k1.row(key).setConstant(static_cast<Half>(bad));
        y.v.row(key).setConstant(static_cast<Half>(bad));
        const Matrix<float> out = differential<Matrix<float>>(y, lambda, causal);
        CHECK(out.topRows(shape.n_q - seeing).isApprox(expected.topRows(shape.n_q - seeing), 0.02f));
        CHECK(out.topRows(shape.n_q - seeing).allFinite());
        CHECK_FALSE(out.bottomRows(seeing).array().isFinite().any());
      }
    }
    // A query that sees nothing.
    const RangeMask none{SlidingWindowMask{0}};
    CHECK(differential<Matrix<float>>(x, lambda, none).isZero(0));
    CHECK(standard<Matrix<Half>>(x, RangeMask{PaddingMask{0}}).cast<float>().isZero(0));
    // Biases of -inf hide as ranges do.
    Operands<Half> y = x;
    y.v.row(1).setConstant(static_cast<Half>(kNaN<float>));
    y.k2.row(1).setConstant(static_cast<Half>(kNaN<float>));
    Matrix<float> biases = Matrix<float>::Zero(shape.n_q, shape.n_k);
    biases.col(1).setConstant(-kInf<float>);
    const auto hiding = with_bias(RangeMask{FullMask{}}, AnyBias<float>{MatrixBias(biases)});
    const Matrix<float> without = differential<Matrix<float>>(y, lambda, hiding);
    CHECK(without.allFinite());
    CHECK(excess(differential<Matrix<float>>(x, lambda, hiding), expect_half(x, lambda, hiding)) <= 1);
    CHECK(without.isApprox(differential<Matrix<float>>(x, lambda, hiding), 0.02f));
  }
}

TEST_CASE("A handful of bfloat16 numbers by hand") {
  // Two keys of scores ln 3 and 0: P1 = (3/4, 1/4), of scores 0 and 0: P2 = (1/2, 1/2); λ = 1/2 leaves (1/2, 0).
  Matrix<Half> q1(1, 1), k1(2, 1), q2(1, 1), k2(2, 1), v(2, 1);
  q1 << Half(1.0f);
  k1 << Half(1.1015625f), Half(0.0f);  // ln 3 = 1.0986 rounded
  q2 << Half(1.0f);
  k2 << Half(0.0f), Half(0.0f);
  v << Half(8.0f), Half(1.0f);
  Matrix<Half> out(1, 1);
  Workspace workspace;
  diffattn::Serial serial;
  diffattn::diff_attention_into(out, q1, k1, q2, k2, v, Half(0.5f), RangeMask{FullMask{}}, {}, workspace,
                                AnyExecutor(serial));
  CHECK(static_cast<float>(out(0, 0)) == Approx(4.0f).epsilon(0.01));
  static_assert(std::is_same_v<decltype(diffattn::attention(q1, k1, v)), Matrix<Half>>);
}

namespace {

/// What a composition of stock kernels returns, as PyTorch has them on a CPU: each attention returns bfloat16, and so do
/// the product with λ and the subtraction. rounded_weights: 2^(score − largest) is rounded before it meets the values,
/// as there; else nothing else is rounded than what is returned. `maps` in double: the kernels' other errors are left
/// out.
Matrix<float> composed(const Matrix<double> (&maps)[2], double lambda, const Matrix<double>& v, bool rounded_weights) {
  const auto half = [](const Matrix<double>& m) { return m.cast<float>().cast<Half>().cast<float>().eval(); };
  const auto attended = [&](const Matrix<double>& p) {
    if (!rounded_weights) return half(p * v);
    const Vector<double> largest = p.rowwise().maxCoeff();
    const Matrix<double> weights = half(largest.cwiseInverse().asDiagonal() * p).cast<double>();
    return half(largest.asDiagonal() * weights * v);
  };
  const Matrix<float> noise = half(lambda * attended(maps[1]).cast<double>());
  return half((attended(maps[0]) - noise).cast<double>());
}

/// Absolute errors of all elements.
struct HalfErrors {
  std::vector<double> of_float, of_half, of_composition, of_composition_of_exact_maps;

  static void add(std::vector<double>& errors, const Matrix<float>& out, const Matrix<double>& exact) {
    const Matrix<double> difference = (out.cast<double>() - exact).cwiseAbs();
    errors.insert(errors.end(), difference.data(), difference.data() + difference.size());
  }
  static double quantile(std::vector<double>& errors, double p) {
    std::sort(errors.begin(), errors.end());
    return errors.at(static_cast<std::size_t>(p * static_cast<double>(errors.size() - 1)));
  }
};

/// noise: how far q2 and k2 are from q1 and k1; 0: they are others.
HalfErrors errors_of_composition(double lambda, float noise, Rng& rng) {
  HalfErrors errors;
  for (const Shape& shape : {Shape{96, 384, 64, 128}, Shape{48, 700, 128, 32}}) {
    Operands<Half> x = random_halves(shape, rng);
    if (noise != 0) {
      x.q2 = (widened<float>(x.q1) + noise * random_matrix<float>(shape.n_q, shape.d, rng)).cast<Half>();
      x.k2 = (widened<float>(x.k1) + noise * random_matrix<float>(shape.n_k, shape.d, rng)).cast<Half>();
    }
    const Operands<double> exact = widened<double>(x);
    const Matrix<double> maps[2] = {diffattn::reference::attention_map(exact.q1, exact.k1, FullMask{}),
                                    diffattn::reference::attention_map(exact.q2, exact.k2, FullMask{})};
    const Matrix<double> value = (maps[0] - lambda * maps[1]) * exact.v;
    const Matrix<float> lambdas = Matrix<float>::Constant(shape.n_q, 1, static_cast<float>(lambda));
    const RangeMask full{FullMask{}};
    HalfErrors::add(errors.of_float, differential<Matrix<float>>(x, lambdas, full), value);
    HalfErrors::add(errors.of_half, widened<float>(differential<Matrix<Half>>(x, lambdas, full)), value);
    HalfErrors::add(errors.of_composition, composed(maps, lambda, exact.v, true), value);
    HalfErrors::add(errors.of_composition_of_exact_maps, composed(maps, lambda, exact.v, false), value);
  }
  return errors;
}

}  // namespace

TEST_CASE("bfloat16 errors against a composition of stock kernels", "[accuracy]") {
  Rng rng = make_rng();
  for (const double lambda : {0.25, 0.75, 1.0}) {  // of which bfloat16 loses nothing
    HalfErrors errors = errors_of_composition(lambda, 0, rng);
    for (const double p : {0.5, 0.95}) {
      INFO("lambda " << lambda << ", quantile " << p);
      CHECK(errors.quantile(errors.of_half, p) <= errors.quantile(errors.of_composition, p));
      // Were weights not rounded at all, a small λ would leave the composition one rounding, as many as we have.
      if (lambda < 0.75) continue;
      CHECK(errors.quantile(errors.of_float, p) <= errors.quantile(errors.of_composition_of_exact_maps, p));
    }
  }
  HalfErrors close = errors_of_composition(1.0, 0.125f, rng);
  for (const double p : {0.5, 0.95}) {
    INFO("maps that cancel, quantile " << p);
    CHECK(2 * close.quantile(close.of_half, p) <= close.quantile(close.of_composition_of_exact_maps, p));
    CHECK(2 * close.quantile(close.of_half, p) <= close.quantile(close.of_composition, p));
  }
}

TEST_CASE("Queries of bfloat16 against pages of bfloat16") {
  Rng rng = make_rng();
  for (const Shape& shape :
       {Shape{1, 1, 2, 1}, Shape{1, 601, 16, 33}, Shape{4, 300, 7, 5}, Shape{31, 515, 9, 40}, Shape{70, 600, 16, 32}}) {
    for (const Index page_size : {32, 256, 1024}) {
      INFO(describe(shape) << ", pages of " << page_size);
      const Operands<Half> x = random_halves(shape, rng);
      const auto lambda = random_matrix<float>(shape.n_q, 1, rng);
      Matrix<Half> q(shape.n_q, 2 * shape.d), k(shape.n_k, 2 * shape.d);
      q << x.q1, x.q2;
      k << x.k1, x.k2;
      const Pages<Half> pages(k, x.v, 1, 2, rng, page_size);
      for (const RangeMask& mask : {RangeMask{CausalMask{}}, RangeMask{SlidingWindowMask{101}}}) {
        Matrix<float> out(shape.n_q, shape.dv);
        Workspace workspace;
        diffattn::Serial serial;
        diffattn::decode_diff_attention_into(out, q, pages.packed, lambda, Heads{1, 1}, mask, {}, workspace,
                                             AnyExecutor(serial));
        CHECK(excess(out, expect_half(x, lambda, mask)) <= 1);
      }
    }
  }
}

TEST_CASE("A row of a page of bfloat16 that was there before is not read") {
  Rng rng = make_rng();
  const Index d = 8, dv = 5;
  const auto k = random_matrix<Half>(3, 2 * d, rng), q = random_matrix<Half>(6, 2 * d, rng);
  auto v = random_matrix<Half>(3, dv, rng);
  Matrix<Half> bad = v;
  bad.row(1).setConstant(static_cast<Half>(kNaN<float>));
  Pages<Half> pages(k, bad, 1, 2, rng);
  namespace detail = diffattn::detail;
  // The first token again, as after truncate(0): the others are not there, whatever they were.
  pack_into_page(*pages.pages[0], pages.packed.shape, 0, 0, detail::view_of(k).middle_rows(0, 1),
                 detail::view_of(v).middle_rows(0, 1));
  pages.packed.n_k = 1;
  for (const Index n_q : {1, 6}) {
    Matrix<float> out(n_q, dv);
    Workspace workspace;
    diffattn::Serial serial;
    const Matrix<Half> some = q.topRows(n_q);
    const auto lambda = random_matrix<float>(n_q, 1, rng);
    diffattn::decode_diff_attention_into(out, some, pages.packed, lambda, Heads{1, 1}, RangeMask{FullMask{}}, {},
                                         workspace, AnyExecutor(serial));
    CHECK(out.allFinite());
  }
}
