#include <cmath>
#include <diffattn/training/cross_entropy.hpp>
#include <limits>
#include <string>
#include <vector>

#include "diffattn/core/parallel_threads.hpp"
#include "support/catch.hpp"
#include "support/numerical_gradient.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

using diffattn::cross_entropy;
using diffattn::cross_entropy_into;
using diffattn::Index;
using diffattn::kIgnoreTarget;
using diffattn::Matrix;
using diffattn::Workspace;

namespace {

using Exact = Matrix<long double>;

/// By the book: probabilities, then logarithms, in long double. Logits small enough not to overflow.
long double textbook_loss(const Exact& logits, const std::vector<Index>& targets, Exact& gradient) {
  gradient = Exact::Zero(logits.rows(), logits.cols());
  long double sum = 0;
  Index count = 0;
  for (const Index target : targets) count += target == kIgnoreTarget ? 0 : 1;
  for (Index i = 0; i < logits.rows(); ++i) {
    const Index target = targets[static_cast<std::size_t>(i)];
    if (target == kIgnoreTarget) continue;
    long double total = 0;
    for (Index c = 0; c < logits.cols(); ++c) total += std::exp(logits(i, c));
    sum -= std::log(std::exp(logits(i, target)) / total);
    for (Index c = 0; c < logits.cols(); ++c) {
      gradient(i, c) = (std::exp(logits(i, c)) / total - (c == target ? 1 : 0)) / static_cast<long double>(count);
    }
  }
  return count == 0 ? 0 : sum / static_cast<long double>(count);
}

std::vector<Index> random_targets(Index n, Index vocab, support::Rng& rng) {
  std::vector<Index> targets(static_cast<std::size_t>(n));
  for (Index& target : targets) target = std::uniform_int_distribution<Index>(0, vocab - 1)(rng);
  return targets;
}

template <typename S>
Matrix<S> gradient_of(const Matrix<S>& logits, const std::vector<Index>& targets) {
  Workspace workspace;
  Matrix<S> gradient(logits.rows(), logits.cols());
  cross_entropy_into(gradient, logits, targets, kIgnoreTarget, workspace);
  return gradient;
}

}  // namespace

TEMPLATE_TEST_CASE("Cross-entropy and its gradient are the textbook's", "[training][cross_entropy]", float, double) {
  using S = TestType;
  auto rng = support::make_rng();
  for (const Index vocab : {1, 2, 5, 16, 33, 256, 1000}) {
    for (const Index n : {1, 3, 40}) {
      INFO("vocab " << vocab << ", n " << n);
      const Matrix<S> logits = S(3) * support::random_matrix<S>(n, vocab, rng);
      std::vector<Index> targets = random_targets(n, vocab, rng);
      if (n > 2) targets[1] = kIgnoreTarget;
      Exact exact;
      const long double expected = textbook_loss(logits.template cast<long double>(), targets, exact);

      Workspace workspace;
      Matrix<S> gradient(n, vocab);
      const auto loss = cross_entropy_into(gradient, logits, targets, kIgnoreTarget, workspace);
      const double u = std::numeric_limits<S>::epsilon();
      CHECK(loss.count == (n > 2 ? n - 1 : n));
      CHECK(std::abs(loss.mean - static_cast<double>(expected)) <= 16 * u * (1 + static_cast<double>(expected)));
      // An entry is p − [target]: absolute error of some roundings of 1, over the count.
      CHECK((gradient.template cast<long double>() - exact).cwiseAbs().maxCoeff() *
                static_cast<long double>(loss.count) <=
            16 * static_cast<long double>(u));
      if (n > 2) CHECK(gradient.row(1).isZero(0));
      CHECK(std::abs(cross_entropy(logits, targets).mean - loss.mean) <= 4 * u * (1 + loss.mean));
      CHECK(cross_entropy(logits, targets).count == loss.count);
    }
  }
}

TEST_CASE("Known losses", "[training][cross_entropy]") {
  // Equal logits: ln(vocab). Two logits: ln(1 + e^(other − target)).
  CHECK(std::abs(cross_entropy(Matrix<double>::Constant(3, 7, 2.5), std::vector<Index>{0, 6, 3}).mean - std::log(7)) <
        1e-15);
  Matrix<double> two(1, 2);
  two << 1, 3;
  CHECK(std::abs(cross_entropy(two, std::vector<Index>{0}).mean - 2.1269280110429727) < 1e-15);
  CHECK(std::abs(cross_entropy(two, std::vector<Index>{1}).mean - 0.1269280110429725) < 1e-15);
}

TEST_CASE("The gradient of cross-entropy is what differences say", "[training][cross_entropy]") {
  auto rng = support::make_rng();
  Matrix<double> logits = support::random_matrix<double>(6, 11, rng);
  std::vector<Index> targets = random_targets(6, 11, rng);
  targets[4] = kIgnoreTarget;
  const Matrix<double> numeric =
      support::numerical_gradient(logits, [&] { return cross_entropy(logits, targets).mean; });
  CHECK(support::excess(gradient_of(logits, targets), numeric) <= 0);
}

