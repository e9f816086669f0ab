// Attention against packed pages: the oracle, for one query, a few and many, every storage type and any executor.

#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/kernels/decode.hpp>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/oracle.hpp"
#include "kernels/pages.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

using namespace support;
using diffattn::Heads;
using diffattn::ShapeError;
using diffattn::Workspace;

namespace {

template <typename Storage, typename Scalar>
Matrix<Scalar> stored(const Matrix<Scalar>& m) {
  return m.template cast<Storage>().template cast<Scalar>();
}

RangeMask mask_of(Index window) {
  if (window == 0) return RangeMask{CausalMask{}};
  return RangeMask{SlidingWindowMask{window}};
}

/// Both kernels on one draw, head by head against the oracle on what the storage type makes of keys and values.
template <typename Scalar, typename Storage>
void check(const Shape& shape, Index num_heads, Index num_kv_heads, Index key_maps, Index window) {
  INFO(describe(shape) << ", heads " << num_heads << "/" << num_kv_heads << ", key maps " << key_maps << ", window "
                       << window);
  Rng rng = make_rng();
  const auto q = random_matrix<Scalar>(shape.n_q, 2 * num_heads * shape.d, rng);
  const auto k = random_matrix<Scalar>(shape.n_k, num_kv_heads * key_maps * shape.d, rng);
  const auto v = random_matrix<Scalar>(shape.n_k, num_kv_heads * shape.dv, rng);
  const auto lambda = random_matrix<Scalar>(shape.n_q, num_heads, rng);
  const Pages<Storage> pages(k, v, num_kv_heads, key_maps, rng);
  const Matrix<Scalar> rounded_k = stored<Storage>(k), rounded_v = stored<Storage>(v);
  const auto bias = dense(mask_of(window), shape.n_q, shape.n_k);
  const Index d = shape.d, dv = shape.dv;

  Matrix<Scalar> first;
  diffattn::Serial serial;
  diffattn::ThreadPool pool(3);
  Backwards backwards;
  for (AnyExecutor executor : {AnyExecutor(serial), AnyExecutor(pool), AnyExecutor(backwards)}) {
    Workspace workspace;
    Matrix<Scalar> out = Matrix<Scalar>::Constant(shape.n_q, num_heads * dv, Scalar(7));
    diffattn::decode_diff_attention_into(out, q, pages.packed, lambda, Heads{num_heads, num_kv_heads}, mask_of(window),
                                         {}, workspace, executor);
    if (first.size() == 0) first = out;
    CHECK(identical(out, first));
  }
  for (Index h = 0; h < num_heads; ++h) {
    const Index g = h / (num_heads / num_kv_heads);
    Operands<Scalar> x;
    x.q1 = q.middleCols(2 * h * d, d);
    x.q2 = q.middleCols((2 * h + 1) * d, d);
    x.k1 = rounded_k.middleCols(g * key_maps * d, d);
    x.k2 = rounded_k.middleCols((g * key_maps + key_maps - 1) * d, d);
    x.v = rounded_v.middleCols(g * dv, dv);
    const Expected expected = expect(x, Vector<Exact>(lambda.col(h).template cast<Exact>()), bias);
    CHECK(worst_error<Scalar>(first.middleCols(h * dv, dv), expected.value, expected.magnitude) <= kErrorFactor);
  }

  if (key_maps != 1) return;
  Workspace workspace;
  const Index heads = 2 * num_heads;
  Matrix<Scalar> out(shape.n_q, heads * dv);
  diffattn::decode_attention_into(out, q, pages.packed, Heads{heads, num_kv_heads}, mask_of(window), {}, workspace);
  for (Index h = 0; h < heads; ++h) {
    const Index g = h / (heads / num_kv_heads);
    Operands<Scalar> x;
    x.q1 = q.middleCols(h * d, d);
    x.k1 = rounded_k.middleCols(g * d, d);
    x.v = rounded_v.middleCols(g * dv, dv);
    const Expected expected = expect(x, Vector<Exact>(Vector<Exact>::Zero(shape.n_q)), bias);
    CHECK(worst_error<Scalar>(out.middleCols(h * dv, dv), expected.value, expected.magnitude) <= kErrorFactor);
  }
}

template <typename Scalar, typename Storage>
void check_all() {
  const std::vector<Shape> shapes = {{1, 1, 1, 1},     {1, 700, 64, 128}, {1, 257, 7, 5},  {2, 256, 33, 20},
                                     {3, 513, 16, 40}, {4, 300, 5, 70},   {5, 300, 5, 70}, {26, 40, 12, 9},
                                     {70, 600, 8, 16}, {9, 4, 6, 6},      {3, 2, 6, 6},    {4, 1, 5, 18}};
  for (const Shape& shape : shapes) {
    for (const Index window : {0, 1, 37, 300}) {
      check<Scalar, Storage>(shape, 2, 2, 2, window);
      check<Scalar, Storage>(shape, 3, 1, 1, window);
    }
  }
  check<Scalar, Storage>({1, 300, 10, 12}, 14, 2, 2, 0);
  check<Scalar, Storage>({2, 300, 12, 24}, 7, 7, 1, 0);
  // Several query heads to each of several key heads, page by page and in blocks.
  for (const Index n_q : {1, 3, 5, 26}) {
    check<Scalar, Storage>({n_q, 300, 6, 10}, 4, 2, 2, 0);
    check<Scalar, Storage>({n_q, 300, 6, 10}, 4, 2, 1, 0);
  }
}

}  // namespace

