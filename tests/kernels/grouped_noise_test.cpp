// Heads that share their second map (Heads::num_noise_heads): what pairs give that have the queries of the noise
// repeated, bit for bit forward, in every kernel and by every way that a call can go; and what it costs.

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/decode.hpp"
#include "kernels/oracle.hpp"
#include "kernels/pages.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/scalars.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

using namespace support;
using diffattn::Heads;
using diffattn::Workspace;

namespace {

constexpr Index kGroupedD = 6, kGroupedDv = 10;

const std::vector<Heads> kGroupedHeads = {{4, 1, 1}, {4, 2, 2}, {6, 1, 2}, {8, 2, 4}, {6, 2, 2}, {3, 1, 3}, {5, 1, 1}};

struct GroupedSize {
  Index n_q, n_k;
};

/// r signal heads and a noise head become r pairs.
template <typename Scalar>
Matrix<Scalar> as_pairs(const Matrix<Scalar>& q, const Heads& heads) {
  const Index r = heads.num_heads / heads.num_noise_heads, d = q.cols() / (heads.num_heads + heads.num_noise_heads);
  Matrix<Scalar> pairs(q.rows(), 2 * heads.num_heads * d);
  for (Index h = 0; h < heads.num_heads; ++h) {
    const Index first = h / r * (r + 1);
    pairs.middleCols(2 * h * d, d) = q.middleCols((first + h % r) * d, d);
    pairs.middleCols((2 * h + 1) * d, d) = q.middleCols((first + r) * d, d);
  }
  return pairs;
}

/// And their gradients back: those of a group's noise queries are added up.
template <typename Scalar>
Matrix<Scalar> as_groups(const Matrix<Scalar>& dpairs, const Heads& heads) {
  const Index r = heads.num_heads / heads.num_noise_heads, d = dpairs.cols() / (2 * heads.num_heads);
  Matrix<Scalar> dq = Matrix<Scalar>::Zero(dpairs.rows(), (heads.num_heads + heads.num_noise_heads) * d);
  for (Index h = 0; h < heads.num_heads; ++h) {
    const Index first = h / r * (r + 1);
    dq.middleCols((first + h % r) * d, d) = dpairs.middleCols(2 * h * d, d);
    dq.middleCols((first + r) * d, d) += dpairs.middleCols((2 * h + 1) * d, d);
  }
  return dq;
}

template <typename Scalar>
struct GroupedOperands {
  GroupedOperands(Index n_q, Index n_k, const Heads& heads, Index key_maps, Rng& rng)
      : q(random_matrix<Scalar>(n_q, (heads.num_heads + heads.num_noise_heads) * kGroupedD, rng)),
        k(random_matrix<Scalar>(n_k, heads.num_kv_heads * key_maps * kGroupedD, rng)),
        v(random_matrix<Scalar>(n_k, heads.num_kv_heads * kGroupedDv, rng)),
        lambda(random_matrix<Scalar>(n_q, heads.num_heads, rng)),
        dout(random_matrix<Scalar>(n_q, heads.num_heads * kGroupedDv, rng)),
        pairs(as_pairs(q, heads)) {}
  Matrix<Scalar> q, k, v, lambda, dout, pairs;
};

/// A bias of the caller's that hides some, the same for all heads or not, and counts how often it is asked.
struct CountedBias {
  bool same;
  Index* asked;

  double operator()(Index head, Index query, Index key, Index n_q, Index n_k) const {
    ++*asked;
    if ((query + n_k - n_q + key) % 7 == 3) return -std::numeric_limits<double>::infinity();
    return 0.1 * static_cast<double>(((same ? 0 : 3 * head) + query + 2 * key) % 5);
  }
  bool same_for_all_heads(Index /*n_q*/) const { return same; }
};

/// Every key, and how often a row's have been asked for.
struct CountedRows {
  Index* asked;

