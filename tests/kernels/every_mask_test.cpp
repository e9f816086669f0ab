// Every mask with every bias in every kernel, several heads at once: forward, gradients, and decoding from pages, some
// of which have been dropped. Each head against the oracle, under what the mask is to that head.

#include <array>
#include <string>
#include <vector>

#include "diffattn/kernels/decode.hpp"
#include "kernels/backward.hpp"
#include "kernels/grid.hpp"
#include "kernels/pages.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"

using namespace support;
using diffattn::Heads;
using diffattn::Workspace;

namespace {

constexpr Index kHeads = 4, kKvHeads = 2, kWidth = 6, kValueWidth = 10;

std::vector<RangeMask> every_range(Index n_k) {
  return {{FullMask{}},
          {CausalMask{}},
          {SlidingWindowMask{5}},
          {SlidingWindowMask{n_k / 2 + 1}},
          {PrefixMask{3}},
          {PrefixMask{n_k / 2 + 1}},
          {PaddingMask{0}},
          {PaddingMask{n_k / 2 + 1}},
          {both(SlidingWindowMask{n_k / 4 + 2}, PaddingMask{std::max<Index>(n_k - 3, 0)})},
          {both(PrefixMask{n_k / 2}, SlidingWindowMask{n_k / 3 + 1})}};
}

/// A bias and what it adds, head by head, for n_q queries and n_k keys.
template <typename Scalar>
struct AddedBias {
  AnyBias<Scalar> bias;
  std::array<Matrix<Exact>, kHeads> dense;
};

/// `matrix` has the biases of one head below the other and outlives the result.
template <typename Scalar>
std::vector<AddedBias<Scalar>> every_bias(const Matrix<Scalar>& matrix, Index n_q, Index n_k) {
  // Small: what is far below 0 has lost digits of its score before any kernel sees it.
  const std::vector<double> slopes = {0.06, 0.02, 0, -0.01};
  std::vector<AddedBias<Scalar>> all = {{{AlibiBias{0.03125}}, {}},
                                        {{AlibiBias{slopes}}, {}},
                                        {{HidingBias{n_k / 2 + 1}}, {}},
                                        {{MatrixBias(matrix.topRows(n_q))}, {}},
                                        {{MatrixBias(matrix)}, {}}};
  for (Index head = 0; head < kHeads; ++head) {
    const auto h = static_cast<std::size_t>(head);
    for (auto& one : all) one.dense[h] = dense(one.bias, n_q, n_k, head);
    for (Index i = 0; i < n_q; ++i) {
      for (Index j = 0; j < n_k; ++j) {
        all[1].dense[h](i, j) = -static_cast<Exact>(slopes[h]) * static_cast<Exact>(std::abs(i + n_k - n_q - j));
      }
    }
    all[3].dense[h] = matrix.topRows(n_q).template cast<Exact>();
    all[4].dense[h] = matrix.middleRows(head * n_q, n_q).template cast<Exact>();
  }
  return all;
}

/// Calls f(mask, dense), dense[h] what it adds for head h, for every mask, alone and with every bias.
template <typename Scalar, typename F>
void for_every_mask(Index n_q, Index n_k, Rng& rng, const F& f) {
  const Matrix<Scalar> matrix = random_bias<Scalar>(kHeads * n_q, n_k, rng);
  const auto biases = every_bias(matrix, n_q, n_k);
  std::size_t number = 0;
  for (const RangeMask& range : every_range(n_k)) {
    const Matrix<Exact> shown = dense(range, n_q, n_k);
    INFO("mask " << number);
    std::array<Matrix<Exact>, kHeads> of_heads;
    of_heads.fill(shown);
    f(range, of_heads);
    // Not each with each: every one of both several times, in different company from shape to shape.
    for (std::size_t b = 0; b < biases.size(); ++b) {
      if ((b + number + static_cast<std::size_t>(n_q)) % 3 != 0) continue;
      INFO("bias " << b);
      for (std::size_t h = 0; h < kHeads; ++h) of_heads[h] = shown + biases[b].dense[h];
      f(with_bias(range, biases[b].bias), of_heads);
    }
    ++number;
  }
}

/// Operands of all heads. key_maps: 2 where each map has keys of its own.
template <typename Scalar>
struct AllHeads {
  AllHeads(Index n_q, Index n_k, Index maps, Rng& rng)
      : key_maps(maps),
        q(random_matrix<Scalar>(n_q, kHeads * 2 * kWidth, rng)),
        k(random_matrix<Scalar>(n_k, kKvHeads * maps * kWidth, rng)),
        v(random_matrix<Scalar>(n_k, kKvHeads * kValueWidth, rng)),
        lambda(random_matrix<Scalar>(n_q, kHeads, rng)) {}