TEMPLATE_TEST_CASE("Logits of any size are safe", "[training][cross_entropy]", float, double) {
  using S = TestType;
  const S huge = std::numeric_limits<S>::max() / 4;
  Matrix<S> logits(4, 3);
  logits << huge, 0, -huge, huge, 0, -huge, 1000, 1001, 999, -1000, -1001, -999;
  const std::vector<Index> targets = {0, 1, 1, 2};
  CHECK(cross_entropy(logits.topRows(1), std::vector<Index>{0}).mean == 0);
  CHECK(cross_entropy(logits.middleRows(1, 1), std::vector<Index>{1}).mean == static_cast<double>(huge));
  const double expected = std::log(1 + std::exp(-1.0) + std::exp(-2.0));
  CHECK(std::abs(cross_entropy(logits.bottomRows(2), std::vector<Index>{1, 2}).mean - expected) < 1e-6);
  CHECK(gradient_of(logits, targets).allFinite());

  // A class that cannot be: the logit of a mask.
  logits(2, 0) = -std::numeric_limits<S>::infinity();
  CHECK(std::abs(cross_entropy(logits.middleRows(2, 1), std::vector<Index>{1}).mean - std::log(1 + std::exp(-2.0))) <
        1e-6);
  CHECK(std::abs(gradient_of(logits, targets)(2, 0)) <= std::numeric_limits<S>::min());
}

TEMPLATE_TEST_CASE("Ignored rows count for nothing, whatever is in them", "[training][cross_entropy]", float, double) {
  using S = TestType;
  auto rng = support::make_rng();
  Matrix<S> logits = support::random_matrix<S>(5, 9, rng);
  const std::vector<Index> targets = {3, kIgnoreTarget, 8, kIgnoreTarget, 0};
  const double loss = cross_entropy(logits, targets).mean;
  const Matrix<S> gradient = gradient_of(logits, targets);
  logits.row(1).setConstant(std::numeric_limits<S>::quiet_NaN());
  CHECK(cross_entropy(logits, targets).mean == loss);
  CHECK(support::identical(gradient_of(logits, targets), gradient));
  for (Index c = 0; c < 9; ++c) {
    Matrix<S> with_nan = logits;
    with_nan(4, c) = std::numeric_limits<S>::quiet_NaN();
    CHECK(std::isnan(cross_entropy(with_nan, targets).mean));
    CHECK(std::isnan(gradient_of(with_nan, targets)(4, c)));
  }

  const std::vector<Index> none(5, kIgnoreTarget);
  CHECK(cross_entropy(logits, none).mean == 0);
  CHECK(cross_entropy(logits, none).count == 0);
  CHECK(gradient_of(logits, none).isZero(0));
  CHECK(cross_entropy(Matrix<S>(0, 9), std::vector<Index>{}).count == 0);
  CHECK(cross_entropy(logits.topRows(1), std::vector<Index>{7}, 7).count == 0);  // any index can be the one ignored
}

TEST_CASE("In place, strided, column-major and threaded are the same", "[training][cross_entropy]") {
  auto rng = support::make_rng();
  Matrix<float> logits = support::random_matrix<float>(70, 37, rng);
  const std::vector<Index> targets = random_targets(70, 37, rng);
  const Matrix<float> expected = gradient_of(logits, targets);
  Workspace workspace;
  double mean = 0;
  for (const Index threads : {1, 2, 4}) {
    diffattn::ThreadPool pool(threads);
    Matrix<float> gradient(70, 37);
    const auto loss = cross_entropy_into(gradient, logits, targets, kIgnoreTarget, workspace, pool);
    CHECK(support::identical(gradient, expected));
    if (threads == 1) mean = loss.mean;
    CHECK(loss.mean == mean);
  }

  Eigen::MatrixXf columns = logits;
  cross_entropy_into(columns, columns, targets, kIgnoreTarget, workspace);
  CHECK((columns - expected).cwiseAbs().maxCoeff() < 1e-8F);
  Matrix<float> wide = Matrix<float>::Constant(70, 50, 9);
  wide.leftCols(37) = logits;
  cross_entropy_into(wide.leftCols(37), wide.leftCols(37), targets, kIgnoreTarget, workspace);
  CHECK((wide.leftCols(37) - expected).cwiseAbs().maxCoeff() < 1e-8F);
  CHECK((wide.rightCols(13).array() == 9).all());

  CHECK(cross_entropy_into(logits, logits, targets, kIgnoreTarget, workspace).mean == mean);
  CHECK(support::identical(logits, expected));
  const std::size_t held = workspace.capacity();
  cross_entropy_into(logits, logits, targets, kIgnoreTarget, workspace);
  CHECK(workspace.capacity() == held);
}

TEST_CASE("Cross-entropy refuses what does not fit, before any work", "[training][cross_entropy]") {
  const Matrix<float> logits = Matrix<float>::Zero(3, 4);
  CHECK(support::thrown_by<diffattn::ShapeError>([&] {
          cross_entropy(logits, std::vector<Index>{1, 2});
        }) == "cross_entropy: targets must have one entry for each of the 3 rows of logits, got 2");
  Matrix<float> gradient = Matrix<float>::Constant(3, 4, 5);
  Workspace workspace;
  for (const Index bad : {Index{4}, Index{-1}}) {
    const std::vector<Index> targets = {0, 1, bad};
    CHECK(support::thrown_by<std::invalid_argument>([&] {
            cross_entropy_into(gradient, logits, targets, kIgnoreTarget, workspace);
          }) == "cross_entropy: target 2 must be in [0, 4) or -100, got " + std::to_string(bad));
  }
  CHECK((gradient.array() == 5).all());
  CHECK(support::thrown_by<diffattn::ShapeError>([&] {
          cross_entropy_into(gradient.leftCols(3), logits, std::vector<Index>{0, 1, 2}, kIgnoreTarget, workspace);
        }) == "cross_entropy: the gradient must be 3 x 4, got 3 x 3");
}
