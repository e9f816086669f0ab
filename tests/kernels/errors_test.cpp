// Arguments that do not fit: what the message says, and that nothing was written.

#include "diffattn/core/error.hpp"
#include "diffattn/kernels/backward.hpp"
#include "kernels/oracle.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

using namespace support;
using Catch::Matchers::ContainsSubstring;
using diffattn::Heads;
using diffattn::ShapeError;
using diffattn::Workspace;

namespace {

/// `call(out)` must throw a ShapeError that says `what`, and leave `out` alone.
template <typename Call>
void check_refused(Index rows, Index cols, const std::string& what, const Call& call) {
  Matrix<float> out = Matrix<float>::Constant(rows, cols, 7);
  CHECK_THAT(thrown_by<ShapeError>([&] { call(out); }), ContainsSubstring(what));
  CHECK((out.array() == 7).all());
}

Matrix<float> ones(Index rows, Index cols) { return Matrix<float>::Ones(rows, cols); }

}  // namespace

TEST_CASE("attention names the operand that does not fit") {
  const Matrix<float> q = ones(5, 4), k = ones(7, 4), v = ones(7, 6);
  const auto refused = [](const std::string& what, const Matrix<float>& q_, const Matrix<float>& k_,
                          const Matrix<float>& v_, Index out_rows = 5, Index out_cols = 6) {
    check_refused(out_rows, out_cols, what,
                  [&](Matrix<float>& out) { diffattn::attention_into(out, q_, k_, v_, FullMask{}); });
  };
  refused("attention: k must be 7 x 4, got 7 x 3", q, ones(7, 3), v);
  refused("attention: k must be 7 x 5, got 7 x 4", ones(5, 5), k, v);
  refused("attention: v must be 7 x 6, got 8 x 6", q, k, ones(8, 6));
  refused("attention: v must be 6 x 6, got 7 x 6", q, ones(6, 4), v);
  refused("attention: out must be 5 x 6, got 4 x 6", q, k, v, 4, 6);
  refused("attention: out must be 5 x 6, got 5 x 7", q, k, v, 5, 7);
  refused("the columns of q must be a positive multiple of 1, got 0", ones(5, 0), ones(7, 0), v);
  refused("the columns of v must be a positive multiple of 1, got 0", q, k, ones(7, 0), 5, 0);
  CHECK_THROWS_AS(diffattn::attention(q, ones(7, 3), v), std::invalid_argument);
  CHECK_THAT(thrown_by<ShapeError>([&] { (void)diffattn::reference::attention(q, ones(7, 3), v); }),
             ContainsSubstring("attention_map: k must be 7 x 4, got 7 x 3") ||
                 ContainsSubstring("attention: k must be 7 x 4, got 7 x 3"));
  CHECK_THAT(thrown_by<ShapeError>([&] { (void)diffattn::reference::attention(q, k, ones(8, 6)); }),
             ContainsSubstring("attention: v must be 7 x 6, got 8 x 6"));
}

TEST_CASE("diff_attention names the operand that does not fit") {
  const Matrix<float> q = ones(5, 4), k = ones(7, 4), v = ones(7, 6), lambda = ones(5, 1);
  const auto refused = [&](const std::string& what, const Matrix<float>& q1, const Matrix<float>& k1,
                           const Matrix<float>& q2, const Matrix<float>& k2, const Matrix<float>& v_,
                           const Matrix<float>& lambda_, Index out_rows = 5, Index out_cols = 6) {
    check_refused(out_rows, out_cols, "diff_attention: " + what, [&](Matrix<float>& out) {
      diffattn::diff_attention_into(out, q1, k1, q2, k2, v_, lambda_, FullMask{});
    });
    if (out_rows == 5 && out_cols == 6 && v_.cols() > 0 && q1.cols() > 0) {
      CHECK_THAT(thrown_by<ShapeError>([&] { (void)diffattn::reference::diff_attention(q1, k1, q2, k2, v_, lambda_); }),
                 ContainsSubstring("diff_attention: " + what));
    }
  };
  refused("k1 must be 7 x 4, got 7 x 3", q, ones(7, 3), q, k, v, lambda);
  refused("q2 must be 5 x 4, got 6 x 4", q, k, ones(6, 4), k, v, lambda);
  refused("q2 must be 5 x 4, got 5 x 8", q, k, ones(5, 8), k, v, lambda);
  refused("k2 must be 7 x 4, got 7 x 8", q, k, q, ones(7, 8), v, lambda);
  refused("k2 must be 7 x 4, got 6 x 4", q, k, q, ones(6, 4), v, lambda);
  refused("v must be 7 x 6, got 5 x 6", q, k, q, k, ones(5, 6), lambda);
  refused("lambda must be 5 x 1, got 7 x 1", q, k, q, k, v, ones(7, 1));
  refused("lambda must be 5 x 1, got 1 x 5", q, k, q, k, v, ones(1, 5));
  refused("lambda must be 5 x 1, got 5 x 2", q, k, q, k, v, ones(5, 2));
  refused("out must be 5 x 6, got 6 x 5", q, k, q, k, v, lambda, 6, 5);
  refused("the columns of q1 must be a positive multiple of 1, got 0", ones(5, 0), ones(7, 0), ones(5, 0), ones(7, 0),
          v, lambda);
  refused("the columns of v must be a positive multiple of 1, got 0", q, k, q, k, ones(7, 0), lambda, 5, 0);
  CHECK_THROWS_AS(diffattn::diff_attention(q, k, q, ones(7, 8), v, 0.5), std::invalid_argument);
}