TEST_CASE("Decoding from pages of the scalar's own type agrees with the oracle", "[kernels][decode]") {
  check_all<float, float>();
  check_all<double, double>();
}

TEST_CASE("Decoding from narrower pages agrees with the oracle on what they hold", "[kernels][decode]") {
  check_all<float, Eigen::bfloat16>();
  check_all<float, Eigen::half>();
}

namespace {

/// Keys that are hidden here and there, and a number for all others.
struct PageTestBias {
  float operator()(Index head, Index query, Index key, Index /*n_q*/, Index /*n_k*/) const {
    if ((head + query + 3 * key) % 7 == 0) return -std::numeric_limits<float>::infinity();
    return 0.01f * static_cast<float>(key % 13);
  }
};

/// What pages of `size` tokens give, `dropped` keys having gone from their front: a multiple of all sizes.
template <typename Storage, typename Mask>
Matrix<float> decode_with_pages(Index size, Index n_q, Index n_k, Index dropped, bool shared_keys, const Mask& mask) {
  Rng rng = make_rng();
  const Index heads = 3, d = 9, dv = 37, key_maps = shared_keys ? 1 : 2;
  const auto q = random_matrix<float>(n_q, 2 * 2 * heads * d, rng);
  const auto k = random_matrix<float>(n_k, heads * key_maps * d, rng), v = random_matrix<float>(n_k, heads * dv, rng);
  Pages<Storage> pages(k, v, heads, key_maps, rng, size);
  pages.drop(dropped / size);
  Workspace workspace;
  Matrix<float> out(n_q, 2 * heads * dv);
  diffattn::decode_diff_attention_into(out, q, pages.packed, 0.4f, Heads{2 * heads, heads}, mask, {}, workspace);
  return out;
}

template <typename Storage>
void check_page_sizes() {
  for (const Index n_q : {1, 3, 4, 5, 70}) {
    for (const Index n_k : {90, 1100}) {
      for (const bool shared_keys : {false, true}) {
        INFO(n_q << " queries, " << n_k << " keys, shared " << shared_keys);
        const auto check = [&](const auto& mask, Index dropped) {
          const Matrix<float> usual = decode_with_pages<Storage>(256, n_q, n_k, dropped / 256 * 256, shared_keys, mask);
          for (const Index size : {32, 64, 128, 512, 4096}) {
            INFO("pages of " << size);
            const Index gone = dropped / size * size;  // whole pages, as a cache drops them
            CHECK(identical(decode_with_pages<Storage>(size, n_q, n_k, gone, shared_keys, mask), usual));
          }
        };
        check(CausalMask{}, 0);
        check(with_bias(CausalMask{}, PageTestBias{}), 0);
        if (n_k < 1000) continue;
        const Index dropped = n_k - n_q - 410, window = 411;  // as much as the first query no longer sees
        check(SlidingWindowMask{window}, dropped);
        check(with_bias(SlidingWindowMask{window}, PageTestBias{}), dropped);
      }
    }
  }
}

}  // namespace

