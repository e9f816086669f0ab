// What holds for gradients without an oracle of them: finite differences of the forward reference, the adjoint law,
// the laws of the forward pass carried over, threads, views, several heads, edges and refusals.

#include "diffattn/core/parallel_threads.hpp"
#include "kernels/backward.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numerical_gradient.hpp"
#include "support/throws.hpp"

using namespace support;
using diffattn::Heads;
using diffattn::Workspace;

namespace {

struct Problem {
  explicit Problem(const Shape& shape, unsigned stream = 0) {
    Rng rng = make_rng(stream);
    x = random_operands<double>(shape, rng);
    dout = random_matrix<double>(shape.n_q, shape.dv, rng);
  }
  Operands<double> x;
  Matrix<double> dout;
};

/// Σ dout ∘ diff_attention(x), by the reference.
template <typename Mask>
double loss(const Operands<double>& x, const Matrix<double>& dout, const Mask& mask, const AttentionOptions& options) {
  return diffattn::reference::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, x.lambda, mask, options)
      .cwiseProduct(dout)
      .sum();
}

template <typename Mask>
void check_derivatives(const Shape& shape, const Mask& mask, const AttentionOptions& options = {}) {
  INFO(describe(shape));
  Problem p(shape);
  const Gradients<double> grad = DiffAttentionPerRowBackward{}(p.x, p.dout, mask, options);
  const auto check = [&](auto& operand, const Matrix<double>& gradient) {
    CHECK(excess(gradient, numerical_gradient(operand, [&] { return loss(p.x, p.dout, mask, options); })) <= 0);
  };
  check(p.x.q1, grad[0]);
  check(p.x.k1, grad[1]);
  check(p.x.q2, grad[2]);
  check(p.x.k2, grad[3]);
  check(p.x.v, grad[4]);
  check(p.x.lambda, grad[5]);
}

double dot(const Matrix<double>& a, const Matrix<double>& b) { return a.cwiseProduct(b).sum(); }

bool close(const Matrix<double>& a, const Matrix<double>& b) {
  return (a - b).cwiseAbs().maxCoeff() <= 1e-12 * (1 + b.cwiseAbs().maxCoeff());
}

}  // namespace

TEST_CASE("Gradients are the derivatives of the reference") {
  check_derivatives({5, 7, 3, 4}, FullMask{});
  check_derivatives({9, 6, 2, 3}, CausalMask{});  // rows that see nothing
  check_derivatives({6, 9, 4, 8}, SlidingWindowMask{3}, {.scale = 0.8});
  check_derivatives({6, 5, 3, 2}, with_bias(CausalMask{}, AnyBias<double>{AlibiBias{0.5}}));
}

TEST_CASE("The adjoint law: <dout, J dx> = <Jᵀ dout, dx>") {
  // A directional derivative along random directions in all operands at once, at a shape that a gradcheck of single
  // entries cannot afford.
  Problem p({60, 70, 16, 24});
  const Problem direction({60, 70, 16, 24}, 1);
  const Gradients<double> grad = DiffAttentionPerRowBackward{}(p.x, p.dout, CausalMask{});
  Vector<double> step = Vector<double>::Zero(1);
  const auto along_direction = [&] {
    const double t = step[0];
    Operands<double> y = p.x;
    y.q1 += t * direction.x.q1;
    y.k1 += t * direction.x.k1;
    y.q2 += t * direction.x.q2;
    y.k2 += t * direction.x.k2;
    y.v += t * direction.x.v;
    y.lambda += t * direction.x.lambda;
    return loss(y, p.dout, CausalMask{}, {});
  };
  const double expected = numerical_gradient(step, along_direction)(0, 0);
  const double adjoint = dot(grad[0], direction.x.q1) + dot(grad[1], direction.x.k1) + dot(grad[2], direction.x.q2) +
                         dot(grad[3], direction.x.k2) + dot(grad[4], direction.x.v) + dot(grad[5], direction.x.lambda);
  CHECK(std::abs(adjoint - expected) <= 1e-7 * (1 + std::abs(expected)));

  // V enters linearly, so along it the law is exact.
  Operands<double> y = p.x;
  y.v = direction.x.v;
  CHECK(std::abs(dot(grad[4], direction.x.v) - loss(y, p.dout, CausalMask{}, {})) <= 1e-11);
}

