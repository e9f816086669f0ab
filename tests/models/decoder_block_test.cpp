#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/models/decoder_block.hpp>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/tolerances.hpp"

namespace {

using diffattn::Index;
using diffattn::Matrix;
using Block = diffattn::DecoderBlock<double, diffattn::MultiheadDiffAttention<double>>;

Block random_block(support::Rng& rng) {
  Block block({.embed_dim = 16, .num_heads = 2, .rotary = diffattn::RotaryConfig{}}, 20, 1e-3);
  visit_parameters(
      block, [&](std::string_view, auto& p) { p = 0.4 * support::random_matrix<double>(p.rows(), p.cols(), rng); });
  return block;
}

/// With a mask, or with a cache and a mask.
template <typename... MaskOrCache>
Matrix<double> in_place(const Block& block, Matrix<double> x, MaskOrCache&&... how) {
  diffattn::Workspace workspace;
  diffattn::Serial executor;
  diffattn::MatrixMap<double> rows(x.data(), x.rows(), x.cols());
  block.forward_in_place(rows, how..., workspace, executor);
  return x;
}

Matrix<double> with_tape(const Block& block, const Matrix<double>& x, const std::vector<Index>& lengths) {
  diffattn::Workspace workspace;
  diffattn::Serial executor;
  Block::Tape tape;
  Matrix<double> y(x.rows(), x.cols());
  block.forward_into(y, x, diffattn::CausalMask{}, lengths, tape, workspace, executor);
  return y;
}

}  // namespace

TEST_CASE("A block adds attention, then feed-forward, of the rows that its norms give", "[models][decoder_block]") {
  auto rng = support::make_rng();
  const Block block = random_block(rng);
  const Matrix<double> x = support::random_matrix<double>(9, 16, rng);
  const Matrix<double> attended = x + block.attention.forward(block.attention_norm.forward(x));
  const Matrix<double> expected = attended + block.feed_forward.forward(block.feed_forward_norm.forward(attended));

  const Matrix<double> y = in_place(block, x, diffattn::CausalMask{});
  CHECK(y.isApprox(expected, 1e-13));
  CHECK(support::identical(with_tape(block, x, {9}), y));

  diffattn::KvCache<double> cache;
  CHECK(in_place(block, x.topRows(5), cache, diffattn::CausalMask{}).isApprox(y.topRows(5), 1e-13));
  CHECK(in_place(block, x.bottomRows(4), cache, diffattn::CausalMask{}).isApprox(y.bottomRows(4), 1e-13));
  CHECK(cache.position() == 9);
}

TEST_CASE("A block's stacked sequences do not see each other", "[models][decoder_block]") {
  auto rng = support::make_rng();
  const Block block = random_block(rng);
  const Matrix<double> x = support::random_matrix<double>(9, 16, rng);
  const Matrix<double> y = with_tape(block, x, {5, 0, 4});
  CHECK(y.topRows(5).isApprox(in_place(block, x.topRows(5), diffattn::CausalMask{}), 1e-13));
  CHECK(y.bottomRows(4).isApprox(in_place(block, x.bottomRows(4), diffattn::CausalMask{}), 1e-13));
}
