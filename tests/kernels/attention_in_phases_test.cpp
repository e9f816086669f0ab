// Differential attention in two phases: shares of parts of the keys add up to the whole.

#include "diffattn/kernels/attention_in_phases.hpp"

#include "kernels/pages.hpp"
#include "kernels/parts.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

using namespace support;
using diffattn::DiffSoftmaxStatistics;
using diffattn::PartialAttention;
using diffattn::Workspace;

namespace {

using Statistics = DiffSoftmaxStatistics<float>;

/// share(first_key, count, exchange) for each part twice: as long as not all statistics are known, exchange collects
/// them; then it hands them out.
template <typename Share>
Matrix<float> sum_of_shares(Index n_k, Matrix<float> zero, const Share& share) {
  std::optional<Statistics> all;
  for_each_part(n_k, [&](Index first, Index count) {
    share(first, count, [&](Statistics& own) {
      all = all ? Statistics{merge(all->first, own.first), merge(all->second, own.second)} : own;
    });
  });
  for_each_part(n_k,
                [&](Index first, Index count) { zero += share(first, count, [&](Statistics& own) { own = *all; }); });
  return zero;
}

void check_heads(const Matrix<float>& out, const ManyHeads& x, const auto& mask) {
  for (Index head = 0; head < x.heads.num_heads; ++head) {
    const Expected expected = x.expected(head, mask, true);
    CHECK(worst_error<float>(out.middleCols(head * x.kDv, x.kDv), expected.value, expected.magnitude) <= kErrorFactor);
  }
}

template <typename Mask>
void check_shares(const ManyHeads& x, const Mask& mask) {
  Workspace workspace;
  const Matrix<float> zero = Matrix<float>::Zero(x.q.rows(), x.heads.num_heads * x.kDv);
  const Matrix<float> out = sum_of_shares(x.k.rows(), zero, [&](Index first, Index count, const auto& exchange) {
    Statistics statistics;
    Matrix<float> share(zero.rows(), zero.cols());
    diffattn::multihead_diff_attention_in_phases_into(share, statistics, x.q, x.k.middleRows(first, count),
                                                      x.v.middleRows(first, count), x.lambda, x.heads, exchange,
                                                      MaskOfPart<Mask>{mask, first, x.k.rows()}, {}, workspace);
    return share;
  });
  check_heads(out, x, mask);
}

}  // namespace

TEST_CASE("Shares of differential attention add up to the whole", "[kernels]") {
  const std::vector<std::pair<Index, Index>> sizes = {{1, 700}, {3, 40}, {7, 8}, {6, 20}, {60, 300}, {60, 30}, {5, 0}};
  for (const auto& [n_q, n_k] : sizes) {
    for (const Heads& heads : {Heads{2, 2, 2}, Heads{4, 1, 2}}) {
      INFO(n_q << " x " << n_k << ", " << heads.num_heads << " heads");
      Rng rng = make_rng();
      check_shares(ManyHeads(n_q, n_k, heads, 2, rng), RangeMask{CausalMask{}});
      check_shares(ManyHeads(n_q, n_k, heads, 1, rng), with_bias(RangeMask{CausalMask{}}, BiasOfHeads{}));
    }
  }
}

TEST_CASE("Without an exchange the phases are diff_attention and hand out its statistics", "[kernels]") {
  for (const Index n_q : {1, 6, 50}) {
    for (const Heads& heads : {Heads{2, 2, 2}, Heads{4, 1, 2}}) {
      Rng rng = make_rng(1);
      const ManyHeads x(n_q, 90, heads, 2, rng);
      Workspace workspace;
      Statistics statistics;
      Matrix<float> out(n_q, x.heads.num_heads * x.kDv);
      Index calls = 0;
      diffattn::multihead_diff_attention_in_phases_into(
          out, statistics, x.q, x.k, x.v, 0.75, x.heads, [&](Statistics&) { ++calls; }, CausalMask{}, {}, workspace);
      CHECK(calls == 1);
      const Matrix<float> all = diffattn::multihead_diff_attention(x.q, x.k, x.v, 0.75, x.heads, CausalMask{});
      CHECK((out - all).cwiseAbs().maxCoeff() <= 4e-6f);
      const auto maps = diffattn::multihead_partial_diff_attention(x.q, x.k, x.v, x.heads, CausalMask{});
      for (const auto& [got, expected] :
           {std::pair(statistics.first, maps.first.statistics), std::pair(statistics.second, maps.second.statistics)}) {
        const Matrix<float> error = diffattn::log_sum_exp(got) - diffattn::log_sum_exp(expected);
        CHECK(error.cwiseAbs().maxCoeff() <= 1e-5f);
      }
    }
  }
}