TEST_CASE("λ = 0 leaves standard attention, and a second map without gradient") {
  Problem p({40, 50, 8, 12});
  p.x.lambda.setZero();
  const Gradients<double> both = DiffAttentionBackward{}(p.x, p.dout, CausalMask{});
  const Gradients<double> standard = AttentionBackward{}(p.x, p.dout, CausalMask{});
  CHECK(close(both[0], standard[0]));
  CHECK(close(both[1], standard[1]));
  CHECK(close(both[4], standard[4]));
  CHECK(both[2].isZero(0));
  CHECK(both[3].isZero(0));
}

TEST_CASE("Equal maps: the gradients of one are −λ times those of the other, and λ = 1 cancels") {
  Problem p({40, 50, 8, 12});
  p.x.q2 = p.x.q1;
  p.x.k2 = p.x.k1;
  p.x.lambda.setConstant(0.3);
  Gradients<double> grad = DiffAttentionBackward{}(p.x, p.dout, CausalMask{});
  CHECK(close(grad[2], -0.3 * grad[0]));
  CHECK(close(grad[3], -0.3 * grad[1]));
  p.x.lambda.setConstant(1);
  grad = DiffAttentionBackward{}(p.x, p.dout, CausalMask{});
  CHECK(close(grad[4], Matrix<double>::Zero(50, 12)));
}

TEST_CASE("Heads that share keys and values add up their gradients") {
  // Two maps on one K and V (DIFF V2), four heads on two: against single heads.
  const Index n_q = 30, n_k = 40, d = 6, dv = 10;
  const Heads heads{4, 2};
  Rng rng = make_rng();
  const auto q = random_matrix<double>(n_q, 8 * d, rng), v = random_matrix<double>(n_k, 2 * dv, rng);
  const auto lambda = random_matrix<double>(n_q, 4, rng), dout = random_matrix<double>(n_q, 4 * dv, rng);
  const RangeMask mask{CausalMask{}};
  for (const Index maps : {1, 2}) {
    INFO(maps << " keys a head");
    const auto k = random_matrix<double>(n_k, maps * 2 * d, rng);
    Matrix<double> dq = Matrix<double>::Zero(n_q, 8 * d), dk = Matrix<double>::Zero(n_k, maps * 2 * d);
    Matrix<double> dv_sum = Matrix<double>::Zero(n_k, 2 * dv), dlambda(n_q, 4);
    for (Index h = 0; h < 4; ++h) {
      const Index g = h / 2;
      const Operands<double> x{q.middleCols(2 * h * d, d),       k.middleCols(maps * g * d, d),
                               q.middleCols((2 * h + 1) * d, d), k.middleCols((maps * g + maps - 1) * d, d),
                               v.middleCols(g * dv, dv),         lambda.col(h)};
      const Matrix<double> own = dout.middleCols(h * dv, dv);
      const Gradients<double> one = DiffAttentionPerRowBackward{}(x, own, mask);
      dq.middleCols(2 * h * d, d) = one[0];
      dq.middleCols((2 * h + 1) * d, d) = one[2];
      dk.middleCols(maps * g * d, d) += one[1];
      dk.middleCols((maps * g + maps - 1) * d, d) += one[3];
      dv_sum.middleCols(g * dv, dv) += one[4];
      dlambda.col(h) = one[5];
    }
    Workspace workspace;
    // Every other column and row of something larger: any strides.
    Matrix<double> wide = Matrix<double>::Constant(2 * n_q, 8 * d + 3, 7), got_dk(n_k, maps * 2 * d),
                   got_dv(n_k, 2 * dv);
    Matrix<double> got_dlambda(n_q, 4);
    Eigen::Map<Matrix<double>, 0, Eigen::OuterStride<>> got_dq(wide.data(), n_q, 8 * d,
                                                               Eigen::OuterStride<>(2 * (8 * d + 3)));
    diffattn::multihead_diff_attention_backward_into({got_dq, got_dk, got_dv, got_dlambda}, q, k, v, lambda, dout,
                                                     heads, mask, {}, workspace);
    CHECK(close(got_dq, dq));
    CHECK(close(got_dk, dk));
    CHECK(close(got_dv, dv_sum));
    CHECK(close(got_dlambda, dlambda));
    CHECK((wide.rightCols(3).array() == 7).all());

    // A scalar λ: its gradient is the sum over queries and heads.
    double dconstant = 0;
    const Matrix<double> constant = Matrix<double>::Constant(n_q, 4, 0.6);
    diffattn::multihead_diff_attention_backward_into({got_dq, got_dk, got_dv, got_dlambda}, q, k, v, constant, dout,
                                                     heads, mask, {}, workspace);
    diffattn::multihead_diff_attention_backward_into({dq, dk, dv_sum, dconstant}, q, k, v, 0.6, dout, heads, mask, {},
                                                     workspace);
    CHECK(close(got_dq, dq));
    CHECK(close(got_dk, dk));
    CHECK(std::abs(dconstant - got_dlambda.sum()) <= 1e-12 * got_dlambda.cwiseAbs().sum());
  }
}

