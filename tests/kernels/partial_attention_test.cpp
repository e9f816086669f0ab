// Attention over parts of the keys, put together: what attention over all of them must be, and its (m, l).

#include "diffattn/kernels/partial_attention.hpp"

#include "diffattn/core/parallel_threads.hpp"
#include "kernels/parts.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

using namespace support;
using diffattn::PartialAttention;
using diffattn::PartialDiffAttention;
using diffattn::SoftmaxStatistics;

namespace {

const std::vector<std::pair<Index, Index>> kPartSizes = {{1, 700},  {3, 40},  {7, 8}, {6, 20},
                                                         {60, 300}, {60, 30}, {5, 0}};

/// Every row of statistics against those of the reference in long double.
void check_statistics(const SoftmaxStatistics<float>& statistics, Index head, const Matrix<float>& q,
                      const Matrix<float>& k, const Matrix<Exact>& bias) {
  const auto exact = diffattn::reference::softmax_statistics(q.cast<Exact>().eval(), k.cast<Exact>().eval(),
                                                             with_bias(FullMask{}, MatrixBias(bias)));
  const Matrix<Exact> expected = diffattn::log_sum_exp(exact);
  const Matrix<float> lse = diffattn::log_sum_exp(statistics);
  for (Index i = 0; i < q.rows(); ++i) {
    INFO("row " << i << ", m " << statistics.m(i, head) << ", l " << statistics.l(i, head));
    if (exact.l(i, 0) == 0) {
      CHECK(statistics.m(i, head) == -kInf<float>);
      CHECK(statistics.l(i, head) == 0);
      continue;
    }
    CHECK(std::abs(static_cast<Exact>(lse(i, head)) - expected(i, 0)) <=
          16 * kUnitRoundoff<float> * (1 + std::abs(expected(i, 0))));
    // A score of the row, or one that is no larger: the sum is at least what one key adds.
    CHECK(static_cast<Exact>(statistics.m(i, head)) <= exact.m(i, 0) + 1e-4L);
    CHECK(static_cast<Exact>(statistics.m(i, head)) >= exact.m(i, 0) - 8);
  }
}

Matrix<Exact> bias_of(const RangeMask& mask, Index n_q, Index n_k) { return dense(mask, n_q, n_k); }

template <typename Mask>
void check_merged(const ManyHeads& x, const Mask& mask) {
  std::vector<PartialAttention<float>> parts;
  for_each_part(x.k.rows(), [&](Index first, Index count) {
    parts.push_back(diffattn::multihead_partial_attention(x.q, x.k.middleRows(first, count).eval(),
                                                          x.v.middleRows(first, count), x.heads,
                                                          MaskOfPart<Mask>{mask, first, x.k.rows()}));
  });
  const auto whole = diffattn::merge(std::span<const PartialAttention<float>>(parts));
  for (Index head = 0; head < x.heads.num_heads; ++head) {
    const Expected expected = x.expected(head, mask, false);
    CHECK(worst_error<float>(whole.out.middleCols(head * x.kDv, x.kDv), expected.value, expected.magnitude) <=
          kErrorFactor);
  }
}

template <typename Mask>
void check_merged_maps(const ManyHeads& x, const Mask& mask) {
  std::optional<PartialDiffAttention<float>> whole;
  for_each_part(x.k.rows(), [&](Index first, Index count) {
    const auto part =
        diffattn::multihead_partial_diff_attention(x.q, x.k.middleRows(first, count), x.v.middleRows(first, count),
                                                   x.heads, MaskOfPart<Mask>{mask, first, x.k.rows()});
    whole = whole ? merge(*whole, part) : part;
  });
  const Matrix<float> out = whole->difference(x.lambda);
  for (Index head = 0; head < x.heads.num_heads; ++head) {
    const Expected expected = x.expected(head, mask, true);
    CHECK(worst_error<float>(out.middleCols(head * x.kDv, x.kDv), expected.value, expected.magnitude) <= kErrorFactor);
  }
}

}  // namespace

TEST_CASE("A part of all keys is attention() and the statistics of the reference", "[kernels]") {
  for (const auto& [n_q, n_k] : kPartSizes) {
    for (const RangeMask& mask : {RangeMask{FullMask{}}, RangeMask{CausalMask{}}, RangeMask{SlidingWindowMask{3}}}) {
      INFO(n_q << " x " << n_k);
      Rng rng = make_rng();
      const ManyHeads x(n_q, n_k, {4, 2, 4}, 1, rng, 1);
      const auto part = diffattn::multihead_partial_attention(x.q, x.k, x.v, x.heads, mask);
      CHECK(identical(part.out, diffattn::multihead_attention(x.q, x.k, x.v, x.heads, mask)));
      for (Index head = 0; head < x.heads.num_heads; ++head) {
        check_statistics(part.statistics, head, x.queries(head, 0, 1), x.keys(head, 0), bias_of(mask, n_q, n_k));
      }
    }
  }
}

