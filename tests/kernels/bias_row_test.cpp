// Biases a row at a time: every way to ask for many of them gives what the call operator gives for each, to the bit.

#include "diffattn/kernels/bias_row.hpp"

#include <limits>
#include <vector>

#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/detail/shifted_mask.hpp"
#include "diffattn/kernels/mask.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/tolerances.hpp"

namespace {

using diffattn::AlibiBias;
using diffattn::BiasRow;
using diffattn::CausalMask;
using diffattn::FullMask;
using diffattn::IndexedBias;
using diffattn::MatrixBias;
using diffattn::PaddingBias;
using diffattn::RelativeBias;
using diffattn::detail::BiasOfMask;
using Eigen::Index;

template <typename T>
bool bias_row_same(T a, T b) {
  return a == b || (a != a && b != b);
}

/// Every run of keys of every query, as a T.
template <typename T, typename Bias>
void check_bias_rows_as(const Bias& bias, Index heads, Index n_q, Index n_k) {
  bool same = true, kept = true;
  for (Index head = 0; head < heads; ++head) {
    for (Index query = 0; query < n_q; ++query) {
      for (Index first = 0; first <= n_k; first += 1 + first / 3) {
        for (Index count = 0; first + count <= n_k; count += 1 + count / 2) {
          std::vector<T> row(static_cast<std::size_t>(count) + 2, T(77));
          diffattn::detail::fill_biases(bias, row.data() + 1, BiasRow{head, query, first, count, n_q, n_k});
          for (Index i = 0; i < count; ++i) {
            const auto expected = diffattn::detail::converted_bias<T>(bias(head, query, first + i, n_q, n_k));
            same &= bias_row_same(row[static_cast<std::size_t>(i) + 1], expected);
          }
          kept &= row.front() == T(77) && row.back() == T(77);
        }
      }
    }
  }
  CHECK(same);
  CHECK(kept);
}

template <typename Bias>
void check_bias_rows(const Bias& bias, Index heads = 2, Index n_q = 5, Index n_k = 37) {
  check_bias_rows_as<float>(bias, heads, n_q, n_k);
  check_bias_rows_as<double>(bias, heads, n_q, n_k);
}

}  // namespace

TEST_CASE("A row of biases is what each pair has", "[kernels][bias]") {
  auto rng = support::make_rng();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  check_bias_rows(AlibiBias{0.37});
  check_bias_rows(AlibiBias(std::vector<double>{0.1, -3}));
  check_bias_rows(AlibiBias{1.0 / 3}, 1, 3, 3000);
  check_bias_rows(AlibiBias{1e-37});
  check_bias_rows(AlibiBias{1e37});  // more than a float holds, from some distance on
  check_bias_rows(AlibiBias{1e308});
  check_bias_rows(AlibiBias{kInfinity});
  check_bias_rows(PaddingBias{11});
  check_bias_rows(PaddingBias{0});
  check_bias_rows(PaddingBias{1000});
  auto matrix = support::random_matrix<double>(10, 37, rng);
  check_bias_rows(MatrixBias(matrix));
  const diffattn::Matrix<float> in_float = matrix.cast<float>();
  check_bias_rows(MatrixBias(in_float));
  const Eigen::MatrixXd by_columns = matrix;
  check_bias_rows(MatrixBias(by_columns));
  matrix(3, 5) = -kInfinity;
  matrix(3, 6) = kInfinity;
  matrix(3, 7) = -1e300;
  matrix(3, 8) = 1e300;
  matrix(4, 20) = std::numeric_limits<double>::quiet_NaN();
  check_bias_rows(MatrixBias(matrix));
  check_bias_rows([](Index head, Index query, Index key, Index n_q, Index n_k) {
    return 0.1 * static_cast<double>(head - query + key * n_q) / static_cast<double>(n_k);
  });
  check_bias_rows([](Index, Index query, Index key, Index, Index) { return static_cast<int>(query - key); });
  check_bias_rows(
      [](Index, Index query, Index key, Index, Index) { return static_cast<long double>(query - key) / 3; });
}

TEST_CASE("A row of a learned bias is what each pair has, however far its table reaches", "[kernels][bias]") {
  auto rng = support::make_rng();
  for (const Index reach : {0, 1, 4, 36, 50}) {
    INFO("reach " << reach);
    const auto table = support::random_matrix<float>(2, 2 * reach + 1, rng);
    check_bias_rows(RelativeBias(table));
    const Eigen::MatrixXd by_columns = table.cast<double>();
    check_bias_rows(RelativeBias(by_columns), 2, 37, 5);
    check_bias_rows(IndexedBias(table, [&](Index q, Index k, Index n_q, Index n_k) {
      return static_cast<int>((3 * q + 5 * k + n_q + n_k) % table.cols());
    }));
  }
}

TEST_CASE("A row of the bias of a mask is what each pair has: nested, joined, shifted", "[kernels][bias]") {
  auto rng = support::make_rng();
  constexpr double kLowest = std::numeric_limits<double>::lowest(), kInfinity = std::numeric_limits<double>::infinity();
  auto matrix = support::random_matrix<double>(5, 50, rng);
  matrix.row(1).setConstant(kLowest);
  matrix.row(2).setConstant(-kInfinity);
  matrix(0, 3) = kInfinity;
  auto second = support::random_matrix<float>(5, 50, rng);
  second.row(1).setConstant(std::numeric_limits<float>::lowest());
  second(0, 3) = -std::numeric_limits<float>::infinity();
  const auto table = support::random_matrix<float>(2, 9, rng);
  const auto once = with_bias(CausalMask{}, MatrixBias(second));
  const auto twice = with_bias(once, MatrixBias(matrix));
  const auto same_twice = with_bias(once, MatrixBias(second));
  const auto thrice = both(twice, with_bias(FullMask{}, RelativeBias(table)));
  const auto integer = with_bias(
      with_bias(once, [](Index, Index, Index key, Index, Index) { return static_cast<int>(key); }), AlibiBias{0.1});
  const auto first_only = both(once, CausalMask{});
  const auto second_only = both(CausalMask{}, twice);
  const auto check = [](const auto& mask) {
    using Mask = std::remove_cvref_t<decltype(mask)>;
    check_bias_rows(BiasOfMask<Mask>{mask}, 2, 5, 50);
    const diffattn::detail::ShiftedMask<Mask> shifted{mask, 13};
    check_bias_rows(BiasOfMask<diffattn::detail::ShiftedMask<Mask>>{shifted}, 2, 5, 37);
  };
  check(once);
  check(twice);
  check(same_twice);
  check(thrice);
  check(integer);
  check(first_only);
  check(second_only);
}

TEST_CASE("A bias that fills rows is asked for rows, one that does not for pairs", "[kernels][bias]") {
  struct Rows {
    double operator()(Index, Index, Index key, Index, Index) const { return -0.1 * static_cast<double>(key); }
    void fill(double* row, const BiasRow& of) const {
      ++*calls;
      for (Index i = 0; i < of.count; ++i) row[i] = -0.1 * static_cast<double>(of.first_key + i);
    }
    int* calls;
  };
  auto rng = support::make_rng();
  const auto q = support::random_matrix<float>(30, 8, rng), k = support::random_matrix<float>(40, 8, rng);
  int calls = 0;
  const auto pairs = [](Index, Index, Index key, Index, Index) { return -0.1 * static_cast<double>(key); };
  CHECK(support::identical(diffattn::attention(q, k, k, with_bias(CausalMask{}, Rows{&calls})),
                           diffattn::attention(q, k, k, with_bias(CausalMask{}, pairs))));
  CHECK(calls == 30);
}