TEST_CASE("multihead_attention_into names the operand that does not fit") {
  const auto refused = [](const std::string& what, const Matrix<float>& q, const Matrix<float>& k,
                          const Matrix<float>& v, Index out_cols = 24) {
    check_refused(5, out_cols, what, [&](Matrix<float>& out) {
      Workspace workspace;
      diffattn::multihead_attention_into(out, q, k, v, Heads{4, 2}, FullMask{}, {}, workspace);
    });
  };
  refused("the columns of q must be a positive multiple of 4, got 18", ones(5, 18), ones(7, 8), ones(7, 12));
  refused("k must be 7 x 8, got 7 x 16", ones(5, 16), ones(7, 16), ones(7, 12));
  refused("the columns of v must be a positive multiple of 2, got 11", ones(5, 16), ones(7, 8), ones(7, 11));
  refused("v must be 7 x 12, got 6 x 12", ones(5, 16), ones(7, 8), ones(6, 12));
  refused("out must be 5 x 24, got 5 x 12", ones(5, 16), ones(7, 8), ones(7, 12), 12);
}

TEST_CASE("multihead_diff_attention_into names the operand that does not fit") {
  const auto refused = [](const std::string& what, const Matrix<float>& q, const Matrix<float>& k,
                          const Matrix<float>& v, const Matrix<float>& lambda, Index out_cols = 24) {
    check_refused(5, out_cols, what, [&](Matrix<float>& out) {
      Workspace workspace;
      diffattn::multihead_diff_attention_into(out, q, k, v, lambda, Heads{4, 2}, FullMask{}, {}, workspace);
    });
  };
  const Matrix<float> q = ones(5, 16), k = ones(7, 8), v = ones(7, 12), lambda = ones(5, 4);
  refused("the columns of q must be a positive multiple of 8, got 12", ones(5, 12), k, v, lambda);
  refused("k must be 7 x 8, got 7 x 6", q, ones(7, 6), v, lambda);
  refused("the columns of v must be a positive multiple of 2, got 11", q, k, ones(7, 11), lambda);
  refused("v must be 7 x 12, got 5 x 12", q, k, ones(5, 12), lambda);
  refused("lambda must be 5 x 4, got 5 x 1", q, k, v, ones(5, 1));
  refused("lambda must be 5 x 4, got 4 x 5", q, k, v, ones(4, 5));
  refused("out must be 5 x 24, got 5 x 48", q, k, v, lambda, 48);
}