  /// Differential head h, or, of the same columns, standard head h.
  Operands<Scalar> head(Index h, bool differential) const {
    const Index g = h / (kHeads / kKvHeads), step = differential ? 2 : 1;
    Operands<Scalar> x;
    x.q1 = q.middleCols(step * h * kWidth, kWidth);
    x.k1 = k.middleCols(g * key_maps * kWidth, kWidth);
    x.q2 = q.middleCols((step * h + step - 1) * kWidth, kWidth);
    x.k2 = k.middleCols((g * key_maps + key_maps - 1) * kWidth, kWidth);
    x.v = v.middleCols(g * kValueWidth, kValueWidth);
    x.lambda = differential ? Vector<Scalar>(lambda.col(h)) : Vector<Scalar>(Vector<Scalar>::Zero(q.rows()));
    return x;
  }

  Index key_maps;
  Matrix<Scalar> q, k, v, lambda;
};

template <typename Scalar>
void check_heads(const Matrix<Scalar>& out, const AllHeads<Scalar>& x, bool differential,
                 const std::array<Matrix<Exact>, kHeads>& bias) {
  for (Index h = 0; h < kHeads; ++h) {
    INFO("head " << h);
    const Operands<Scalar> one = x.head(h, differential);
    const Expected expected =
        expect(one, Vector<Exact>(one.lambda.template cast<Exact>()), bias[static_cast<std::size_t>(h)]);
    CHECK(worst_error<Scalar>(out.middleCols(h * kValueWidth, kValueWidth), expected.value, expected.magnitude) <=
          kErrorFactor);
  }
}

/// Few keys, a few queries, many queries, more queries than keys, more keys than a chunk.
std::vector<Shape> call_shapes() {
  return {{1, 3, 0, 0}, {4, 7, 0, 0}, {6, 20, 0, 0}, {3, 300, 0, 0}, {40, 300, 0, 0}, {61, 20, 0, 0}, {26, 600, 0, 0}};
}

}  // namespace

TEMPLATE_TEST_CASE("Every mask and bias works forward, head by head", "[kernels][mask][bias]", DIFFATTN_TEST_SCALARS) {
  const Heads heads{kHeads, kKvHeads};
  for (const Shape& shape : call_shapes()) {
    INFO(describe(shape));
    Rng rng = make_rng();
    const AllHeads<TestType> two_maps(shape.n_q, shape.n_k, 2, rng), shared(shape.n_q, shape.n_k, 1, rng);
    for_every_mask<TestType>(shape.n_q, shape.n_k, rng, [&](const auto& mask, const auto& bias) {
      Workspace workspace;
      Matrix<TestType> out(shape.n_q, kHeads * kValueWidth);
      diffattn::multihead_diff_attention_into(out, two_maps.q, two_maps.k, two_maps.v, two_maps.lambda, heads, mask, {},
                                              workspace);
      check_heads(out, two_maps, true, bias);
      diffattn::multihead_attention_into(out, shared.q.leftCols(kHeads * kWidth), shared.k, shared.v, heads, mask, {},
                                         workspace);
      check_heads(out, shared, false, bias);
    });
  }
}

