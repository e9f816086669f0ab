// Masks: the ranges and biases they promise, and each of them given to the kernels as itself.

#include "diffattn/kernels/mask.hpp"

#include "kernels/oracle.hpp"
#include "support/catch.hpp"
#include "support/tolerances.hpp"

using namespace support;

namespace {

std::vector<RangeMask> ranges() {
  std::vector<RangeMask> all = {{FullMask{}}, {CausalMask{}}};
  for (const Index window : {Index{0}, Index{1}, Index{2}, Index{5}, Index{100}, std::numeric_limits<Index>::max()}) {
    all.push_back({SlidingWindowMask{window}});
  }
  for (const Index count : {Index{0}, Index{1}, Index{5}, Index{100}, std::numeric_limits<Index>::max()}) {
    all.push_back({PrefixMask{count}});
    all.push_back({PaddingMask{count}});
    for (const Index window : {Index{0}, Index{2}, Index{5}}) {
      all.push_back({both(SlidingWindowMask{window}, PaddingMask{count})});
      all.push_back({both(PrefixMask{count}, SlidingWindowMask{window})});
    }
  }
  return all;
}

}  // namespace

TEST_CASE("A range holds the visible keys, stays inside, and never moves back", "[kernels][mask]") {
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
          CHECK(keys.begin <= keys.end);
          for (Index j = 0; j < n_k; ++j) CHECK((keys.begin <= j && j < keys.end) == (bias(i, j) == 0));
        }
      }
    }
  }
}

TEST_CASE("The last query stands at the last key", "[kernels][mask]") {
  CHECK(CausalMask{}.visible_keys(2, 3, 10).end == 10);
  CHECK(CausalMask{}.visible_keys(0, 3, 10).end == 8);
  CHECK(CausalMask{}.visible_keys(6, 10, 3).end == 0);
  CHECK(CausalMask{}.visible_keys(7, 10, 3).end == 1);
  CHECK(SlidingWindowMask{4}.visible_keys(2, 3, 10).begin == 6);
  CHECK(PrefixMask{4}.visible_keys(0, 3, 10).end == 8);
  CHECK(PrefixMask{9}.visible_keys(0, 3, 10).end == 9);
  CHECK(PrefixMask{9}.visible_keys(2, 3, 10).end == 10);
}

TEST_CASE("Biases of a mask add up", "[kernels][mask]") {
  const Eigen::MatrixXd matrix = Eigen::MatrixXd::Random(4, 6);
  CHECK(with_bias(FullMask{}, AlibiBias{0.5}).bias(0, 0, 2, 5, 6) == -0.5);
  const auto nested = with_bias(with_bias(CausalMask{}, AlibiBias{0.5}), MatrixBias(matrix));
  CHECK(nested.visible_keys(1, 4, 6).end == 4);
  CHECK(nested.bias(0, 1, 2, 4, 6) == -0.5 + matrix(1, 2));

  const auto pair = both(with_bias(CausalMask{}, AlibiBias{0.5}), with_bias(PaddingMask{3}, MatrixBias(matrix)));
  CHECK(pair.visible_keys(1, 4, 6).end == 3);
  CHECK(pair.bias(0, 1, 2, 4, 6) == -0.5 + matrix(1, 2));
  CHECK(both(CausalMask{}, with_bias(FullMask{}, AlibiBias{0.5})).bias(0, 1, 2, 4, 6) == -0.5);
  CHECK(both(with_bias(FullMask{}, AlibiBias{0.5}), CausalMask{}).bias(0, 1, 2, 4, 6) == -0.5);
}

TEST_CASE("The bias of a head reaches that head", "[kernels][mask]") {
  const auto heads = with_bias(FullMask{}, [](Index head, Index, Index, Index, Index) { return 10.0 * double(head); });
  const auto nested = with_bias(heads, AlibiBias{std::vector<double>{1, 2, 3}});
  CHECK(nested.bias(2, 0, 1, 3, 3) == 20 - 3);
  CHECK(both(nested, heads).bias(2, 0, 1, 3, 3) == 20 - 3 + 20);
}

TEST_CASE("A bias of whole numbers hides nothing", "[kernels][mask]") {
  // An integer has no -inf; where a kernel asks whether a key is hidden, 0 must not look like one.
  const auto whole = with_bias(FullMask{}, [](Index, Index, Index key, Index, Index) { return key % 2 == 0 ? 0 : -3; });
  const auto same = [](Index, Index, Index key, Index, Index) { return key % 2 == 0 ? 0.0 : -3.0; };
  for (const Shape& shape : {Shape{3, 5, 4, 5}, Shape{2, 300, 4, 5}, Shape{30, 40, 4, 5}}) {
    INFO(describe(shape));
    Rng rng = make_rng();
    const auto x = random_operands<double>(shape, rng);
    const Matrix<double> expected = diffattn::attention(x.q1, x.k1, x.v, with_bias(FullMask{}, same));
    CHECK(identical(diffattn::attention(x.q1, x.k1, x.v, whole), expected));
    CHECK(diffattn::reference::attention(x.q1, x.k1, x.v, whole).isApprox(expected, 1e-12));
    CHECK(with_bias(whole, same).bias(0, 0, 1, 3, 3) == -6);
  }
}

TEST_CASE("Every mask works as itself", "[kernels][mask]") {
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
    check(PrefixMask{7}, range({PrefixMask{7}}));
    check(PaddingMask{11}, range({PaddingMask{11}}));
    check(both(PaddingMask{11}, CausalMask{}), range({PaddingMask{11}}) + range({CausalMask{}}));
    check(both(with_bias(PrefixMask{3}, AlibiBias{0.125}), with_bias(FullMask{}, MatrixBias(matrix))),
          range({PrefixMask{3}}) + added({AlibiBias{0.125}}) + added({MatrixBias(matrix)}));
    check(both(CausalMask{}, with_bias(PaddingMask{15}, MatrixBias(matrix))),
          range({CausalMask{}}) + range({PaddingMask{15}}) + added({MatrixBias(matrix)}));
    check(with_bias(SlidingWindowMask{9}, MatrixBias(matrix)),
          range({SlidingWindowMask{9}}) + added({MatrixBias(matrix)}));
    check(with_bias(with_bias(CausalMask{}, AlibiBias{0.125}), HidingBias{shape.n_k - 4}),
          range({CausalMask{}}) + added({AlibiBias{0.125}}) + added({HidingBias{shape.n_k - 4}}));
  }
}