TEST_CASE("A row that sees no key has gradient 0, and gives none") {
  Problem p({20, 8, 5, 6});
  p.x.q1.topRows(12).setConstant(kNaN<double>);  // rows 0 … 11 see nothing
  p.dout.topRows(12).setConstant(kNaN<double>);
  p.x.lambda.head(12).setConstant(kNaN<double>);
  const Gradients<double> grad = DiffAttentionPerRowBackward{}(p.x, p.dout, CausalMask{});
  Problem rest({8, 8, 5, 6});
  rest.x = {p.x.q1.bottomRows(8), p.x.k1, p.x.q2.bottomRows(8), p.x.k2, p.x.v, p.x.lambda.tail(8)};
  rest.dout = p.dout.bottomRows(8);
  const Gradients<double> expected = DiffAttentionPerRowBackward{}(rest.x, rest.dout, CausalMask{});
  for (const std::size_t i : {0U, 2U, 5U}) {
    CHECK(grad[i].topRows(12).isZero(0));
    CHECK(close(grad[i].bottomRows(8), expected[i]));
  }
  for (const std::size_t i : {1U, 3U, 4U}) CHECK(close(grad[i], expected[i]));
}

TEST_CASE("What a masked key holds never leaks, and its own gradient is 0") {
  const Index n = 60, hidden = 45;
  for (const double bad : {kNaN<double>, std::numeric_limits<double>::infinity(), 1e200}) {
    INFO(bad);
    Problem p({n, n, 5, 6});
    const Gradients<double> clean =
        DiffAttentionPerRowBackward{}(p.x, p.dout, with_bias(FullMask{}, AnyBias<double>{HidingBias{hidden}}));
    for (Matrix<double>* m : {&p.x.k1, &p.x.k2, &p.x.v}) m->bottomRows(n - hidden).setConstant(bad);
    const Gradients<double> grad =
        DiffAttentionPerRowBackward{}(p.x, p.dout, with_bias(FullMask{}, AnyBias<double>{HidingBias{hidden}}));
    for (std::size_t i = 0; i < grad.size(); ++i) {
      INFO(kGradientNames[i]);
      CHECK(close(grad[i], clean[i]));
    }
    for (const std::size_t i : {1U, 3U, 4U}) CHECK(grad[i].bottomRows(n - hidden).isZero(0));
  }
}

TEST_CASE("NaN reaches the gradients that depend on it and no other") {
  const Index n = 60, row = 30;
  Problem p({n, n, 5, 6});
  const Gradients<double> clean = DiffAttentionPerRowBackward{}(p.x, p.dout, CausalMask{});
  p.x.q1(row, 2) = kNaN<double>;  // query 30 sees keys 0 … 30
  const Gradients<double> grad = DiffAttentionPerRowBackward{}(p.x, p.dout, CausalMask{});
  CHECK(grad[0].row(row).array().isNaN().all());
  CHECK(close(grad[2], clean[2]));  // the second map does not know
  CHECK(close(grad[3], clean[3]));
  for (const std::size_t i : {1U, 4U}) {
    CHECK(grad[i].topRows(row + 1).array().isNaN().all());
    CHECK(close(grad[i].bottomRows(n - row - 1), clean[i].bottomRows(n - row - 1)));
  }
  CHECK(close(grad[0].topRows(row), clean[0].topRows(row)));
  CHECK(close(grad[0].bottomRows(n - row - 1), clean[0].bottomRows(n - row - 1)));
}