TEST_CASE("What is likely to have been turned is named") {
  const auto says = [](const std::string& what, const auto& call) {
    CHECK_THAT(thrown_by<ShapeError>(call), Catch::Matchers::Equals(what));
  };
  const Matrix<float> q = ones(5, 4), k = ones(7, 4), v = ones(7, 6);
  const auto attend = [](const Matrix<float>& q_, const Matrix<float>& k_, const Matrix<float>& v_) {
    return [=] { (void)diffattn::attention(q_, k_, v_); };
  };
  says("attention: k must be 7 x 5, got 7 x 4; q is 4 x 5: one token a row, did you mean q.transpose()?",
       attend(ones(4, 5), k, v));
  says("attention: k must be 7 x 4, got 4 x 7: one token a row, did you mean k.transpose()?", attend(q, ones(4, 7), v));
  says("attention: v must be 7 x 7, got 6 x 7: one token a row, did you mean v.transpose()?", attend(q, k, ones(6, 7)));
  says(
      "attention: k must be 4 x 5, got 4 x 7: one token a row, did you mean q.transpose(), k.transpose() and "
      "v.transpose()?",
      attend(ones(4, 5), ones(4, 7), ones(6, 7)));
  says(
      "attention: v must be 4 x 7, got 8 x 7: one token a row, did you mean q.transpose(), k.transpose() and "
      "v.transpose()?",
      attend(ones(4, 7), ones(4, 7), ones(8, 7)));
  says("attention: k must be 7 x 1, got 7 x 4; q is 4 x 1: a single query is a row, did you mean q.transpose()?",
       attend(ones(4, 1), k, v));
  // What a transpose alone would not mend is not said to be turned.
  says("attention: k must be 5 x 4, got 5 x 5", attend(q, ones(5, 5), v));
  says("attention: k must be 7 x 4, got 7 x 3", attend(q, ones(7, 3), v));
  says("attention: v must be 7 x 6, got 8 x 6", attend(q, k, ones(8, 6)));

  const auto differ = [&](const Matrix<float>& q1, const Matrix<float>& q2, const Matrix<float>& lambda) {
    return [=] { (void)diffattn::diff_attention(q1, k, q2, k, v, lambda); };
  };
  says(
      "diff_attention: k1 must be 7 x 1, got 7 x 4; q1 is 4 x 1: a single query is a row, did you mean "
      "q1.transpose()?",
      differ(ones(4, 1), ones(4, 1), ones(1, 1)));
  says("diff_attention: q2 must be 5 x 4, got 4 x 5; did you mean q2.transpose()?", differ(q, ones(4, 5), ones(5, 1)));
  says("diff_attention: lambda must be 5 x 1, got 1 x 5; did you mean lambda.transpose()?", differ(q, q, ones(1, 5)));

  const Heads heads{4, 2};
  const auto many = [&](const Matrix<float>& q_, const Matrix<float>& k_, const Matrix<float>& v_) {
    return [=] { (void)diffattn::multihead_diff_attention(q_, k_, v_, 0.5, heads); };
  };
  says(
      "multihead_diff_attention: the columns of q must be a positive multiple of 8, got 1; a single token is a row: "
      "did you mean q.transpose()?",
      many(ones(16, 1), ones(7, 8), ones(7, 12)));
  says(
      "multihead_diff_attention: the columns of q must be a positive multiple of 8, got 5; one token a row: did you "
      "mean q.transpose()?",
      many(ones(16, 5), ones(7, 8), ones(7, 12)));
  // Keys of both maps, and keys that both share.
  for (const Index width : {4, 8}) {
    says("multihead_diff_attention: k must be 9 x 8, got " + std::to_string(width) +
             " x 9: one token a row, did you mean k.transpose()?",
         many(ones(5, 16), ones(width, 9), ones(9, 12)));
  }
}

TEST_CASE("Several heads with their own result: the same errors, before anything is allocated for it") {
  const Matrix<float> x = ones(5, 12);
  CHECK_THROWS_AS(diffattn::multihead_attention(x, x, x, Heads{4, 3}), std::invalid_argument);
  CHECK_THROWS_AS(diffattn::multihead_attention(x, x, ones(5, 11), Heads{4, 2}), ShapeError);
  CHECK_THROWS_AS(diffattn::multihead_diff_attention(x, x, x, 0.5, Heads{0, 0}), std::invalid_argument);
  CHECK_THROWS_AS(diffattn::multihead_attention_backward(x, x, x, ones(5, 11), Heads{4, 4}), ShapeError);
}

TEST_CASE("Gradients of several heads that do not fit are named, and nothing is written") {
  const Matrix<float> q = ones(5, 16), k = ones(7, 8), v = ones(7, 12), lambda = ones(5, 4), dout = ones(5, 24);
  const auto refused = [&](const std::string& what, Index q_cols, Index k_rows, Index v_cols, Index lambda_rows) {
    Matrix<float> dq = ones(5, q_cols), dk = ones(k_rows, 8), dv = ones(7, v_cols), dlambda = ones(lambda_rows, 4);
    Workspace workspace;
    CHECK_THAT(thrown_by<ShapeError>([&] {
                 diffattn::multihead_diff_attention_backward_into({dq, dk, dv, dlambda}, q, k, v, lambda, dout,
                                                                  Heads{4, 2}, FullMask{}, {}, workspace);
               }),
               ContainsSubstring("multihead_diff_attention_backward: " + what));
    for (const Matrix<float>* x : {&dq, &dk, &dv, &dlambda}) CHECK((x->array() == 1).all());
  };
  refused("dq must be 5 x 16, got 5 x 8", 8, 7, 12, 5);
  refused("dk must be 7 x 8, got 5 x 8", 16, 5, 12, 5);
  refused("dv must be 7 x 12, got 7 x 6", 16, 7, 6, 5);
  refused("dlambda must be 5 x 4, got 4 x 4", 16, 7, 12, 4);
  float number = 7;
  Matrix<float> dq = ones(5, 16), dk = ones(7, 8), dv = ones(7, 12);
  Workspace workspace;
  CHECK_THAT(thrown_by<ShapeError>([&] {
               diffattn::multihead_diff_attention_backward_into({dq, dk, dv, number}, q, k, v, lambda, dout,
                                                                Heads{4, 2}, FullMask{}, {}, workspace);
             }),
             ContainsSubstring("dlambda must be 5 x 4, got 1 x 1"));
  CHECK(number == 7);
}

