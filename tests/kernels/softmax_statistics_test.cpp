// (m, l) of rows, merged: against the definition, and at the edges of what numbers can be.

#include "diffattn/kernels/softmax_statistics.hpp"

#include "kernels/oracle.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

using namespace support;
using diffattn::ShapeError;
using diffattn::SoftmaxStatistics;

namespace {

/// One row and head.
SoftmaxStatistics<double> statistics_of(double m, double l) {
  return {Matrix<double>::Constant(1, 1, m), Matrix<double>::Constant(1, 1, l)};
}

SoftmaxStatistics<double> statistics_of_nothing() { return statistics_of(-kInf<double>, 0); }

}  // namespace

TEST_CASE("Merged statistics are those of all scores", "[kernels]") {
  // e^1 + e^3 + e^3, relative to 3 and to 2.
  const auto all = merge(statistics_of(1, 1), statistics_of(2, 2 * std::exp(1.0)));
  CHECK(all.m(0, 0) == 2);
  CHECK(all.l(0, 0) == Approx(std::exp(-1.0) + 2 * std::exp(1.0)));
  CHECK(diffattn::log_sum_exp(all)(0, 0) == Approx(std::log(std::exp(1.0) + 2 * std::exp(3.0))));

  const std::vector<SoftmaxStatistics<double>> parts = {statistics_of(-700, 3), statistics_of(700, 2),
                                                        statistics_of(0, 1), statistics_of(700, 0.5)};
  const auto far_apart = diffattn::merge(std::span<const SoftmaxStatistics<double>>(parts));
  CHECK(far_apart.m(0, 0) == 700);
  CHECK(far_apart.l(0, 0) == Approx(2.5));
}

TEST_CASE("Statistics of a row that has seen no key count for nothing", "[kernels]") {
  const auto nothing = statistics_of_nothing(), some = statistics_of(-1e300, 1.5);
  for (const auto& merged : {merge(nothing, some), merge(some, nothing)}) {
    CHECK(merged.m(0, 0) == -1e300);
    CHECK(merged.l(0, 0) == 1.5);
  }
  CHECK(merge(nothing, nothing).m(0, 0) == -kInf<double>);
  CHECK(merge(nothing, nothing).l(0, 0) == 0);
  CHECK(diffattn::log_sum_exp(nothing)(0, 0) == -kInf<double>);
}

TEST_CASE("A NaN among the scores of one part is one of all", "[kernels]") {
  const auto some = statistics_of(3, 2);
  for (const auto& bad : {statistics_of(1, kNaN<double>), statistics_of(kInf<double>, kNaN<double>),
                          statistics_of(kNaN<double>, kNaN<double>), statistics_of(-kInf<double>, kNaN<double>)}) {
    CHECK(std::isnan(merge(some, bad).l(0, 0)));
    CHECK(std::isnan(merge(bad, some).l(0, 0)));
    CHECK(std::isnan(merge(bad, statistics_of_nothing()).l(0, 0)));
    CHECK(std::isnan(diffattn::log_sum_exp(merge(some, bad))(0, 0)));
  }
}

TEST_CASE("Statistics that cannot be merged are refused", "[kernels]") {
  SoftmaxStatistics<double> narrow = statistics_of(1, 1), wide;
  wide.resize(1, 2);
  CHECK(thrown_by<ShapeError>([&] { merge(narrow, wide); }) == "merge: m must be 1 x 1, got 1 x 2");
  narrow.l.resize(3, 1);
  CHECK(thrown_by<ShapeError>([&] { merge(narrow, narrow); }) == "merge: l must be 1 x 1, got 3 x 1");
  CHECK(thrown_by<ShapeError>([&] { diffattn::log_sum_exp(narrow); }) == "log_sum_exp: l must be 1 x 1, got 3 x 1");
  const auto merge_none = [] { diffattn::merge(std::span<const SoftmaxStatistics<double>>()); };
  CHECK(thrown_by<std::invalid_argument>(merge_none) == "merge: there must be at least one part");
}