TEST_CASE("Pages of any size give the same bits", "[kernels][decode]") {
  check_page_sizes<float>();
  check_page_sizes<Eigen::bfloat16>();
}

TEST_CASE("A value that is not finite stays with its query, whatever the size of a page", "[kernels][decode]") {
  Rng rng = make_rng();
  const Index size = GENERATE(32, 64, 256, 512), n_q = GENERATE(2, 40), n_k = 700, window = 90, bad = 630;
  INFO("pages of " << size << ", " << n_q << " queries");
  const auto q = random_matrix<float>(n_q, 2 * 8, rng), k = random_matrix<float>(n_k, 2 * 8, rng);
  auto v = random_matrix<float>(n_k, 11, rng);
  const auto decode = [&] {
    Pages<float> pages(k, v, 1, 2, rng, size);
    pages.drop((n_k - n_q - window + 1) / size);
    Workspace workspace;
    Matrix<float> out(n_q, 11);
    diffattn::decode_diff_attention_into(out, q, pages.packed, 0.4f, Heads{1, 1}, SlidingWindowMask{window}, {},
                                         workspace);
    return out;
  };
  const Matrix<float> clean = decode();
  v.row(bad).setConstant(std::numeric_limits<float>::infinity());
  const Matrix<float> out = decode();
  for (Index i = 0; i < n_q; ++i) {
    const Index position = n_k - n_q + i;
    const bool sees = bad <= position && position < bad + window;
    CHECK(out.row(i).allFinite() == !sees);
    if (!sees) CHECK((out.row(i) - clean.row(i)).cwiseAbs().maxCoeff() <= 1e-5f);
  }
}

TEST_CASE("What a later key or value holds does not reach an earlier query", "[kernels][decode]") {
  Rng rng = make_rng();
  const Index n_q = GENERATE(3, 60), n_k = 300, d = 8, heads = 3, bad_head = GENERATE(0, 1, 2);
  auto k = random_matrix<float>(n_k, heads * 2 * d, rng), v = random_matrix<float>(n_k, heads * d, rng);
  const auto q = random_matrix<float>(n_q, heads * 2 * d, rng);
  const auto decode = [&] {
    const Pages<float> pages(k, v, heads, 2, rng);
    Workspace workspace;
    Matrix<float> out(n_q, heads * d);
    diffattn::decode_diff_attention_into(out, q, pages.packed, 0.5f, Heads{heads, heads}, CausalMask{}, {}, workspace);
    return out;
  };
  const Matrix<float> clean = decode();
  for (const bool in_key : {false, true}) {
    const auto old_k = k, old_v = v;
    const Index width = in_key ? 2 * d : d;
    (in_key ? k : v)
        .bottomRows(1)
        .middleCols(bad_head * width, width)
        .setConstant(std::numeric_limits<float>::quiet_NaN());
    const Matrix<float> out = decode();
    for (Index head = 0; head < heads; ++head) {
      const auto of_head = out.middleCols(head * d, d), before = clean.middleCols(head * d, d);
      const Index unharmed = head == bad_head ? n_q - 1 : n_q;
      CHECK(of_head.topRows(unharmed).isApprox(before.topRows(unharmed), 1e-5f));
      CHECK(of_head.bottomRows(n_q - unharmed).array().isNaN().all());
    }
    k = old_k;
    v = old_v;
  }
}

