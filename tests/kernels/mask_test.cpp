// Masks: the ranges and biases they promise, and each of them given to the kernels as itself.

#include "diffattn/kernels/mask.hpp"

#include "kernels/oracle.hpp"
#include "support/catch.hpp"
#include "support/tolerances.hpp"

using namespace support;

namespace {

std::vector<RangeMask> ranges() {
  std::vector<RangeMask> all = {RangeMask{FullMask{}}, RangeMask{CausalMask{}}};
  for (const Index window : {Index{0}, Index{1}, Index{2}, Index{5}, Index{100}, std::numeric_limits<Index>::max()}) {
    all.push_back(RangeMask{SlidingWindowMask{window}});
  }
  return all;
}

}  // namespace

TEST_CASE("A range holds the visible keys, stays inside, and never moves back") {
  for (const RangeMask& mask : ranges()) {
    for (const Index n_q : {1, 2, 5, 9}) {
      for (const Index n_k : {0, 1, 4, 9, 12}) {
        const Matrix<Exact> bias = dense(mask, n_q, n_k);
        KeyRange before{0, 0};
        for (Index i = 0; i < n_q; ++i) {
          const KeyRange keys = mask.visible_keys(i, n_q, n_k);
          INFO("query " << i << " of " << n_q << ", " << n_k << " keys: " << keys.begin << " to " << keys.end);
          CHECK(0 <= keys.begin);
          CHECK(keys.end <= n_k);
          CHECK(before.begin <= keys.begin);
          CHECK(before.end <= keys.end);
          before = keys;
          for (Index j = 0; j < n_k; ++j) CHECK((keys.begin <= j && j < keys.end) == (bias(i, j) == 0));
        }
      }
    }
  }
}

TEST_CASE("The last query stands at the last key") {
  CHECK(CausalMask{}.visible_keys(2, 3, 10).end == 10);
  CHECK(CausalMask{}.visible_keys(0, 3, 10).end == 8);
  CHECK(CausalMask{}.visible_keys(6, 10, 3).end == 0);
  CHECK(CausalMask{}.visible_keys(7, 10, 3).end == 1);
  CHECK(SlidingWindowMask{4}.visible_keys(2, 3, 10).begin == 6);
}

TEST_CASE("Biases add what they say, and nest") {
  CHECK(AlibiBias{0.5}(0, 4, 4, 5, 5) == 0);
  CHECK(AlibiBias{0.5}(0, 4, 1, 5, 5) == -1.5);
  CHECK(AlibiBias{0.5}(0, 0, 3, 1, 6) == -1);
  CHECK(AlibiBias{0.5}(0, 1, 4, 5, 5) == -1.5);  // ahead of the query, as far as behind it
  CHECK(with_bias(FullMask{}, AlibiBias{0.5}).bias(0, 0, 2, 5, 6) == -0.5);
  const Eigen::MatrixXd matrix = Eigen::MatrixXd::Random(4, 6);  // column-major
  CHECK(MatrixBias(matrix)(0, 3, 2, 4, 6) == matrix(3, 2));
  CHECK(MatrixBias(matrix.block(1, 2, 2, 3))(0, 1, 2, 2, 3) == matrix(2, 4));

  const auto nested = with_bias(with_bias(CausalMask{}, AlibiBias{0.5}), MatrixBias(matrix));
  CHECK(nested.visible_keys(1, 4, 6).end == 4);
  CHECK(nested.bias(0, 1, 2, 4, 6) == -0.5 + matrix(1, 2));
}

TEST_CASE("Every mask works as itself") {
  for (const Shape& shape : {Shape{3, 20, 4, 5}, Shape{40, 300, 4, 18}}) {
    INFO(describe(shape));
    Rng rng = make_rng();
    const auto x = random_operands<float>(shape, rng);
    const Matrix<float> matrix = random_matrix<float>(shape.n_q, shape.n_k, rng);
    const auto check = [&](const auto& mask, const Matrix<Exact>& bias) {
      const Expected expected = expect(x, DiffAttention{}.lambda(x), bias);
      const Matrix<float> out = diffattn::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, 0.75, mask);
      CHECK(worst_error<float>(out, expected.value, expected.magnitude) <= kErrorFactor);
    };
    const auto range = [&](const RangeMask& mask) { return dense(mask, shape.n_q, shape.n_k); };
    const auto added = [&](const AnyBias<float>& bias) { return dense(bias, shape.n_q, shape.n_k); };
    check(FullMask{}, range({FullMask{}}));
    check(CausalMask{}, range({CausalMask{}}));
    check(SlidingWindowMask{6}, range({SlidingWindowMask{6}}));
    check(with_bias(SlidingWindowMask{9}, MatrixBias(matrix)),
          range({SlidingWindowMask{9}}) + added({MatrixBias(matrix)}));
    check(with_bias(with_bias(CausalMask{}, AlibiBias{0.125}), HidingBias{shape.n_k - 4}),
          range({CausalMask{}}) + added({AlibiBias{0.125}}) + added({HidingBias{shape.n_k - 4}}));
  }
}

TEST_CASE("A bias matrix may have any layout") {
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
