// A program compiled with flags that people use and that change what the kernels are made of: -ffast-math, Eigen told
// not to vectorise. Values and gradients of every path against plain loops, written here, in double. Prints what is
// wrong.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "diffattn/diffattn.hpp"
#include "diffattn/kernels/backward.hpp"

namespace {

using namespace diffattn;

int failures = 0;

void check(bool good, const char* what, Index n_q, Index n_k) {
  if (good) return;
  ++failures;
  std::printf("wrong: %s, %d queries, %d keys\n", what, static_cast<int>(n_q), static_cast<int>(n_k));
}

/// softmax(q·kᵀ/√d)·v over the keys that visible(i, j) says, with no number that is not finite.
template <typename Visible>
Matrix<double> expected(const Matrix<float>& q, const Matrix<float>& k, const Matrix<float>& v,
                        const Visible& visible) {
  Matrix<double> out = Matrix<double>::Zero(q.rows(), v.cols());
  for (Index i = 0; i < q.rows(); ++i) {
    double sum = 0;
    for (Index j = 0; j < k.rows(); ++j) {
      if (!visible(i, j)) continue;
      double dot = 0;
      for (Index c = 0; c < q.cols(); ++c) dot += static_cast<double>(q(i, c)) * static_cast<double>(k(j, c));
      const double weight = std::exp(dot / std::sqrt(static_cast<double>(q.cols())));
      sum += weight;
      for (Index c = 0; c < v.cols(); ++c) out(i, c) += weight * static_cast<double>(v(j, c));
    }
    for (Index c = 0; c < v.cols() && sum > 0; ++c) out(i, c) /= sum;
  }
  return out;
}

template <typename Mask, typename Visible>
void check_mask(const char* what, Index n_q, Index n_k, const Mask& mask, const Visible& visible) {
  std::srand(1);
  using M = Matrix<float>;
  const M q1 = M::Random(n_q, 20), k1 = M::Random(n_k, 20), q2 = M::Random(n_q, 20), k2 = M::Random(n_k, 20);
  const M v = M::Random(n_k, 37);
  const Matrix<double> first = expected(q1, k1, v, visible), second = expected(q2, k2, v, visible);
  const auto error = [](const M& a, const Matrix<double>& b) { return (a.cast<double>() - b).cwiseAbs().maxCoeff(); };
  check(error(attention(q1, k1, v, mask), first) < 4e-6, what, n_q, n_k);
  check(error(diff_attention(q1, k1, q2, k2, v, 0.5f, mask), first - 0.5 * second) < 4e-6, what, n_q, n_k);

  // The gradient of the sum of all outputs: against the difference of two values.
  const M ones = M::Ones(n_q, v.cols());
  const auto grad = diff_attention_backward(q1, k1, q2, k2, v, 0.5f, ones, mask);
  const M step = M::Random(n_q, 20) * 1e-2f;
  const M up = q2 + step, down = q2 - step;
  const double change = -0.5 * (expected(up, k2, v, visible).sum() - expected(down, k2, v, visible).sum()) / 2;
  const double predicted = (grad.dq2.template cast<double>().cwiseProduct(step.template cast<double>())).sum();
  check(std::abs(change - predicted) < 1e-4 + 1e-2 * std::abs(change), "gradient", n_q, n_k);
}

}  // namespace

int main() {
  const double hidden = -std::numeric_limits<double>::infinity();
  for (const auto& [n_q, n_k] :
       std::vector<std::pair<Index, Index>>{{1, 2}, {3, 5}, {8, 9}, {2, 300}, {40, 30}, {60, 600}}) {
    const Index offset = n_k - n_q, valid = n_k / 2 + 1;
    check_mask("full", n_q, n_k, FullMask{}, [](Index, Index) { return true; });
    check_mask("causal", n_q, n_k, CausalMask{}, [&](Index i, Index j) { return j <= i + offset; });
    check_mask("window", n_q, n_k, SlidingWindowMask{3},
               [&](Index i, Index j) { return j <= i + offset && j > i + offset - 3; });
    Matrix<double> bias = Matrix<double>::Zero(n_q, n_k);
    bias.rightCols(n_k - valid).setConstant(hidden);
    check_mask("-inf", n_q, n_k, with_bias(FullMask{}, MatrixBias(bias)), [&](Index, Index j) { return j < valid; });
  }
  if (failures == 0) std::puts("all right");
  return failures == 0 ? 0 : 1;
}
