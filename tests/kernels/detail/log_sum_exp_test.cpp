// The log-sum-exp that the drivers write for the backward pass: against its definition, for every driver and map.

#include "diffattn/kernels/detail/forward/differential_block.hpp"
#include "diffattn/kernels/detail/forward/head_schedule.hpp"
#include "diffattn/kernels/detail/forward/standard_block.hpp"
#include "kernels/oracle.hpp"
#include "support/catch.hpp"
#include "support/tolerances.hpp"

using namespace diffattn;
using namespace support;

namespace {

constexpr Index kQueryHeads = 2;

/// log2 Σ 2^(score · log2(e)) of every row and query head; both heads read the same keys.
template <typename Scalar>
Matrix<Exact> expected(const Matrix<Scalar>& q, const Matrix<Scalar>& k, const RangeMask& mask, Exact scale) {
  const Index d = k.cols();
  const Matrix<Exact> bias = dense(mask, q.rows(), k.rows());
  Matrix<Exact> result(q.rows(), kQueryHeads);
  for (Index h = 0; h < kQueryHeads; ++h) {
    const Matrix<Exact> scores =
        scale * q.middleCols(h * d, d).template cast<Exact>() * k.template cast<Exact>().transpose() + bias;
    result.col(h) = scores.array().exp().rowwise().sum().log() / std::log(Exact(2));
  }
  return result;
}

template <typename Block, typename Scalar>
void check(const Shape& shape, const RangeMask& mask) {
  INFO(describe(shape));
  constexpr Index kMaps = Block::kMaps;
  Rng rng = make_rng(static_cast<unsigned>(shape.n_q));
  const Matrix<Scalar> v = random_matrix<Scalar>(shape.n_k, shape.dv, rng);
  std::vector<Matrix<Scalar>> q, k, lse(kMaps, Matrix<Scalar>::Constant(shape.n_q, kQueryHeads, Scalar(-7)));
  Matrix<Scalar> out(shape.n_q, kQueryHeads * shape.dv);
  detail::HeadOperands<Scalar, kMaps> in;
  for (Index map = 0; map < kMaps; ++map) {
    q.push_back(random_matrix<Scalar>(shape.n_q, kQueryHeads * shape.d, rng));
    k.push_back(random_matrix<Scalar>(shape.n_k, shape.d, rng));
  }
  for (Index map = 0; map < kMaps; ++map) {
    const auto i = static_cast<std::size_t>(map);
    in.q[map] = detail::view_of(q[i]);
    in.k[map] = detail::view_of(k[i]);
    in.lse[map] = detail::writable_view_of(lse[i]);
  }
  in.out = detail::writable_view_of(out);
  in.v = detail::view_of(v);
  in.lambda.constant = Scalar(0.5);
  in.heads = {kQueryHeads, 1};
  in.d = in.q_step = in.k_step = shape.d;
  in.dv = shape.dv;
  in.scale = Scalar(0.25);
  Workspace workspace;
  Serial serial;
  detail::run_heads<Block>(in, mask, workspace, serial);

  for (std::size_t i = 0; i < q.size(); ++i) {
    const Matrix<Exact> exact = expected(q[i], k[i], mask, 0.25L);
    for (Index r = 0; r < shape.n_q; ++r) {
      for (Index h = 0; h < kQueryHeads; ++h) {
        if (std::isinf(exact(r, h))) {
          CHECK(lse[i](r, h) == -std::numeric_limits<Scalar>::infinity());
        } else {
          const auto error = std::abs(static_cast<Exact>(lse[i](r, h)) - exact(r, h));
          CHECK(error <= 16 * kUnitRoundoff<Scalar> * (1 + std::abs(exact(r, h))));
        }
      }
    }
  }
}

template <typename Block, typename Scalar>
void check_drivers() {
  for (const RangeMask& mask : {RangeMask{FullMask{}}, RangeMask{CausalMask{}}, RangeMask{SlidingWindowMask{3}}}) {
    check<Block, Scalar>({1, 600, 8, 4}, mask);     // a few rows
    check<Block, Scalar>({2, 1, 8, 4}, mask);       // a few rows, of which one sees nothing
    check<Block, Scalar>({50, 600, 16, 33}, mask);  // blocks
    check<Block, Scalar>({50, 9, 16, 33}, mask);    // blocks, of which some see nothing
    check<Block, Scalar>({5, 0, 8, 4}, mask);       // nothing at all
  }
}

}  // namespace

TEST_CASE("the log-sum-exp of differential attention", "[kernels]") {
  check_drivers<detail::DifferentialBlock<float>, float>();
}

TEST_CASE("the log-sum-exp of standard attention", "[kernels]") {
  check_drivers<detail::StandardBlock<double>, double>();
}
