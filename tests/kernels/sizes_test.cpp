// Sizes that only a Map with a stride of 0 can have, and masks at the ends of what an Index can be: an error or the
// right result, and nothing that wraps around.

#include <limits>

#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "kernels/operands.hpp"
#include "support/catch.hpp"
#include "support/tolerances.hpp"

using namespace support;
using namespace diffattn;

namespace {

constexpr Index kMax = std::numeric_limits<Index>::max();
using Endless = Eigen::Map<const Matrix<float>, 0, Eigen::OuterStride<>>;

}  // namespace

TEST_CASE("Operands that no memory holds are refused") {
  const std::vector<float> row(64, 0.5f);
  const Matrix<float> q = Matrix<float>::Random(8, 16);
  Workspace workspace;
  for (const Index n : {Index{1} << 43, Index{1} << 48, Index{1} << 55, Index{1} << 59, Index{1} << 60}) {
    INFO(n << " keys");
    const Endless k(row.data(), n, 16, Eigen::OuterStride<>(0));
    Matrix<float> out(8, 16);
    const SlidingWindowMask few{4};
    CHECK_THROWS_AS(attention_into(out, q, k, k, few, {}, workspace), std::invalid_argument);
    CHECK_THROWS_AS(diff_attention_into(out, q, k, q, k, k, 0.5f, few, {}, workspace), std::invalid_argument);
    CHECK_THROWS_AS(multihead_diff_attention_into(Matrix<float>(8, 16), q, k, k, 0.5f, Heads{4, 4}, few, {}, workspace),
                    std::invalid_argument);
    AttentionGradients<float> grad;
    DiffAttentionGradients<float, float> diff_grad;
    CHECK_THROWS_AS(attention_backward_into(grad, q, k, k, q, few, {}, workspace), std::invalid_argument);
    CHECK_THROWS_AS(diff_attention_backward_into(diff_grad, q, k, q, k, k, 0.5f, q, few, {}, workspace),
                    std::invalid_argument);
    CHECK_THROWS_AS(attention_into(out, k, q, q, few, {}, workspace), std::invalid_argument);
  }
  for (const Index heads : {Index{1} << 61, Index{1} << 62, kMax, Index{-3}}) {
    Matrix<float> out(8, 16);
    CHECK_THROWS_AS(multihead_attention_into(out, q, q, q, Heads{heads, 0}, FullMask{}, {}, workspace),
                    std::invalid_argument);
    CHECK_THROWS_AS(multihead_diff_attention_into(out, q, q, q, 0.5f, Heads{heads, heads}, FullMask{}, {}, workspace),
                    std::invalid_argument);
  }
}

TEST_CASE("A window of any size is a window") {
  Rng rng = make_rng();
  const auto x = random_operands<float>({9, 30, 8, 8}, rng);
  const auto attend = [&](const auto& mask) { return diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, 0.5f, mask); };
  const Matrix<float> causal = attend(CausalMask{});
  for (const Index window : {Index{30}, Index{1} << 62, kMax - 30, kMax - 1, kMax}) {
    INFO("window " << window);
    CHECK(identical(attend(SlidingWindowMask{window}), causal));
  }
  CHECK_THROWS_AS(attend(SlidingWindowMask{-1}), std::invalid_argument);
  CHECK_THROWS_AS(attend(SlidingWindowMask{std::numeric_limits<Index>::min()}), std::invalid_argument);
}

TEST_CASE("Masks count to the end of what an Index can be") {
  const auto same = [](const KeyRange& a, const KeyRange& b) { return a.begin == b.begin && a.end == b.end; };
  CHECK(same(CausalMask{}.visible_keys(4, 5, kMax), {0, kMax}));
  CHECK(same(CausalMask{}.visible_keys(0, 5, kMax), {0, kMax - 4}));
  CHECK(same(CausalMask{}.visible_keys(0, kMax, 3), {0, 0}));
  CHECK(same(CausalMask{}.visible_keys(kMax - 1, kMax, 3), {0, 3}));
  CHECK(same(SlidingWindowMask{4}.visible_keys(4, 5, kMax), {kMax - 4, kMax}));
  CHECK(same(SlidingWindowMask{kMax}.visible_keys(4, 5, kMax), {0, kMax}));
  CHECK(same(SlidingWindowMask{kMax}.visible_keys(0, kMax, 3), {0, 0}));
  CHECK(AlibiBias{0.5}(0, 4, kMax - 1, 5, kMax) == 0);
  CHECK(AlibiBias{0.5}(0, 4, kMax - 3, 5, kMax) == -1);
}