TEMPLATE_TEST_CASE("Every mask and bias works backward, head by head", "[kernels][mask][bias]", DIFFATTN_TEST_SCALARS) {
  constexpr double kBound = 225 * static_cast<double>(std::numeric_limits<TestType>::epsilon());
  for (const Shape& shape : {Shape{4, 7, 0, 0}, Shape{30, 300, 0, 0}, Shape{61, 20, 0, 0}}) {
    INFO(describe(shape));
    Rng rng = make_rng();
    const AllHeads<TestType> x(shape.n_q, shape.n_k, 2, rng);
    const auto dout = random_matrix<TestType>(shape.n_q, kHeads * kValueWidth, rng);
    for_every_mask<TestType>(shape.n_q, shape.n_k, rng, [&](const auto& mask, const auto& bias) {
      Workspace workspace;
      Matrix<TestType> dq(x.q.rows(), x.q.cols()), dk(x.k.rows(), x.k.cols()), dv(x.v.rows(), x.v.cols());
      Matrix<TestType> dlambda(shape.n_q, kHeads);
      diffattn::multihead_diff_attention_backward_into({dq, dk, dv, dlambda}, x.q, x.k, x.v, x.lambda, dout,
                                                       Heads{kHeads, kKvHeads}, mask, {}, workspace);
      for (Index h = 0; h < kHeads; h += kHeads / kKvHeads) {  // key head by key head
        INFO("head " << h);
        Gradients<Exact> expected;
        for (Index i = h; i < h + kHeads / kKvHeads; ++i) {
          const Matrix<TestType> of_head = dout.middleCols(i * kValueWidth, kValueWidth);
          const Gradients<Exact> one = expect_gradients(DiffAttentionPerRowBackward{}, x.head(i, true), of_head,
                                                        bias[static_cast<std::size_t>(i)]);
          Gradients<TestType> own;
          own[0] = dq.middleCols(2 * i * kWidth, kWidth);
          own[2] = dq.middleCols((2 * i + 1) * kWidth, kWidth);
          own[5] = dlambda.col(i);
          CHECK(gradient_error(own, {one[0], {}, one[2], {}, {}, one[5]}) <= kBound);
          for (const std::size_t part : {1U, 3U, 4U}) {
            expected[part] = i == h ? one[part] : Matrix<Exact>(expected[part] + one[part]);
          }
        }
        const Index g = h / (kHeads / kKvHeads);
        Gradients<TestType> sums;
        sums[1] = dk.middleCols(2 * g * kWidth, kWidth);
        sums[3] = dk.middleCols((2 * g + 1) * kWidth, kWidth);
        sums[4] = dv.middleCols(g * kValueWidth, kValueWidth);
        CHECK(gradient_error(sums, expected) <= kBound);
      }
    });
  }
}

TEMPLATE_TEST_CASE("Every mask and bias works in decoding, as if all keys stood in one piece", "[kernels][decode]",
                   DIFFATTN_TEST_SCALARS) {
  struct Call {
    Index first, count, dropped;  // queries, and pages that are no longer there
  };
  // A token at a time, before and behind the end of a page; a few; a chunk; a prompt. With and without what came first.
  for (const Call& call : {Call{0, 1, 0}, Call{255, 1, 0}, Call{256, 1, 0}, Call{256, 1, 1}, Call{599, 1, 2},
                           Call{298, 3, 1}, Call{400, 40, 0}, Call{520, 10, 1}, Call{0, 260, 0}}) {
    INFO(call.count << " queries behind " << call.first << " tokens, " << call.dropped << " pages dropped");
    Rng rng = make_rng();
    const Index n_q = call.count, n_k = call.first + call.count;
    const AllHeads<TestType> two_maps(n_q, n_k, 2, rng), shared(n_q, n_k, 1, rng);
    Pages<TestType> pages(two_maps.k, two_maps.v, kKvHeads, 2, rng);
    Pages<TestType> shared_pages(shared.k, shared.v, kKvHeads, 1, rng);
    pages.drop(call.dropped);
    shared_pages.drop(call.dropped);
    for_every_mask<TestType>(n_q, n_k, rng, [&](const auto& mask, auto bias) {
      for (auto& of_head : bias) of_head.leftCols(pages.packed.first_key).setConstant(kHidden);
      Workspace workspace;
      Matrix<TestType> out(n_q, kHeads * kValueWidth);
      const Heads heads{kHeads, kKvHeads};
      diffattn::decode_diff_attention_into(out, two_maps.q, pages.packed, two_maps.lambda, heads, mask, {}, workspace);
      check_heads(out, two_maps, true, bias);
      diffattn::decode_attention_into(out, shared.q.leftCols(kHeads * kWidth), shared_pages.packed, heads, mask, {},
                                      workspace);
      check_heads(out, shared, false, bias);
    });
  }
}

