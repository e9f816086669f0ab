// Biases: what each adds to which pair of which head, and what they refuse.

#include "diffattn/kernels/bias.hpp"

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/decode.hpp"
#include "kernels/oracle.hpp"
#include "kernels/pages.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

using namespace support;
using Catch::Matchers::ContainsSubstring;
using diffattn::alibi_slopes;
using diffattn::Heads;
using diffattn::ShapeError;
using diffattn::Workspace;

TEST_CASE("ALiBi counts from the query's own position, with the slope of the head", "[kernels][bias]") {
  CHECK(AlibiBias{0.5}(0, 4, 4, 5, 5) == 0);
  CHECK(AlibiBias{0.5}(0, 4, 1, 5, 5) == -1.5);
  CHECK(AlibiBias{0.5}(0, 0, 3, 1, 6) == -1);
  CHECK(AlibiBias{0.5}(0, 1, 4, 5, 5) == -1.5);  // ahead of the query, as far as behind it
  CHECK(AlibiBias{0.5}(7, 4, 1, 5, 5) == -1.5);
  const AlibiBias three(std::vector<double>{0.5, 0.25, -1});
  for (const Index head : {0, 1, 2}) CHECK(three(head, 4, 1, 5, 5) == -3 * three.slope(head));
  CHECK(three.slope(1) == 0.25);
  CHECK(three.slope(2) == -1);
}

TEST_CASE("The slopes of ALiBi are the published ones", "[kernels][bias]") {
  CHECK(alibi_slopes(1) == std::vector<double>{1.0 / 256});
  CHECK(alibi_slopes(2) == std::vector<double>{1.0 / 16, 1.0 / 256});
  CHECK(alibi_slopes(8) == std::vector<double>{0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625});
  const std::vector<double> sixteen = alibi_slopes(16);
  REQUIRE(sixteen.size() == 16);
  for (std::size_t i = 0; i < 16; ++i)
    CHECK(std::abs(sixteen[i] - std::pow(0.5, 0.5 * static_cast<double>(i + 1))) < 1e-15);
  // Not a power of two: those of the power below, then every second one of the power above.
  CHECK(alibi_slopes(3) == std::vector<double>{1.0 / 16, 1.0 / 256, 0.25});
  const std::vector<double> twelve = alibi_slopes(12), eight = alibi_slopes(8);
  REQUIRE(twelve.size() == 12);
  for (std::size_t i = 0; i < 12; ++i) CHECK(twelve[i] == (i < 8 ? eight[i] : sixteen[2 * (i - 8)]));
  for (const Index none : {0, -2}) {
    CHECK(thrown_by<std::invalid_argument>([&] { (void)alibi_slopes(none); }) ==
          "alibi_slopes: num_heads must be at least 1, got " + std::to_string(none));
  }
}

TEST_CASE("A bias matrix is read by query and key, and by head where there is one for each", "[kernels][bias]") {
  const Eigen::MatrixXd matrix = Eigen::MatrixXd::Random(4, 6);  // column-major
  CHECK(MatrixBias(matrix)(0, 3, 2, 4, 6) == matrix(3, 2));
  CHECK(MatrixBias(matrix)(5, 3, 2, 4, 6) == matrix(3, 2));
  CHECK(MatrixBias(matrix)(1, 1, 2, 2, 6) == matrix(3, 2));
  CHECK(MatrixBias(matrix)(3, 0, 5, 1, 6) == matrix(3, 5));
  CHECK(MatrixBias(matrix.block(1, 2, 2, 3))(0, 1, 2, 2, 3) == matrix(2, 4));
}

TEST_CASE("A bias matrix may have any layout", "[kernels][bias]") {
  Rng rng = make_rng();
  const auto x = random_operands<double>({20, 30, 4, 5}, rng);
  const Matrix<double> rows = random_matrix<double>(20, 30, rng);
  const Eigen::MatrixXd columns = rows;
  Matrix<double> around = Matrix<double>::Constant(25, 35, std::numeric_limits<double>::quiet_NaN());
  around.block(2, 3, 20, 30) = rows;
  const Matrix<double> expected = DiffAttention{}(x, with_bias(FullMask{}, MatrixBias(rows)));
  CHECK(identical(DiffAttention{}(x, with_bias(FullMask{}, MatrixBias(columns))), expected));
  CHECK(identical(DiffAttention{}(x, with_bias(FullMask{}, MatrixBias(around.block(2, 3, 20, 30)))), expected));
}