namespace {

/// Keys in the pages of one cache for every part.
template <typename Storage, typename Mask>
void check_cached_shares(const ManyHeads& x, const Mask& mask, Index key_maps, Rng& rng) {
  Workspace workspace;
  const Matrix<float> zero = Matrix<float>::Zero(x.q.rows(), x.heads.num_heads * x.kDv);
  const Matrix<float> out = sum_of_shares(x.k.rows(), zero, [&](Index first, Index count, const auto& exchange) {
    const Pages<Storage> pages(x.k.middleRows(first, count).eval(), x.v.middleRows(first, count).eval(),
                               x.heads.num_kv_heads, key_maps, rng);
    Statistics statistics;
    Matrix<float> share(zero.rows(), zero.cols());
    diffattn::decode_diff_attention_in_phases_into(share, statistics, x.q, pages.packed, x.lambda, x.heads, exchange,
                                                   MaskOfPart<Mask>{mask, first, x.k.rows()}, {}, workspace);
    return share;
  });
  check_heads(out, x, mask);
}

}  // namespace

TEST_CASE("Shares of decoding add up to the whole", "[kernels]") {
  for (const Index n_q : {1, 4, 20}) {
    for (const Heads& heads : {Heads{2, 2, 2}, Heads{4, 1, 2}}) {
      INFO(n_q << " queries, " << heads.num_heads << " heads");
      Rng rng = make_rng(2);
      check_cached_shares<float>(ManyHeads(n_q, 900, heads, 2, rng), RangeMask{CausalMask{}}, 2, rng);
      check_cached_shares<float>(ManyHeads(n_q, 90, heads, 1, rng), RangeMask{SlidingWindowMask{20}}, 1, rng);
    }
  }
}

TEST_CASE("Parts of decoding with standard heads merge to the whole", "[kernels]") {
  for (const Index n_q : {1, 20}) {
    Rng rng = make_rng(3);
    const ManyHeads x(n_q, 600, {4, 2, 4}, 1, rng, 1);
    Workspace workspace;
    std::vector<PartialAttention<float>> parts;
    for_each_part(600, [&](Index first, Index count) {
      const Pages<float> pages(x.k.middleRows(first, count).eval(), x.v.middleRows(first, count).eval(), 2, 1, rng);
      diffattn::decode_partial_attention_into(parts.emplace_back(), x.q, pages.packed, x.heads,
                                              MaskOfPart<RangeMask>{{CausalMask{}}, first, 600}, {}, workspace);
    });
    const auto whole = diffattn::merge(std::span<const PartialAttention<float>>(parts));
    for (Index head = 0; head < 4; ++head) {
      const Expected expected = x.expected(head, CausalMask{}, false);
      CHECK(worst_error<float>(whole.out.middleCols(head * x.kDv, x.kDv), expected.value, expected.magnitude) <=
            kErrorFactor);
    }
  }
}

TEST_CASE("What goes wrong between the phases reaches the caller", "[kernels]") {
  Rng rng = make_rng(4);
  const ManyHeads x(3, 20, {2, 2, 2}, 2, rng);
  Workspace workspace;
  Statistics statistics;
  Matrix<float> out(3, 24);
  const auto call = [&](auto&& exchange) {
    diffattn::multihead_diff_attention_in_phases_into(out, statistics, x.q, x.k, x.v, 0.5, x.heads, exchange,
                                                      FullMask{}, {}, workspace);
  };
  CHECK(thrown_by<std::runtime_error>([&] { call([](Statistics&) { throw std::runtime_error("gone"); }); }) == "gone");
  CHECK_FALSE(workspace.in_use());
  CHECK(thrown_by<diffattn::ShapeError>([&] { call([](Statistics& own) { own.second.l.resize(1, 2); }); }) ==
        "multihead_diff_attention_in_phases: l, as exchange left it, must be 3 x 2, got 1 x 2");
}
