#include <limits>
#include <vector>

#include "diffattn/kernels/detail/mask_view.hpp"
#include "support/catch.hpp"

namespace {

using namespace diffattn;

/// The view answers every question as the mask does.
template <typename Scalar, typename Mask>
void check_viewed_mask(const Mask& mask, Index n_q, Index n_k) {
  const detail::MaskView<Scalar, detail::HasBias<Mask>> view(mask);
  CHECK(view.same_for_all_heads(n_q) == detail::same_for_all_heads(mask, n_q));
  for (Index query = 0; query < n_q; ++query) {
    const KeyRange asked = mask.visible_keys(query, n_q, n_k), seen = view.visible_keys(query, n_q, n_k);
    CHECK(seen.begin == asked.begin);
    CHECK(seen.end == asked.end);
    if constexpr (detail::HasBias<Mask>) {
      for (Index head = 0; head < 2; ++head) {
        std::vector<Scalar> row(static_cast<std::size_t>(n_k), Scalar(77));
        view.fill_bias(row.data() + 1, {head, query, 1, n_k - 1, n_q, n_k});
        CHECK(row[0] == Scalar(77));
        for (Index key = 1; key < n_k; ++key) {
          const auto expected = detail::bias_of<Scalar>(mask, head, query, key, n_q, n_k);
          CHECK(row[static_cast<std::size_t>(key)] == expected);
          CHECK(view.bias(head, query, key, n_q, n_k) == expected);
        }
      }
    }
  }
}

TEST_CASE("a view of a mask answers as the mask does", "[kernels][mask]") {
  check_viewed_mask<float>(SlidingWindowMask{3}, 4, 7);
  check_viewed_mask<double>(PrefixMask{2}, 3, 5);
  check_viewed_mask<float>(both(SlidingWindowMask{3}, PaddingMask{5}), 4, 7);
  check_viewed_mask<float>(with_bias(CausalMask{}, AlibiBias(alibi_slopes(2))), 4, 7);
  check_viewed_mask<double>(with_bias(FullMask{}, AlibiBias(0.5)), 4, 7);
}

TEST_CASE("a view keeps -inf, and what its scalar cannot hold is the lowest or the largest", "[kernels][mask]") {
  using Limits = std::numeric_limits<double>;
  const auto extremes = [](Index head, Index /*query*/, Index key, Index /*n_q*/, Index /*n_k*/) {
    const double numbers[] = {0.1, -Limits::infinity(), Limits::lowest(), Limits::max(), Limits::infinity()};
    return numbers[(head + key) % 5];
  };
  check_viewed_mask<float>(with_bias(FullMask{}, extremes), 2, 11);
  check_viewed_mask<double>(with_bias(FullMask{}, extremes), 2, 11);
  const auto mask = with_bias(FullMask{}, extremes);
  const detail::MaskView<float, true> view(mask);
  CHECK(view.bias(0, 0, 1, 1, 5) == -std::numeric_limits<float>::infinity());
  CHECK(view.bias(0, 0, 2, 1, 5) == std::numeric_limits<float>::lowest());
  CHECK(view.bias(0, 0, 3, 1, 5) == std::numeric_limits<float>::max());
}

TEST_CASE("the commonest masks stand for themselves, others for a view", "[kernels][mask]") {
  STATIC_REQUIRE(std::is_same_v<detail::ViewedMask<float, CausalMask>, const CausalMask&>);
  STATIC_REQUIRE(std::is_same_v<detail::ViewedMask<float, FullMask>, const FullMask&>);
  STATIC_REQUIRE(std::is_same_v<detail::ViewedMask<float, SlidingWindowMask>, detail::MaskView<float, false>>);
  using Biased = BiasedMask<CausalMask, AlibiBias>;
  STATIC_REQUIRE(std::is_same_v<detail::ViewedMask<double, Biased>, detail::MaskView<double, true>>);
  using View = detail::MaskView<float, true>;
  STATIC_REQUIRE(std::is_same_v<detail::ViewedMask<float, View>, const View&>);
}

}  // namespace