TEST_CASE("Biases for other heads, queries or keys are refused before any work", "[kernels][bias]") {
  Rng rng = make_rng();
  const Index n_q = 5, n_k = 7, d = 4, dv = 3;
  const auto q = random_matrix<float>(n_q, 4 * d, rng), k = random_matrix<float>(n_k, 2 * d, rng);
  const auto v = random_matrix<float>(n_k, 2 * dv, rng);
  Workspace workspace;
  // Every door that takes several heads, standard with four, differential with two.
  const auto refused = [&](const auto& four, const auto& two, const std::string& of_four, const std::string& of_two) {
    const auto check = [](const std::string& what, Matrix<float>& out, const auto& call) {
      out.setConstant(7);
      CHECK_THAT(thrown_by<ShapeError>(call), ContainsSubstring(what));
      CHECK((out.array() == 7).all());
    };
    Matrix<float> out(n_q, 4 * dv), diff_out(n_q, 2 * dv), dq(n_q, 4 * d), dk(n_k, 2 * d), dvalues(n_k, 2 * dv);
    const Pages<float> pages(k, v, 2, 1, rng);
    check(of_four, out, [&] { diffattn::multihead_attention_into(out, q, k, v, Heads{4, 2}, four, {}, workspace); });
    check(of_four, out, [&] {
      diffattn::decode_attention_into(out, q, pages.packed, Heads{4, 2}, four, {}, workspace);
    });
    check(of_four, dq, [&] {
      diffattn::multihead_attention_backward_into({dq, dk, dvalues}, q, k, v, out, Heads{4, 2}, four, {}, workspace);
    });
    check(of_two, diff_out, [&] {
      diffattn::multihead_diff_attention_into(diff_out, q, k, v, 0.5f, Heads{2, 2}, two, {}, workspace);
    });
    check(of_two, diff_out, [&] {
      diffattn::decode_diff_attention_into(diff_out, q, pages.packed, 0.5f, Heads{2, 2}, two, {}, workspace);
    });
    float dlambda = 0;
    check(of_two, dq, [&] {
      diffattn::multihead_diff_attention_backward_into({dq, dk, dvalues, dlambda}, q, k, v, 0.5f, diff_out, Heads{2, 2},
                                                       two, {}, workspace);
    });
  };
  const RangeMask full{FullMask{}};
  const auto alibi = [&](Index heads) { return with_bias(full, AnyBias<float>{AlibiBias{alibi_slopes(heads)}}); };
  refused(alibi(2), alibi(4), "the slopes of AlibiBias must be 4, one for every head, got 2",
          "the slopes of AlibiBias must be 2, one for every head, got 4");
  refused(alibi(1), alibi(1), "the slopes of AlibiBias must be 4, one for every head, got 1",
          "the slopes of AlibiBias must be 2, one for every head, got 1");
  CHECK(thrown_by<std::invalid_argument>([] { AlibiBias bias(std::vector<double>{}); }) ==
        "AlibiBias: slopes must hold one for every head, got none");
  for (const auto& [rows, cols] : {std::pair<Index, Index>{15, 7}, {5, 6}, {20, 8}, {7, 5}, {0, 7}}) {
    const Matrix<float> matrix = Matrix<float>::Zero(rows, cols);
    const auto mask = with_bias(full, AnyBias<float>{MatrixBias(matrix)});
    const std::string got =
        " x 7 with one head below the other, got " + std::to_string(rows) + " x " + std::to_string(cols);
    refused(mask, mask, "the bias matrix must be 5 x 7 for all heads, or 20" + got,
            "the bias matrix must be 5 x 7 for all heads, or 10" + got);
  }
  // Nothing is refused that is right.
  Matrix<float> out(n_q, 4 * dv);
  const Matrix<float> all = Matrix<float>::Zero(20, 7);
  CHECK_NOTHROW(diffattn::multihead_attention_into(out, q, k, v, Heads{4, 2}, alibi(4), {}, workspace));
  CHECK_NOTHROW(diffattn::multihead_attention_into(out, q, k, v, Heads{4, 2},
                                                   with_bias(full, AnyBias<float>{MatrixBias(all)}), {}, workspace));
}

TEST_CASE("A padding bias hides what a padding mask hides", "[kernels][bias]") {
  auto rng = make_rng();
  const Matrix<double> q = random_matrix<double>(20, 8, rng), k = random_matrix<double>(30, 8, rng);
  const Matrix<double> v = random_matrix<double>(30, 5, rng);
  const auto of = [&](const auto& mask) { return diffattn::attention(q, k, v, mask); };
  const auto hidden = with_bias(diffattn::FullMask{}, diffattn::PaddingBias{17});
  CHECK(of(hidden).isApprox(of(diffattn::PaddingMask{17}), 1e-14));
  CHECK(of(with_bias(diffattn::FullMask{}, diffattn::PaddingBias{0})).isZero(0));
  CHECK(thrown_by<std::invalid_argument>([&] { of(with_bias(diffattn::FullMask{}, diffattn::PaddingBias{-1})); }) ==
        "attention: num_valid of PaddingBias must be 0 or more, got -1");
}