  diffattn::KeyRange visible_keys(Index /*query*/, Index /*n_q*/, Index n_k) const {
    ++*asked;
    return {0, n_k};
  }
};

/// Calls f(mask) with masks that let heads share and one that does not.
template <typename F>
void for_grouped_masks(const F& f) {
  Index asked = 0;
  f(RangeMask{CausalMask{}});
  f(RangeMask{FullMask{}});
  f(RangeMask{SlidingWindowMask{5}});
  f(with_bias(RangeMask{PrefixMask{3}}, CountedBias{true, &asked}));
  f(with_bias(RangeMask{CausalMask{}}, CountedBias{false, &asked}));
}

template <typename F>
void for_grouped_executors(const F& f) {
  diffattn::Serial serial;
  diffattn::ThreadPool pool(3);
  Backwards backwards;
  for (AnyExecutor executor : {AnyExecutor(serial), AnyExecutor(pool), AnyExecutor(backwards)}) f(executor);
}

template <typename Scalar>
bool near(const Matrix<Scalar>& a, const Matrix<Scalar>& b) {
  const Scalar size = std::max(b.cwiseAbs().maxCoeff(), Scalar(1));
  return (a - b).cwiseAbs().maxCoeff() <= 1000 * std::numeric_limits<Scalar>::epsilon() * size;
}

}  // namespace

TEMPLATE_TEST_CASE("Heads that share their noise are pairs with its queries repeated", "[grouped]",
                   DIFFATTN_TEST_SCALARS) {
  using Scalar = TestType;
  for (const GroupedSize& size :
       {GroupedSize{1, 300}, {2, 3}, {3, 9}, {7, 8}, {5, 300}, {70, 300}, {100, 520}, {30, 12}, {4, 0}}) {
    const Index n_q = size.n_q, n_k = size.n_k;
    for (const Heads& heads : kGroupedHeads) {
      for (const Index key_maps : {2, 1}) {
        INFO(n_q << " x " << n_k << ", heads " << heads.num_heads << "/" << heads.num_kv_heads << "/"
                 << heads.num_noise_heads << ", maps of keys " << key_maps);
        Rng rng = make_rng();
        const GroupedOperands<Scalar> x(n_q, n_k, heads, key_maps, rng);
        const Heads of_pairs{heads.num_heads, heads.num_kv_heads};
        for_grouped_masks([&](const auto& mask) {
          Workspace workspace;
          Matrix<Scalar> expected(n_q, heads.num_heads * kGroupedDv);
          diffattn::multihead_diff_attention_into(expected, x.pairs, x.k, x.v, x.lambda, of_pairs, mask, {}, workspace);
          for_grouped_executors([&](AnyExecutor& executor) {
            Workspace own;
            Matrix<Scalar> out(n_q, heads.num_heads * kGroupedDv);
            diffattn::multihead_diff_attention_into(out, x.q, x.k, x.v, x.lambda, heads, mask, {}, own, executor);
            CHECK(identical(out, expected));
            if (executor.concurrency() == 1) CHECK(own.capacity() <= workspace.capacity());
          });
        });
        CHECK(identical(diffattn::multihead_diff_attention(x.q, x.k, x.v, Scalar(0.75), heads),
                        diffattn::multihead_diff_attention(x.pairs, x.k, x.v, Scalar(0.75), of_pairs)));
      }
    }
  }
}