TEST_CASE("Gradients are the same bits from every executor") {
  for (const Shape& shape :
       {Shape{1, 600, 8, 16}, Shape{1600, 300, 9, 21}, Shape{300, 40, 4, 3}, Shape{0, 4, 2, 2}, Shape{6, 0, 2, 2}}) {
    INFO(describe(shape));
    Rng rng = make_rng();
    const auto x = random_operands<float>(shape, rng);
    const auto dout = random_matrix<float>(shape.n_q, shape.dv, rng);
    const auto check = [&](const auto& kernel) {
      diffattn::Serial one;
      const Gradients<float> serial = kernel(x, dout, CausalMask{}, {}, AnyExecutor(one));
      for (const Index threads : {1, 2, 4}) {
        diffattn::ThreadPool pool(threads);
        CHECK(identical(kernel(x, dout, CausalMask{}, {}, AnyExecutor(pool)), serial));
      }
      for (const Index workers : {3, 40}) {
        Backwards backwards{workers};
        CHECK(identical(kernel(x, dout, CausalMask{}, {}, AnyExecutor(backwards)), serial));
      }
    };
    check(AttentionBackward{});
    check(DiffAttentionPerRowBackward{});
  }
}

TEST_CASE("Several heads give the same bits for any number of threads, from a workspace that stops growing") {
  const Index n = 150, d = 6;
  const Heads heads{6, 3};
  Rng rng = make_rng();
  const auto q = random_matrix<float>(n, 12 * d, rng), k = random_matrix<float>(n, 3 * d, rng);
  const auto v = random_matrix<float>(n, 3 * d, rng), dout = random_matrix<float>(n, 6 * d, rng);
  Gradients<float> first;
  for (const Index workers : {1, 2, 3, 5}) {
    Backwards backwards{workers};
    Workspace workspace;
    Matrix<float> dq(n, 12 * d), dk(n, 3 * d), dv(n, 3 * d);
    float dlambda = 0;
    std::size_t capacity = 0;
    for (int round = 0; round < 4; ++round) {
      diffattn::multihead_diff_attention_backward_into({dq, dk, dv, dlambda}, q, k, v, 0.6f, dout, heads,
                                                       RangeMask{CausalMask{}}, {}, workspace, AnyExecutor(backwards));
      const Gradients<float> grad{dq, dk, {}, {}, dv, Matrix<float>::Constant(1, 1, dlambda)};
      if (first[0].size() == 0) first = grad;
      CHECK(identical(grad, first));
      if (round > 1) CHECK(workspace.capacity() == capacity);
      capacity = workspace.capacity();
    }
  }
}

TEST_CASE("Memory is linear in the number of keys") {
  const Index n = 3000;
  Rng rng = make_rng();
  const auto x = random_operands<float>({n, n, 4, 4}, rng);
  const auto dout = random_matrix<float>(n, 4, rng);
  Workspace workspace;
  diffattn::DiffAttentionGradients<float, float> grad;
  diffattn::diff_attention_backward_into(grad, x.q1, x.k1, x.q2, x.k2, x.v, 0.5f, dout, RangeMask{CausalMask{}}, {},
                                         workspace);
  CHECK(workspace.capacity() < sizeof(float) * static_cast<std::size_t>(n) * 600);  // a map has n·n
}

TEST_CASE("Operands of any layout give the same gradients") {
  using ColumnMajor = Eigen::MatrixXd;
  const Problem p({37, 70, 9, 21});
  const ColumnMajor q1 = p.x.q1, k2 = p.x.k2, v = p.x.v;
  Matrix<double> around = Matrix<double>::Constant(80, 30, kNaN<double>);
  around.block(3, 4, 37, 21) = p.dout;
  const RangeMask mask{CausalMask{}};
  const auto grad =
      diffattn::diff_attention_backward(q1, p.x.k1, 1.0 * p.x.q2, k2, v, p.x.lambda, around.block(3, 4, 37, 21), mask);
  CHECK(identical(as_array(grad), DiffAttentionPerRowBackward{}(p.x, p.dout, mask)));
  const auto standard = diffattn::attention_backward(q1, k2, v, around.block(3, 4, 37, 21), mask);
  const Operands<double> y{p.x.q1, p.x.k2, {}, {}, p.x.v, {}};
  CHECK(identical(as_array(standard), AttentionBackward{}(y, p.dout, mask)));
}