TEST_CASE("A value that a window has left behind for some of the queries does not reach them", "[kernels][decode]") {
  struct Case {
    Index n_q, n_k, window, bad;
  };
  Rng rng = make_rng();
  const Index d = 8;
  // In the page before the last, and in the first page that is seen where that is not the first there is.
  for (const Case& c : {Case{40, 300, 280, 5}, Case{40, 600, 320, 260}, Case{3, 600, 300, 299}}) {
    INFO(c.n_q << " queries, " << c.n_k << " keys");
    const auto q = random_matrix<float>(c.n_q, 2 * d, rng), k = random_matrix<float>(c.n_k, 2 * d, rng);
    auto v = random_matrix<float>(c.n_k, d, rng);
    const auto decode = [&] {
      const Pages<float> pages(k, v, 1, 2, rng);
      Workspace workspace;
      Matrix<float> out(c.n_q, d);
      diffattn::decode_diff_attention_into(out, q, pages.packed, 0.5f, Heads{1, 1}, mask_of(c.window), {}, workspace);
      return out;
    };
    const Matrix<float> clean = decode();
    v.row(c.bad).setConstant(std::numeric_limits<float>::quiet_NaN());
    const Matrix<float> out = decode();
    const auto bias = dense(mask_of(c.window), c.n_q, c.n_k);
    CHECK(bias(0, c.bad) == 0);
    CHECK(bias(c.n_q - 1, c.bad) == kHidden);
    for (Index i = 0; i < c.n_q; ++i) {
      if (bias(i, c.bad) == 0) {
        CHECK(out.row(i).array().isNaN().all());
      } else {
        CHECK(out.row(i).isApprox(clean.row(i), 1e-5f));
      }
    }
  }
}

TEST_CASE("What a value holds that a bias hides does not reach a query", "[kernels][decode]") {
  struct Hidden {
    Index key;
    double operator()(Index head, Index query, Index j, Index /*n_q*/, Index /*n_k*/) const {
      return head == 1 && query == 0 && j == key ? -std::numeric_limits<double>::infinity() : 0.0;
    }
  };
  Rng rng = make_rng();
  const Index n_q = GENERATE(2, 20), n_k = 300, d = 8, heads = 2, bad = GENERATE(3, 270);
  const auto q = random_matrix<float>(n_q, heads * 2 * d, rng), k = random_matrix<float>(n_k, 2 * d, rng);
  auto v = random_matrix<float>(n_k, d, rng);
  const auto decode = [&] {
    const Pages<float> pages(k, v, 1, 2, rng);
    Workspace workspace;
    Matrix<float> out(n_q, heads * d);
    diffattn::decode_diff_attention_into(out, q, pages.packed, 0.5f, Heads{heads, 1},
                                         diffattn::with_bias(CausalMask{}, Hidden{bad}), {}, workspace);
    return out;
  };
  const Matrix<float> clean = decode();
  v.row(bad).setConstant(std::numeric_limits<float>::quiet_NaN());
  const Matrix<float> out = decode();
  CHECK(out.block(0, d, 1, d).isApprox(clean.block(0, d, 1, d), 1e-5f));
  CHECK(out.leftCols(d).array().isNaN().all());
  CHECK(out.bottomRows(n_q - 1).array().isNaN().all());
}

