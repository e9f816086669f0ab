// Linear products in bfloat16: every shape and layout, x rounded once, several outputs of one x, and the same bits for
// any number of threads.

#include "diffattn/product/bfloat16_product.hpp"

#include <cmath>

#include "product/plain.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"

namespace {

using diffattn::Serial;
using diffattn::Workspace;
using diffattn::detail::Bfloat16Output;
using diffattn::detail::view_of;
using diffattn::detail::writable_view_of;
using support::Index;
using support::Laid;
using support::Layout;

using Narrow = support::Matrix<Eigen::bfloat16>;

support::Matrix<float> bfloat16_product(const support::Matrix<float>& x, const Narrow& w,
                                        support::AnyExecutor executor) {
  support::Matrix<float> y(x.rows(), w.rows());
  Workspace workspace;
  const Bfloat16Output output{writable_view_of(y), view_of(w)};
  diffattn::detail::multiply_bfloat16(std::span<const Bfloat16Output>(&output, 1), view_of(x), workspace, executor);
  return y;
}

}  // namespace

TEST_CASE("A bfloat16 product is x Wᵀ + b for every shape and layout", "[product]") {
  support::Rng rng = support::make_rng();
  Workspace workspace;
  Serial serial;
  const auto check = [&](Index n, Index in, Index out, Layout layout) {
    INFO(n << " rows, " << in << " to " << out << ", " << support::describe(layout));
    const auto x = support::whole_numbers<float>(n, in, rng);
    const Narrow w = support::whole_numbers<Eigen::bfloat16>(out, in, rng),
                 second = support::whole_numbers<Eigen::bfloat16>(out + 3, in, rng);
    std::vector<float> bias(static_cast<std::size_t>(out));
    for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i % 7);
    const Laid<float> x_laid(x, layout);
    Laid<float> y(support::Matrix<float>::Zero(n, out), layout), y2(support::Matrix<float>::Zero(n, out + 3), layout);
    const Bfloat16Output outputs[] = {{y.view(), view_of(w), bias.data()}, {y2.view(), view_of(second)}};
    diffattn::detail::multiply_bfloat16(std::span<const Bfloat16Output>(outputs), x_laid.read(), workspace, serial);
    const support::Matrix<Eigen::bfloat16> wt = w.transpose(), second_t = second.transpose();
    CHECK(y.matrix() == support::plain_product(x, wt, bias));
    // The same from weights that were packed before.
    const auto packed = diffattn::detail::packed_weight(view_of(w));
    Laid<float> again(support::Matrix<float>::Zero(n, out), layout);
    const Bfloat16Output of_packed{again.view(), view_of(w), bias.data(), packed.get()};
    diffattn::detail::multiply_bfloat16(std::span<const Bfloat16Output>(&of_packed, 1), x_laid.read(), workspace,
                                        serial);
    CHECK(again.matrix() == y.matrix());
    CHECK(y2.matrix() == support::plain_product(x, second_t));
    CHECK(y.surroundings_untouched());
    CHECK(y2.surroundings_untouched());
  };
  for (const Index n : {0, 1, 2, 4, 5, 13, 40, 70}) {
    for (const Index in : {0, 1, 2, 31, 65, 400}) {
      for (const Index out : {1, 16, 33, 70}) check(n, in, out, Layout::rows);
    }
  }
  for (const Layout layout : support::kLayouts) check(21, 35, 37, layout), check(3, 35, 37, layout);
  check(5, 4097, 3, Layout::rows);
  check(1030, 3, 290, Layout::rows);
}

TEST_CASE("A bfloat16 product rounds x once, and nothing else", "[product]") {
  support::Rng rng = support::make_rng();
  for (const Index n : {1, 3, 5, 30}) {
    const Index in = 333, out = 50;
    const support::Matrix<float> x = support::random_matrix<float>(n, in, rng);
    const Narrow w = support::random_matrix<float>(out, in, rng).cast<Eigen::bfloat16>();
    Serial serial;
    const auto y = bfloat16_product(x, w, support::AnyExecutor(serial));
    const support::Matrix<double> rounded = x.cast<Eigen::bfloat16>().cast<double>(), wide = w.cast<double>();
    const support::Matrix<double> exact = rounded * wide.transpose(),
                                  magnitude = rounded.cwiseAbs() * wide.cwiseAbs().transpose();
    const double unit = 0x1p-24;
    CHECK(((y.cast<double>() - exact).array().abs() <= (in + 2) * unit * magnitude.array()).all());
    // The bound would notice an x that has not been rounded.
    const support::Matrix<double> unrounded = x.cast<double>() * wide.transpose();
    CHECK_FALSE(((unrounded - exact).array().abs() <= (in + 2) * unit * magnitude.array()).all());
  }
}

TEST_CASE("Weights that were packed once are what is multiplied, whatever the threads", "[product]") {
  support::Rng rng = support::make_rng();
  const support::Matrix<float> x = support::random_matrix<float>(90, 700, rng);
  Narrow w = support::random_matrix<float>(300, 700, rng).cast<Eigen::bfloat16>();
  const auto packed = diffattn::detail::packed_weight(view_of(w));
  CHECK((packed != nullptr) == diffattn::simd::kUsesPairs);
  CHECK((diffattn::detail::packed_weight_bytes(300, 700) >= sizeof(float) * 300 * 350) == (packed != nullptr));
  support::Backwards backwards;
  const auto y = bfloat16_product(x, w, support::AnyExecutor(backwards));
  if (packed != nullptr) w.setZero();  // so that nothing else can be read
  support::Matrix<float> of_packed(90, 300);
  Workspace workspace;
  const Bfloat16Output output{writable_view_of(of_packed), view_of(w), nullptr, packed.get()};
  diffattn::detail::multiply_bfloat16(std::span<const Bfloat16Output>(&output, 1), view_of(x), workspace, backwards);
  CHECK(of_packed == y);
}

TEST_CASE("Infinities and NaN go through a bfloat16 product into their rows alone", "[product]") {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const Index n : {2, 30}) {
    support::Matrix<float> x = support::Matrix<float>::Ones(n, 35);
    x(0, 34) = infinity;
    x(1, 3) = std::numeric_limits<float>::quiet_NaN();
    const Narrow w = Narrow::Constant(20, 35, Eigen::bfloat16(-1));
    Serial serial;
    const auto y = bfloat16_product(x, w, support::AnyExecutor(serial));
    CHECK((y.row(0).array() == -infinity).all());
    CHECK(y.row(1).array().isNaN().all());
    CHECK((y.bottomRows(n - 2).array() == -35).all());
  }
}

TEST_CASE("Threads and company change no bit of a bfloat16 product", "[product]") {
  support::Rng rng = support::make_rng();
  const support::Matrix<float> x = support::random_matrix<float>(101, 700, rng);
  const Narrow w = support::random_matrix<float>(300, 700, rng).cast<Eigen::bfloat16>();
  Serial serial;
  support::Backwards backwards;
  const auto y = bfloat16_product(x, w, support::AnyExecutor(serial));
  CHECK(bfloat16_product(x, w, support::AnyExecutor(backwards)) == y);
  for (const Index rows : {5, 17, 40}) {
    const support::Matrix<float> some = x.middleRows(30, rows);
    CHECK(bfloat16_product(some, w, support::AnyExecutor(serial)) == y.middleRows(30, rows));
  }
}