TEST_CASE("A head that shares its noise is what the definition says", "[grouped]") {
  Rng rng = make_rng();
  const Heads heads{6, 1, 2};  // signal 0, 1, 2, noise, signal 3, 4, 5, noise
  const GroupedOperands<double> x(60, 90, heads, 2, rng);
  const Matrix<double> out = diffattn::multihead_diff_attention(x.q, x.k, x.v, x.lambda, heads, CausalMask{});
  const std::array<Index, 6> signal = {0, 1, 2, 4, 5, 6}, noise = {3, 3, 3, 7, 7, 7};
  for (std::size_t h = 0; h < 6; ++h) {
    const Index head = static_cast<Index>(h);
    CHECK(heads.query_head(head, 0) == signal[h]);
    CHECK(heads.query_head(head, 1) == noise[h]);
    Operands<double> one;
    one.q1 = x.q.middleCols(signal[h] * kGroupedD, kGroupedD);
    one.q2 = x.q.middleCols(noise[h] * kGroupedD, kGroupedD);
    one.k1 = x.k.leftCols(kGroupedD);
    one.k2 = x.k.rightCols(kGroupedD);
    one.v = x.v;
    const Expected expected = expect_causal(one, Vector<Exact>(x.lambda.col(head).cast<Exact>()));
    CHECK(worst_error<double>(out.middleCols(head * kGroupedDv, kGroupedDv), expected.value, expected.magnitude) <=
          kErrorFactor);
  }
  CHECK(heads.query_heads() == 8);
  CHECK(Heads{6, 1}.query_heads() == 12);
  CHECK(Heads{6, 1}.query_head(4, 1) == 9);
  CHECK(Heads{6, 1}.query_heads(1) == 6);
  CHECK(Heads{6, 1}.query_head(4, 0, 1) == 4);
}

TEMPLATE_TEST_CASE("Decoding with shared noise is decoding pairs", "[grouped]", float, Eigen::bfloat16) {
  for (const Index n_q : {1, 3, 20}) {
    for (const Heads& heads : kGroupedHeads) {
      for (const Index key_maps : {2, 1}) {
        INFO(n_q << " queries, heads " << heads.num_heads << "/" << heads.num_kv_heads << "/" << heads.num_noise_heads
                 << ", maps of keys " << key_maps);
        Rng rng = make_rng();
        const GroupedOperands<float> x(n_q, 800, heads, key_maps, rng);
        Pages<TestType> pages(x.k, x.v, heads.num_kv_heads, key_maps, rng);
        pages.drop(1);
        const Heads of_pairs{heads.num_heads, heads.num_kv_heads};
        for_grouped_masks([&](const auto& mask) {
          const Matrix<float> expected =
              diffattn::decode_diff_attention(x.pairs, pages.packed, x.lambda, of_pairs, mask);
          for_grouped_executors([&](AnyExecutor& executor) {
            Workspace workspace;
            Matrix<float> out(n_q, heads.num_heads * kGroupedDv);
            diffattn::decode_diff_attention_into(out, x.q, pages.packed, x.lambda, heads, mask, {}, workspace,
                                                 executor);
            CHECK(identical(out, expected));
          });
        });
      }
    }
  }
}

TEMPLATE_TEST_CASE("Gradients of shared noise are those of pairs, added up", "[grouped]", DIFFATTN_TEST_SCALARS) {
  using Scalar = TestType;
  using Gradients = diffattn::MultiheadDiffAttentionGradients<Scalar, Matrix<Scalar>>;
  for (const GroupedSize& size : {GroupedSize{1, 30}, {7, 8}, {110, 300}, {200, 40}, {0, 5}, {5, 0}}) {
    const Index n_q = size.n_q, n_k = size.n_k;
    for (const Heads& heads : kGroupedHeads) {
      for (const Index key_maps : {2, 1}) {
        INFO(n_q << " x " << n_k << ", heads " << heads.num_heads << "/" << heads.num_kv_heads << "/"
                 << heads.num_noise_heads << ", maps of keys " << key_maps);
        Rng rng = make_rng();
        const GroupedOperands<Scalar> x(n_q, n_k, heads, key_maps, rng);
        for_grouped_masks([&](const auto& mask) {
          Gradients expected, first;
          diffattn::multihead_diff_attention_backward_into(expected, x.pairs, x.k, x.v, x.lambda, x.dout,
                                                           Heads{heads.num_heads, heads.num_kv_heads}, mask);
          for_grouped_executors([&](AnyExecutor& executor) {
            Gradients got;
            Workspace workspace;
            diffattn::multihead_diff_attention_backward_into(got, x.q, x.k, x.v, x.lambda, x.dout, heads, mask, {},
                                                             workspace, executor);
            if (first.dv.size() == 0) first = got;
            CHECK(identical(got.dq, first.dq));
            CHECK(identical(got.dk, first.dk));
            CHECK(identical(got.dv, first.dv));
            CHECK(identical(got.dlambda, first.dlambda));
          });
          if (n_q == 0 || n_k == 0) {
            CHECK((first.dq.isZero(0) && first.dk.isZero(0) && first.dv.isZero(0) && first.dlambda.isZero(0)));
            return;
          }
          CHECK(near(first.dq, as_groups(expected.dq, heads)));
          CHECK(near(first.dk, expected.dk));
          CHECK(near(first.dv, expected.dv));
          CHECK(near(first.dlambda, expected.dlambda));
        });
      }
    }
  }
}