TEMPLATE_TEST_CASE("What a padding or a window hides is not even read", "[kernels][mask]", DIFFATTN_TEST_SCALARS) {
  const Index n_q = 40, n_k = 5000, shown = 100, d = 6;
  Rng rng = make_rng();
  const auto q = random_matrix<TestType>(n_q, 2 * d, rng), k = random_matrix<TestType>(n_k, 2 * d, rng);
  const auto v = random_matrix<TestType>(n_k, d, rng), dout = random_matrix<TestType>(n_q, d, rng);
  struct Result {
    Matrix<TestType> out;
    Gradients<TestType> gradients;
    std::size_t memory;
  };
  const auto run = [&](const Matrix<TestType>& keys, const Matrix<TestType>& values, const RangeMask& mask) {
    const Operands<TestType> x = {q.leftCols(d),     keys.leftCols(d), q.rightCols(d),
                                  keys.rightCols(d), values,           Vector<TestType>::Constant(n_q, 0.5)};
    Result result;
    Workspace workspace;
    result.out.resize(n_q, d);
    diffattn::diff_attention_into(result.out, x.q1, x.k1, x.q2, x.k2, x.v, 0.5, mask, {}, workspace);
    result.memory = workspace.capacity();
    result.gradients = DiffAttentionBackward{}(x, dout, mask);
    return result;
  };
  // As if the padding were not there, to the bit and to the byte.
  const Result padded = run(k, v, {PaddingMask{shown}});
  const Result without = run(k.topRows(shown), v.topRows(shown), {FullMask{}});
  CHECK(identical(padded.out, without.out));
  CHECK(padded.memory == without.memory);
  for (const std::size_t i : {0U, 2U, 5U}) CHECK(identical(padded.gradients[i], without.gradients[i]));
  for (const std::size_t i : {1U, 3U, 4U}) {
    CHECK(identical(padded.gradients[i].topRows(shown), without.gradients[i]));
    CHECK(padded.gradients[i].bottomRows(n_k - shown).isZero(0));
  }
  // In front of a window, keys that are not numbers do not even make the call take the slow way.
  Matrix<TestType> bad_k = k, bad_v = v;
  bad_k.topRows(n_k / 2).setConstant(kNaN<TestType>);
  bad_v.topRows(n_k / 2).setConstant(kNaN<TestType>);
  const Result clean = run(k, v, {SlidingWindowMask{shown}}), bad = run(bad_k, bad_v, {SlidingWindowMask{shown}});
  CHECK(identical(bad.out, clean.out));
  CHECK(identical(bad.gradients, clean.gradients));
}

TEST_CASE("A value that a bias hides does not come out of a page", "[kernels][decode]") {
  const Index n_k = 300, bad = 270;
  for (const Index n_q : {1, 3, 40}) {
    INFO(n_q << " queries");
    Rng rng = make_rng();
    const AllHeads<float> x(n_q, n_k, 2, rng);
    Matrix<float> bias = Matrix<float>::Zero(kHeads * n_q, n_k);
    bias.col(bad).setConstant(-kInf<float>);
    bias(n_q, bad) = 0;  // but for the first query of head 1
    const RangeMask full{FullMask{}};
    const auto mask = with_bias(full, AnyBias<float>{MatrixBias(bias)});
    const auto decode = [&](const Matrix<float>& v) {
      const Pages<float> pages(x.k, v, kKvHeads, 2, rng);
      Workspace workspace;
      Matrix<float> out(n_q, kHeads * kValueWidth);
      diffattn::decode_diff_attention_into(out, x.q, pages.packed, 0.5f, Heads{kHeads, kKvHeads}, mask, {}, workspace);
      return out;
    };
    const Matrix<float> clean = decode(x.v);
    Matrix<float> v = x.v;
    v.row(bad).setConstant(kNaN<float>);
    const Matrix<float> out = decode(v);
    for (Index h = 0; h < kHeads; ++h) {
      for (Index i = 0; i < n_q; ++i) {
        const auto row = out.block(i, h * kValueWidth, 1, kValueWidth);
        if (h == 1 && i == 0) {
          CHECK(row.array().isNaN().all());
        } else {
          CHECK(row.isApprox(clean.block(i, h * kValueWidth, 1, kValueWidth), 1e-5f));
        }
      }
    }
  }
}
