// Gradients are overwritten: where no query sees a key, its gradient is 0 and not what was there before.

#include "kernels/backward.hpp"
#include "support/catch.hpp"

using namespace support;

TEST_CASE("The gradient of keys that no query sees is 0, whatever was there before") {
  const Index n_q = 12, n_k = 700, d = 5, dv = 6, window = 7, seen = n_q + window - 1;
  Rng rng = make_rng();
  const auto q = random_matrix<double>(n_q, 4 * d, rng), k = random_matrix<double>(n_k, 4 * d, rng);
  const auto v = random_matrix<double>(n_k, 2 * dv, rng), dout = random_matrix<double>(n_q, 2 * dv, rng);
  Matrix<double> dq = Matrix<double>::Constant(n_q, 4 * d, 7), dk = Matrix<double>::Constant(n_k, 4 * d, 7);
  Matrix<double> dv_sum = Matrix<double>::Constant(n_k, 2 * dv, 7);
  double dlambda = 7;
  diffattn::Workspace workspace;
  const auto run = [&](const RangeMask& mask) {
    diffattn::multihead_diff_attention_backward_into({dq, dk, dv_sum, dlambda}, q, k, v, 0.5, dout,
                                                     diffattn::Heads{2, 2}, mask, {}, workspace);
  };
  run({SlidingWindowMask{window}});
  CHECK(dk.topRows(n_k - seen).isZero(0));
  CHECK(dv_sum.topRows(n_k - seen).isZero(0));
  CHECK((dk.bottomRows(seen).array() != 0).all());
  CHECK((dv_sum.bottomRows(seen).array() != 0).all());

  run({SlidingWindowMask{0}});
  for (const Matrix<double>* gradient : {&dq, &dk, &dv_sum}) CHECK(gradient->isZero(0));
  CHECK(dlambda == 0);
}