TEST_CASE("Heads that cannot be grouped are refused") {
  const Matrix<float> x = ones(5, 12);
  Matrix<float> out = ones(5, 12);
  for (const Heads& heads : {Heads{4, 3}, Heads{2, 4}, Heads{0, 0}, Heads{-2, 1}, Heads{3, -1}}) {
    Workspace workspace;
    const std::string message = thrown_by<std::invalid_argument>(
        [&] { diffattn::multihead_attention_into(out, x, x, x, heads, FullMask{}, {}, workspace); });
    CHECK_THAT(message, ContainsSubstring("num_kv_heads must divide num_heads"));
    CHECK_THAT(message, ContainsSubstring(std::to_string(heads.num_heads)));
    CHECK_THROWS_AS(diffattn::multihead_diff_attention_into(out, x, x, x, 0.5, heads, FullMask{}, {}, workspace),
                    std::invalid_argument);
  }
}

TEST_CASE("A mask of a negative size is refused") {
  const Matrix<float> x = ones(5, 4);
  Matrix<float> out = Matrix<float>::Constant(5, 4, 7);
  const auto refused = [&](const RangeMask& mask, const std::string& what) {
    const auto biased = with_bias(mask, AnyBias<float>{AlibiBias{1}});
    const auto check = [&](const auto& call) {
      CHECK_THAT(thrown_by<std::invalid_argument>(call), ContainsSubstring(what + " must be 0 or more, got -3"));
      CHECK((out.array() == 7).all());
    };
    check([&] { diffattn::attention_into(out, x, x, x, mask); });
    check([&] { diffattn::diff_attention_into(out, x, x, x, x, x, 0.5, mask); });
    check([&] { diffattn::diff_attention_into(out, x, x, x, x, x, 0.5, biased); });
    check([&] { (void)diffattn::attention_backward(x, x, x, x, mask); });
    check([&] { (void)diffattn::reference::attention(x, x, x, mask); });
    check([&] { (void)diffattn::reference::diff_attention(x, x, x, x, x, 0.5, biased); });
  };
  refused({SlidingWindowMask{-3}}, "the window of SlidingWindowMask");
  refused({PrefixMask{-3}}, "the prefix of PrefixMask");
  refused({PaddingMask{-3}}, "the num_valid of PaddingMask");
  refused({both(SlidingWindowMask{2}, PaddingMask{-3})}, "the num_valid of PaddingMask");
  refused({both(PrefixMask{-3}, SlidingWindowMask{2})}, "the prefix of PrefixMask");
}

TEST_CASE("A bias matrix of another shape is refused") {
  const Matrix<float> q = ones(5, 4), k = ones(7, 4);
  for (const Matrix<float>& bias : {ones(7, 5), ones(5, 6), ones(5, 8), ones(4, 7), ones(5, 0)}) {
    const auto mask = with_bias(FullMask{}, MatrixBias(bias));
    const std::string what =
        "the bias matrix must be 5 x 7, got " + std::to_string(bias.rows()) + " x " + std::to_string(bias.cols());
    check_refused(5, 4, what, [&](Matrix<float>& out) { diffattn::attention_into(out, q, k, k, mask); });
    const auto nested = with_bias(mask, AlibiBias{1});
    check_refused(5, 4, what,
                  [&](Matrix<float>& out) { diffattn::diff_attention_into(out, q, k, q, k, k, 0.5, nested); });
    const auto refused = [&](const auto& call) { CHECK_THAT(thrown_by<ShapeError>(call), ContainsSubstring(what)); };
    refused([&] { (void)diffattn::reference::attention(q, k, k, mask); });
    refused([&] { (void)diffattn::attention_backward(q, k, k, q, mask); });
    refused([&] { (void)diffattn::diff_attention_backward(q, k, q, k, k, 0.5f, q, nested); });
  }
}