TEST_CASE("Decoding refuses what does not fit, before any work", "[kernels][decode]") {
  Rng rng = make_rng();
  const auto k = random_matrix<float>(10, 4 * 6, rng), v = random_matrix<float>(10, 2 * 5, rng);
  const Pages<float> two_maps(k, v, 2, 2, rng);
  Workspace workspace;
  Matrix<float> out = Matrix<float>::Constant(3, 10, 7.0f);
  const auto run = [&](Index q_cols, Heads heads, const RangeMask& mask, Index lambda_cols = 2) {
    diffattn::decode_diff_attention_into(out, Matrix<float>(Matrix<float>::Ones(3, q_cols)), two_maps.packed,
                                         Matrix<float>(Matrix<float>::Ones(3, lambda_cols)), heads, mask, {},
                                         workspace);
  };
  CHECK(thrown_by<ShapeError>([&] {
          run(23, {2, 2}, {CausalMask{}});
        }) == "decode_diff_attention: the columns of q must be a positive multiple of 4, got 23");
  CHECK(thrown_by<ShapeError>([&] {
          run(20, {2, 2}, {CausalMask{}});
        }).find("decode_diff_attention: the cache must hold 2 heads of width 5") == 0);
  CHECK(thrown_by<ShapeError>([&] {
          run(24, {2, 1}, {CausalMask{}});
        }).find("decode_diff_attention: the cache must hold 1 heads of width 6") == 0);
  CHECK(thrown_by<std::invalid_argument>([&] {
          run(24, {2, 2}, {SlidingWindowMask{-3}});
        }) == "decode_diff_attention: the window of SlidingWindowMask must be 0 or more, got -3");
  CHECK(thrown_by<ShapeError>([&] {
          run(24, {2, 2}, {CausalMask{}}, 3);
        }) == "decode_diff_attention: lambda must be 3 x 2, got 3 x 3");
  CHECK(thrown_by<ShapeError>([&] {
          diffattn::decode_attention_into(out, Matrix<float>(Matrix<float>::Ones(3, 12)), two_maps.packed, Heads{2, 2},
                                          CausalMask{}, {}, workspace);
        }) == "decode_attention: the cache must hold one map of keys, got two");
  Matrix<float> narrow(3, 9);
  CHECK(thrown_by<ShapeError>([&] {
          diffattn::decode_diff_attention_into(narrow, Matrix<float>(Matrix<float>::Ones(3, 24)), two_maps.packed, 1.0,
                                               Heads{2, 2}, CausalMask{}, {}, workspace);
        }) == "decode_diff_attention: out must be 3 x 10, got 3 x 9");
  CHECK((out.array() == 7.0f).all());
}

TEST_CASE("Decoding refuses pages of a size that no cache makes", "[kernels][decode]") {
  Rng rng = make_rng();
  const Index size = GENERATE(16, 96, 0);
  Pages<float> pages(random_matrix<float>(20, 8, rng), random_matrix<float>(20, 4, rng), 1, 1, rng);
  pages.packed.shape.page_size = size;
  CHECK(thrown_by<std::invalid_argument>([&] {
          diffattn::decode_attention(random_matrix<float>(1, 8, rng), pages.packed, Heads{1, 1});
        }) ==
        "decode_attention: the pages must be of a power of two of tokens, at least 32, got " + std::to_string(size));
}