TEST_CASE("What a hidden key holds reaches neither result nor gradient of heads that share their noise", "[grouped]") {
  Rng rng = make_rng();
  const Heads heads{4, 1, 1};
  GroupedOperands<double> x(60, 300, heads, 2, rng);
  const RangeMask mask{PaddingMask{290}};
  const auto gradients = [&] {
    return diffattn::multihead_diff_attention_backward(x.q, x.k, x.v, x.lambda, x.dout, heads, mask);
  };
  const Matrix<double> out = diffattn::multihead_diff_attention(x.q, x.k, x.v, x.lambda, heads, mask);
  const auto clean = gradients();
  x.k.row(295).setConstant(kNaN<double>);
  x.v.row(292).setConstant(kInf<double>);
  CHECK(identical(diffattn::multihead_diff_attention(x.q, x.k, x.v, x.lambda, heads, mask), out));
  CHECK(identical(gradients().dq, clean.dq));
  CHECK(identical(gradients().dk, clean.dk));

  // A NaN in the queries of one signal head is that of this head; in the gradients, of what it shares besides.
  x.q(20, 2 * kGroupedD) = kNaN<double>;
  const Matrix<double> spoilt = diffattn::multihead_diff_attention(x.q, x.k, x.v, x.lambda, heads, mask);
  for (Index h = 0; h < 4; ++h) {
    Matrix<double> got = spoilt.middleCols(h * kGroupedDv, kGroupedDv);
    CHECK(got.row(20).array().isNaN().all() == (h == 2));
    got.row(20) = out.row(20).segment(h * kGroupedDv, kGroupedDv);
    CHECK(identical(got, out.middleCols(h * kGroupedDv, kGroupedDv)));
  }
  const auto after = gradients();
  CHECK(after.dq.row(20).segment(2 * kGroupedD, kGroupedD).array().isNaN().all());
  CHECK(near<double>(after.dq.leftCols(2 * kGroupedD), clean.dq.leftCols(2 * kGroupedD)));
  CHECK(near<double>(after.dq.rightCols(kGroupedD), clean.dq.rightCols(kGroupedD)));
}