TEST_CASE("The backward functions name the operand that does not fit, and change nothing") {
  using diffattn::ShapeError;
  const Problem p({5, 7, 4, 6});
  const Matrix<double> bad(5, 5);
  diffattn::DiffAttentionGradients<double, double> grad;
  Workspace workspace;
  const auto refused = [&](const Matrix<double>& q2, const Matrix<double>& k1, const Matrix<double>& v,
                           const Matrix<double>& dout) {
    return thrown_by<ShapeError>([&] {
      diffattn::diff_attention_backward_into(grad, p.x.q1, k1, q2, p.x.k2, v, 0.5, dout, RangeMask{}, {}, workspace);
    });
  };
  CHECK(refused(bad, p.x.k1, p.x.v, p.dout) == "diff_attention_backward: q2 must be 5 x 4, got 5 x 5");
  CHECK(refused(p.x.q2, bad, p.x.v, p.dout) == "diff_attention_backward: k1 must be 5 x 4, got 5 x 5");
  CHECK(refused(p.x.q2, p.x.k1, bad, p.dout) == "diff_attention_backward: v must be 7 x 5, got 5 x 5");
  CHECK(refused(p.x.q2, p.x.k1, p.x.v, bad) == "diff_attention_backward: dout must be 5 x 6, got 5 x 5");
  CHECK(grad.dq1.size() == 0);
  CHECK(thrown_by<ShapeError>([&] { (void)diffattn::attention_backward(p.x.q1, bad, p.x.v, p.dout, RangeMask{}); }) ==
        "attention_backward: k must be 5 x 4, got 5 x 5");
  CHECK(thrown_by<ShapeError>([&] { (void)diffattn::attention_backward(p.x.q1, p.x.k1, p.x.v, bad, RangeMask{}); }) ==
        "attention_backward: dout must be 5 x 6, got 5 x 5");
  Matrix<double> dq(5, 4), dk(7, 4), dv(7, 5);
  CHECK(thrown_by<ShapeError>([&] {
          diffattn::multihead_attention_backward_into({dq, dk, dv}, p.x.q1, p.x.k1, p.x.v, p.dout, Heads{}, RangeMask{},
                                                      {}, workspace);
        }) == "multihead_attention_backward: dv must be 7 x 6, got 7 x 5");
}

TEST_CASE("Gradients of several heads in a struct are those in views, and the thread's workspace will do") {
  Rng rng = make_rng();
  const Index n_q = 30, n_k = 40, d = 6, dv = 5;
  const Heads heads{4, 2};
  const auto q = random_matrix<double>(n_q, 8 * d, rng), k = random_matrix<double>(n_k, 4 * d, rng);
  const auto v = random_matrix<double>(n_k, 2 * dv, rng), dout = random_matrix<double>(n_q, 4 * dv, rng);
  const auto lambda = random_matrix<double>(n_q, 4, rng);
  Workspace workspace;
  Matrix<double> dq(n_q, 8 * d), dk(n_k, 4 * d), dv_sum(n_k, 2 * dv), dlambda(n_q, 4);

  diffattn::multihead_diff_attention_backward_into({dq, dk, dv_sum, dlambda}, q, k, v, lambda, dout, heads, FullMask{},
                                                   {}, workspace);
  const auto check = [&](const auto& grad) {
    CHECK(identical(grad.dq, dq));
    CHECK(identical(grad.dk, dk));
    CHECK(identical(grad.dv, dv_sum));
  };
  const auto per_row = diffattn::multihead_diff_attention_backward(q, k, v, lambda, dout, heads);
  check(per_row);
  CHECK(identical(per_row.dlambda, dlambda));
  diffattn::MultiheadDiffAttentionGradients<double, Matrix<double>> own;
  own.dq.resize(3, 3);  // is resized
  diffattn::multihead_diff_attention_backward_into(own, q, k, v, lambda, dout, heads, FullMask{}, {}, workspace);
  check(own);

  double number = 0;
  diffattn::multihead_diff_attention_backward_into({dq, dk, dv_sum, number}, q, k, v, 0.5, dout, heads, CausalMask{},
                                                   {}, workspace);
  const auto constant = diffattn::multihead_diff_attention_backward(q, k, v, 0.5, dout, heads, CausalMask{});
  check(constant);
  CHECK(constant.dlambda == number);

  const Matrix<double> q1 = q.leftCols(4 * d), k1 = k.leftCols(2 * d);
  dq.resize(n_q, 4 * d);
  dk.resize(n_k, 2 * d);
  diffattn::multihead_attention_backward_into({dq, dk, dv_sum}, q1, k1, v, dout, heads, FullMask{}, {}, workspace);
  check(diffattn::multihead_attention_backward(q1, k1, v, dout, heads));
  diffattn::AttentionGradients<double> standard;
  diffattn::multihead_attention_backward_into(standard, q1, k1, v, dout, heads);
  check(standard);
}