TEST_CASE("Decoding many sequences at once gives the bits of each alone", "[kernels][decode]") {
  Rng rng = make_rng();
  constexpr Index n = 5, d = 6, dv = 7, heads = 4, kv_heads = 2;
  std::vector<std::unique_ptr<Pages<float>>> caches;
  std::vector<diffattn::KeyValuePages<float>> packed;
  std::vector<SlidingWindowMask> masks;
  for (const Index n_k : {3, 700, 256, 1, 40}) {
    caches.push_back(std::make_unique<Pages<float>>(random_matrix<float>(n_k, 2 * kv_heads * d, rng),
                                                    random_matrix<float>(n_k, kv_heads * dv, rng), kv_heads, 2, rng));
    packed.push_back(caches.back()->packed);
    masks.push_back({n_k % 2 == 0 ? n_k : 20});
  }
  const auto q = random_matrix<float>(n, 2 * heads * d, rng), lambda = random_matrix<float>(n, heads, rng);
  const std::span<const diffattn::KeyValuePages<float>> all(packed);
  const std::span<const SlidingWindowMask> all_masks(masks);
  Workspace workspace;
  Matrix<float> out(n, heads * dv), expected = out, constant = out;
  for (Index i = 0; i < n; ++i) {
    const auto& pages = packed[static_cast<std::size_t>(i)];
    diffattn::decode_diff_attention_into(expected.middleRows(i, 1), q.middleRows(i, 1), pages, lambda.middleRows(i, 1),
                                         Heads{heads, kv_heads}, masks[static_cast<std::size_t>(i)], {}, workspace);
    diffattn::decode_diff_attention_into(constant.middleRows(i, 1), q.middleRows(i, 1), pages, 0.3f,
                                         Heads{heads, kv_heads}, masks[static_cast<std::size_t>(i)], {}, workspace);
  }
  diffattn::ThreadPool pool(3);
  const auto decode = [&](const auto& l) {
    diffattn::decode_diff_attention_into(out, q, all, l, Heads{heads, kv_heads}, all_masks, {}, workspace, pool);
    return out;
  };
  CHECK(identical(decode(lambda), expected));
  CHECK(identical(decode(0.3f), constant));
  // No sequence is no error.
  diffattn::decode_diff_attention_into(Matrix<float>(0, heads * dv), Matrix<float>(0, 2 * heads * d), all.first(0),
                                       0.3f, Heads{heads, kv_heads}, all_masks.first(0), {}, workspace);

  CHECK(thrown_by<ShapeError>([&] {
          diffattn::decode_diff_attention_into(out, q, all.first(4), 0.3f, Heads{heads, kv_heads}, all_masks, {},
                                               workspace);
        }) == "decode_diff_attention: there must be a cache and a mask for each of the 5 rows of q, got 4 and 5");
  masks[3].window = -1;
  CHECK(thrown_by<std::invalid_argument>([&] { decode(0.3f); }) ==
        "decode_diff_attention: sequence 3: the window of SlidingWindowMask must be 0 or more, got -1");
  masks[3].window = 1;
  const Pages<float> narrow(random_matrix<float>(3, 2 * kv_heads * 5, rng), random_matrix<float>(3, kv_heads * dv, rng),
                            kv_heads, 2, rng);
  packed[2] = narrow.packed;
  CHECK(thrown_by<ShapeError>([&] { decode(0.3f); }) ==
        "decode_diff_attention: sequence 2: the cache is not of the shape of the first one");
}

TEST_CASE("Decoding by the simplest calls: causal, with the thread's workspace", "[kernels][decode]") {
  Rng rng = make_rng();
  const auto k = random_matrix<float>(300, 2 * 6, rng), v = random_matrix<float>(300, 2 * 5, rng);
  const auto q = random_matrix<float>(3, 4 * 6, rng), lambda = random_matrix<float>(3, 2, rng);
  const Pages<float> pages(k, v, 2, 1, rng);
  Workspace workspace;
  Matrix<float> out(3, 20), simple(3, 20), diff_out(3, 10), diff_simple(3, 10);
  diffattn::decode_attention_into(out, q, pages.packed, {4, 2}, CausalMask{}, {}, workspace);
  diffattn::decode_attention_into(simple, q, pages.packed, {4, 2});
  CHECK(identical(simple, out));
  CHECK(identical(diffattn::decode_attention(q, pages.packed, {4, 2}), out));
  diffattn::decode_diff_attention_into(diff_out, q, pages.packed, lambda, {2, 2}, CausalMask{}, {}, workspace);
  diffattn::decode_diff_attention_into(diff_simple, q, pages.packed, lambda, {2, 2});
  CHECK(identical(diff_simple, diff_out));
  CHECK(identical(diffattn::decode_diff_attention(q, pages.packed, lambda, {2, 2}), diff_out));
  CHECK(thrown_by<ShapeError>([&] {
          (void)diffattn::decode_attention(Matrix<float>(q.row(0).transpose().topRows(12)), pages.packed, {2, 2});
        }) ==
        "decode_attention: the columns of q must be a positive multiple of 2, got 1; a single token is a row: did "
        "you mean q.transpose()?");
}