TEST_CASE("The shared map is computed once for its heads, unless a bias tells them apart", "[grouped]") {
  Rng rng = make_rng();
  const Heads heads{8, 2, 2};
  for (const Index n : {1, 3, 8, 60}) {
    const GroupedOperands<float> x(n, n, heads, 2, rng);
    Pages<float> pages(x.k, x.v, heads.num_kv_heads, 2, rng);
    struct Asked {
      Index rows = 0, biases = 0;
    };
    const auto asked = [&](bool same, const auto& run) {
      Asked count;
      run(with_bias(CountedRows{&count.rows}, CountedBias{same, &count.biases}));
      return count;
    };
    // Of 16 maps 6 are saved. Blocks of rows ask for the biases once for both maps of a head, and for the keys of a row
    // once a map; a few rows ask for the biases of every map.
    const auto check = [&](const auto& run) {
      const Asked apart = asked(false, run), together = asked(true, run);
      CHECK((apart.biases - together.biases >= 6 * n * n || apart.rows - together.rows >= 6 * n));
    };
    check([&](const auto& mask) { diffattn::multihead_diff_attention(x.q, x.k, x.v, 0.5f, heads, mask); });
    check([&](const auto& mask) { diffattn::decode_diff_attention(x.q, pages.packed, 0.5f, heads, mask); });
  }
  Matrix<float> bias = Matrix<float>::Zero(24, 5);
  CHECK(diffattn::MatrixBias(bias).same_for_all_heads(24));
  CHECK_FALSE(diffattn::MatrixBias(bias).same_for_all_heads(6));
  CHECK(AlibiBias{0.5}.same_for_all_heads(3));
  CHECK_FALSE(AlibiBias{std::vector<double>{0.5, 0.25}}.same_for_all_heads(3));
  const auto own = [](Index, Index, Index, Index, Index) { return 0.0; };
  CHECK_FALSE(with_bias(CausalMask{}, own).same_for_all_heads(3));
  CHECK_FALSE(both(with_bias(CausalMask{}, own), PaddingMask{3}).same_for_all_heads(3));
  CHECK(both(with_bias(CausalMask{}, diffattn::PaddingBias{2}), PaddingMask{3}).same_for_all_heads(3));
}

TEST_CASE("Noise heads that cannot be are refused before any work, with what would fit", "[grouped]") {
  const Matrix<float> q = Matrix<float>::Zero(3, 10), k = Matrix<float>::Zero(3, 8), v = Matrix<float>::Zero(3, 4);
  Matrix<float> out = Matrix<float>::Constant(3, 8, 7.0f);
  Rng rng = make_rng();
  const auto refused = [&](const Heads& heads) {
    return thrown_by<std::invalid_argument>(
        [&] { diffattn::multihead_diff_attention_into(out, q, k, v, 0.5f, heads, FullMask{}); });
  };
  const std::string rule =
      "multihead_diff_attention: num_noise_heads must divide num_heads and be a multiple of num_kv_heads, got ";
  CHECK(refused({8, 2, 3}) == rule + "3 for num_heads = 8 and num_kv_heads = 2; num_noise_heads = 2, 4, 8 would fit");
  CHECK(refused({8, 4, 2}) == rule +
                                  "2 for num_heads = 8 and num_kv_heads = 4; num_noise_heads = 4, 8 would fit; "
                                  "num_kv_heads = 1, 2 would fit");
  CHECK(refused({8, 2, 16}) == rule + "16 for num_heads = 8 and num_kv_heads = 2; num_noise_heads = 2, 4, 8 would fit");
  CHECK(refused({8, 2, -2}) == rule + "-2 for num_heads = 8 and num_kv_heads = 2; num_noise_heads = 2, 4, 8 would fit");
  CHECK(refused({4, 0, 2}).find("num_kv_heads = 1, 2 would fit") != std::string::npos);
  CHECK((out.array() == 7.0f).all());
  CHECK(thrown_by<std::invalid_argument>([&] {
          diffattn::multihead_attention(q, q, q, {4, 2, 2});
        }) == "attention: num_noise_heads is for differential attention; standard attention has none, got 2");
  CHECK(thrown_by<diffattn::ShapeError>([&] {
          diffattn::multihead_diff_attention(k, k, v, 0.5f, {4, 2, 2});
        }) == "multihead_diff_attention: the columns of q must be a positive multiple of 6, got 8");
  Pages<float> pages(k, v, 2, 2, rng);
  CHECK_THROWS_AS(diffattn::decode_diff_attention(q, pages.packed, 0.5f, {4, 2, 3}), std::invalid_argument);
  CHECK_THROWS_AS(diffattn::multihead_diff_attention_backward(q, k, v, 0.5f, out, Heads{4, 2, 3}, FullMask{}),
                  std::invalid_argument);
}