TEST_CASE("Parts of standard attention merge to the whole", "[kernels]") {
  for (const auto& [n_q, n_k] : kPartSizes) {
    INFO(n_q << " x " << n_k);
    Rng rng = make_rng(1);
    const ManyHeads x(n_q, n_k, {4, 2, 4}, 1, rng, 1);
    check_merged(x, RangeMask{FullMask{}});
    check_merged(x, RangeMask{CausalMask{}});
    check_merged(x, with_bias(RangeMask{CausalMask{}}, BiasOfHeads{}));
  }
}

TEST_CASE("Parts of both maps of differential attention merge to the whole", "[kernels]") {
  for (const auto& [n_q, n_k] : kPartSizes) {
    for (const Heads& heads : {Heads{2, 2, 2}, Heads{4, 1, 2}}) {
      INFO(n_q << " x " << n_k << ", " << heads.num_heads << " heads");
      Rng rng = make_rng(2);
      check_merged_maps(ManyHeads(n_q, n_k, heads, 2, rng), RangeMask{CausalMask{}});
      check_merged_maps(ManyHeads(n_q, n_k, heads, 1, rng), with_bias(RangeMask{CausalMask{}}, BiasOfHeads{}));
    }
  }
}

TEST_CASE("One head, λ a number, and any number of threads", "[kernels]") {
  Rng rng = make_rng(3);
  const auto x = random_operands<float>({30, 300, 8, 12}, rng);
  const auto one = diffattn::partial_diff_attention(x.q1, x.k1.topRows(99), x.q2, x.k2.topRows(99), x.v.topRows(99)),
             two = diffattn::partial_diff_attention(x.q1, x.k1.bottomRows(201), x.q2, x.k2.bottomRows(201),
                                                    x.v.bottomRows(201));
  const Expected expected = expect_full(x, Vector<Exact>::Constant(30, 0.75L));
  CHECK(worst_error<float>(merge(one, two).difference(0.75), expected.value, expected.magnitude) <= kErrorFactor);

  diffattn::ThreadPool pool(3);
  diffattn::Workspace workspace;
  PartialAttention<float> part;
  diffattn::multihead_partial_attention_into(part, x.q1, x.k1.topRows(99), x.v.topRows(99), Heads{1, 1}, FullMask{}, {},
                                             workspace, pool);
  CHECK(identical(part.out, one.first.out));
  CHECK(identical(part.statistics.l, one.first.statistics.l));
}

TEST_CASE("Scores far from each other merge as they would in one softmax", "[kernels]") {
  Matrix<float> q = Matrix<float>::Ones(2, 4), k(6, 4), v(6, 4);
  for (Index j = 0; j < 6; ++j) {
    k.row(j).setConstant(static_cast<float>(j % 2 == 0 ? 40 * j : -40 * j));
    v.row(j).setConstant(static_cast<float>(j + 1));
  }
  const auto whole = merge(diffattn::partial_attention(q, k.topRows(3), v.topRows(3)),
                           diffattn::partial_attention(q, k.bottomRows(3), v.bottomRows(3)));
  CHECK(identical(whole.out, diffattn::attention(q, k, v)));

  // What is not finite in one part is in all: of keys that are seen.
  k(4, 0) = kNaN<float>;
  const auto bad = diffattn::partial_attention(q, k.bottomRows(3), v.bottomRows(3), CausalMask{});
  const auto merged = merge(diffattn::partial_attention(q, k.topRows(3), v.topRows(3)), bad);
  CHECK(merged.out.array().isNaN().all());
  const auto hidden = diffattn::partial_attention(q, k.bottomRows(3), v.bottomRows(3), PaddingMask{1});
  CHECK(merge(diffattn::partial_attention(q, k.topRows(3), v.topRows(3)), hidden).out.allFinite());
}

TEST_CASE("Parts that do not fit are refused", "[kernels]") {
  const Matrix<float> x = Matrix<float>::Ones(3, 4), y = Matrix<float>::Ones(2, 4), z = Matrix<float>::Ones(3, 2);
  const auto of = [](const auto& q, const auto& v) {
    return diffattn::partial_attention(q, Matrix<float>::Ones(3, 4), v);
  };
  CHECK(thrown_by<diffattn::ShapeError>([&] { merge(of(x, x), of(y, x)); }) == "merge: m must be 3 x 1, got 2 x 1");
  CHECK(thrown_by<diffattn::ShapeError>([&] { merge(of(x, x), of(x, z)); }) == "merge: out must be 3 x 4, got 3 x 2");
  CHECK(thrown_by<diffattn::ShapeError>([&] { of(z, x); }) ==
        "multihead_partial_attention: k must be 3 x 2, got 3 x 4: one token a row, did you mean q.transpose(), "
        "k.transpose() and v.transpose()?");
  const auto maps = diffattn::partial_diff_attention(x, x, x, x, x);
  CHECK(thrown_by<diffattn::ShapeError>([&] { maps.difference(x); }) == "difference: lambda must be 3 x 1, got 3 x 4");
  CHECK(thrown_by<diffattn::ShapeError>([&] { diffattn::partial_diff_attention(x, x, y, x, x); }) ==
        "partial_diff_attention: q2 must be 3 x 4, got 2 x 4");
}
