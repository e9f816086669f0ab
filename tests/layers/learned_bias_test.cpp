// Learned biases in the layers: the gradient of their table by differences, decoding, and two models that train one:
// T5's buckets, one table for all layers, and windows of an image as in Swin.

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/multihead_diff_attention_v2.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/training/adamw.hpp"
#include "layers/layer_checks.hpp"
#include "support/allocations.hpp"
#include "support/learned_mask.hpp"
#include "support/numerical_gradient.hpp"

namespace {

using diffattn::AlibiBias;
using diffattn::CausalMask;
using diffattn::FullMask;
using diffattn::Index;
using diffattn::IndexedBias;
using diffattn::KvCache;
using diffattn::Matrix;
using diffattn::PaddingMask;
using diffattn::RelativeBias;
using diffattn::Workspace;
using diffattn::zeros_like;
using support::excess;
using support::LearnedMask;
using support::numerical_gradient;

/// Forward, backward and behind a cache, whatever the layer.
template <typename Layer>
void check_learned_layer(const typename Layer::Config& config) {
  auto rng = make_rng();
  Layer layer(config);
  layer_checks::randomize(layer, rng);
  const Matrix<double> x = random_matrix<double>(23, config.embed_dim, rng);
  const Matrix<double> memory = random_matrix<double>(31, config.embed_dim, rng);
  const Matrix<double> dy = random_matrix<double>(23, config.embed_dim, rng);
  const std::vector<Index> lengths = {9, 0, 1, 13}, memory_lengths = {4, 7, 0, 20};
  Matrix<double> table = random_matrix<double>(config.num_heads, 7, rng);
  const LearnedMask causal = with_bias(with_bias(CausalMask{}, RelativeBias(table)), AlibiBias{0.1});
  const LearnedMask padded = both(PaddingMask{18}, with_bias(FullMask{}, RelativeBias(table)));

  typename Layer::Tape tape;
  Layer grad = zeros_like(layer), same = zeros_like(layer);
  for (const LearnedMask& mask : {causal, padded}) {
    const auto loss = [&] { return layer.forward(x, mask, lengths).cwiseProduct(dy).sum(); };
    const Matrix<double> start = random_matrix<double>(table.rows(), table.cols(), rng);
    Matrix<double> dbias = start;
    layer.forward(x, mask, lengths, tape);
    const Matrix<double> dx = layer.backward(dy, tape, grad, dbias);
    const Matrix<double> added = dbias - start;
    CHECK(excess(added, numerical_gradient(table, loss)) <= 0);
    CHECK(identical(layer.backward(dy, tape, same), dx));  // the others do not depend on it

    const auto loss_cross = [&] {
      return layer.forward_cross(x, memory, mask, lengths, memory_lengths).cwiseProduct(dy).sum();
    };
    dbias.setZero();
    layer.forward_cross(x, memory, mask, lengths, memory_lengths, tape);
    const auto crossed = layer.backward_cross(dy, tape, grad, dbias);
    CHECK(excess(dbias, numerical_gradient(table, loss_cross)) <= 0);
    CHECK(identical(layer.backward_cross(dy, tape, same).dmemory, crossed.dmemory));
  }

  // A prompt, then token by token, is the whole.
  const Matrix<double> whole = layer.forward(x, causal);
  KvCache<double> cache;
  Matrix<double> y(x.rows(), x.cols());
  y.topRows(15) = layer.forward(x.topRows(15), cache, causal);
  for (Index i = 15; i < x.rows(); ++i) y.row(i) = layer.forward(x.row(i), cache, causal);
  CHECK(y.isApprox(whole, 1e-12));

  // Any number of threads, nothing from the heap.
  layer.forward(x, causal, lengths, tape);
  Matrix<double> expected = Matrix<double>::Zero(table.rows(), table.cols());
  const Matrix<double> dx = layer.backward(dy, tape, grad, expected);
  for (const Index threads : {1, 3}) {
    diffattn::ThreadPool pool(threads);
    Workspace workspace;
    Matrix<double> got(x.rows(), x.cols()), dbias(table.rows(), table.cols());
    for (int round = 0; round < 3; ++round) {
      const std::size_t before = support::allocations();
      dbias.setZero();
      layer.backward_into(got, dy, tape, grad, dbias, workspace, pool);
      if (round == 2) CHECK(support::allocations() == before);
      CHECK(identical(dbias, expected));
      CHECK(identical(got, dx));
    }
  }
}

/// The bucket of a distance, bidirectional, as T5 has it: the close ones one by one, the others by their logarithm.
Index t5_bucket(Index query, Index key, Index n_q, Index n_k) {
  constexpr Index kBuckets = 16, kExact = 8, kMost = 64;  // of one direction
  const Index distance = key - (query + n_k - n_q), side = distance > 0 ? kBuckets : 0;
  const Index far = std::abs(distance);
  if (far < kExact) return side + far;
  const double octaves = std::log(static_cast<double>(far) / kExact) / std::log(static_cast<double>(kMost) / kExact);
  return side + std::min(kBuckets - 1, kExact + static_cast<Index>(octaves * (kBuckets - kExact)));
}

/// Two layers with one table, as in T5.
struct SharedTableModel {
  std::array<diffattn::MultiheadDiffAttention<double>, 2> layers{make(1), make(2)};
  Matrix<double> table = Matrix<double>::Zero(2, 32);

  static diffattn::MultiheadDiffAttention<double> make(std::uint64_t seed) {
    return diffattn::MultiheadDiffAttention<double>({.embed_dim = 8, .num_heads = 2, .depth = 1, .seed = seed});
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    diffattn::visit_part("layers.0", self.layers[0], visitor);
    diffattn::visit_part("layers.1", self.layers[1], visitor);
    visitor("relative_attention_bias.weight", self.table);
  }

  LearnedMask mask() const { return with_bias(FullMask{}, IndexedBias(table, t5_bucket)); }

  Matrix<double> forward(const Matrix<double>& x) const {
    const Matrix<double> middle = x + layers[0].forward(x, mask());
    return middle + layers[1].forward(middle, mask());
  }

  /// ½|forward(x) − target|², whose gradient is added to grad.
  double learn(const Matrix<double>& x, const Matrix<double>& target, SharedTableModel& grad) const {
    std::array<diffattn::MultiheadDiffAttention<double>::Tape, 2> tapes;
    const Matrix<double> middle = x + layers[0].forward(x, mask(), tapes[0]);
    const Matrix<double> dy = middle + layers[1].forward(middle, mask(), tapes[1]) - target;
    const Matrix<double> dmiddle = dy + layers[1].backward(dy, tapes[1], grad.layers[1], grad.table);
    layers[0].backward(dmiddle, tapes[0], grad.layers[0], grad.table);
    return dy.squaredNorm() / 2;
  }
};

/// One layer on windows of kSide x kSide patches, as in Swin.
struct WindowModel {
  static constexpr Index kSide = 4, kPatches = kSide * kSide, kOffsets = 2 * kSide - 1;
  diffattn::MultiheadAttention<double> attention{{.embed_dim = 8, .num_heads = 2, .seed = 3}};
  Matrix<double> table = Matrix<double>::Zero(2, kOffsets* kOffsets);

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    diffattn::visit_part("attn", self.attention, visitor);
    visitor("relative_position_bias_table", self.table);
  }

  /// Where one patch of a window lies as another sees it.
  static Index column(Index query, Index key, Index /*n_q*/, Index /*n_k*/) {
    return (query / kSide - key / kSide + kSide - 1) * kOffsets + query % kSide - key % kSide + kSide - 1;
  }
  LearnedMask mask() const { return with_bias(FullMask{}, IndexedBias(table, column)); }
};

}  // namespace

TEST_CASE("Every layer: the gradient of a learned bias, decoding and threads", "[layers][learned_bias]") {
  check_learned_layer<diffattn::MultiheadAttention<double>>({.embed_dim = 12, .num_heads = 3});
  check_learned_layer<diffattn::MultiheadDiffAttention<double>>({.embed_dim = 16, .num_heads = 4, .num_kv_heads = 2});
  check_learned_layer<diffattn::MultiheadDiffAttentionV2<double>>({.embed_dim = 16, .num_heads = 4, .num_kv_heads = 2});
}

TEST_CASE("Buckets of T5: layers that share a table, trained by AdamW", "[layers][learned_bias]") {
  auto rng = make_rng();
  CHECK(t5_bucket(0, 0, 9, 9) == 0);
  CHECK(t5_bucket(8, 3, 9, 9) == 5);
  CHECK(t5_bucket(3, 8, 9, 9) == 21);
  CHECK(t5_bucket(90, 0, 99, 99) == 15);
  SharedTableModel model, teacher;
  for (auto& layer : teacher.layers) layer_checks::randomize(layer, rng);
  model.layers = teacher.layers;
  teacher.table = random_matrix<double>(2, 32, rng);
  const Matrix<double> x = random_matrix<double>(40, 8, rng), target = teacher.forward(x);

  SharedTableModel grad = zeros_like(model);
  model.learn(x, target, grad);
  const auto loss = [&] { return (model.forward(x) - target).squaredNorm() / 2; };
  CHECK(excess(grad.table, numerical_gradient(model.table, loss)) <= 0);

  diffattn::AdamW<double> adamw(model, {.learning_rate = 0.02});
  const double first = loss();
  for (int step = 0; step < 60; ++step) {
    diffattn::set_zero(grad);
    model.learn(x, target, grad);
    adamw.step(model, grad);
  }
  CHECK(loss() < 0.1 * first);
  CHECK_FALSE(model.table.isZero());
}

TEST_CASE("Windows of an image: a table of offsets in two dimensions learns what is beside what",
          "[layers][learned_bias]") {
  auto rng = make_rng();
  CHECK(WindowModel::column(0, 15, 16, 16) == 0);
  CHECK(WindowModel::column(15, 0, 16, 16) == 48);
  CHECK(WindowModel::column(5, 5, 16, 16) == 24);
  WindowModel model;
  layer_checks::randomize(model.attention, rng);
  // Six windows stacked; the teacher attends to the patch on the right.
  const std::vector<Index> windows(6, WindowModel::kPatches);
  const Matrix<double> x = random_matrix<double>(6 * WindowModel::kPatches, 8, rng);
  WindowModel teacher = model;
  teacher.table.col(WindowModel::column(0, 1, 16, 16)).setConstant(4);
  const Matrix<double> target = teacher.attention.forward(x, teacher.mask(), windows);

  WindowModel grad = zeros_like(model);
  diffattn::MultiheadAttention<double>::Tape tape;
  const auto loss = [&] { return (model.attention.forward(x, model.mask(), windows) - target).squaredNorm() / 2; };
  const auto learn = [&] {
    const Matrix<double> dy = model.attention.forward(x, model.mask(), windows, tape) - target;
    model.attention.backward(dy, tape, grad.attention, grad.table);
  };
  learn();
  CHECK(excess(grad.table, numerical_gradient(model.table, loss)) <= 0);
  // Only the table is trained.
  diffattn::AdamW<double> adamw(model, {.learning_rate = 0.1, .weight_decay = 0});
  const double first = loss();
  for (int step = 0; step < 60; ++step) {
    diffattn::set_zero(grad);
    learn();
    diffattn::set_zero(grad.attention);
    adamw.step(model, grad);
  }
  CHECK(loss() < 0.1 * first);
  Index column = 0;
  model.table.row(0).maxCoeff(&column);
  CHECK(column == WindowModel::column(0, 1, 16, 16));
}

TEST_CASE("What backward says about dbias", "[layers][learned_bias]") {
  using Layer = diffattn::MultiheadDiffAttention<float>;
  const Layer layer({.embed_dim = 8, .num_heads = 2});
  Layer grad = zeros_like(layer);
  const Matrix<float> x = Matrix<float>::Ones(5, 8), table = Matrix<float>::Zero(2, 3), three(3, 3);
  Layer::Tape tape;
  Matrix<float> dbias = Matrix<float>::Constant(2, 3, 7);
  layer.forward(x, with_bias(CausalMask{}, AlibiBias{1}), tape);
  CHECK(thrown_by<std::invalid_argument>([&] { layer.backward(x, tape, grad, dbias); }) ==
        "MultiheadDiffAttention: dbias is the gradient of a learned bias, and the mask that the tape keeps has none");
  const auto learned = with_bias(CausalMask{}, RelativeBias(table));
  layer.forward(x, with_bias(learned, RelativeBias(table)), tape);
  CHECK(thrown_by<std::invalid_argument>([&] { layer.backward(x, tape, grad, dbias); }) ==
        "MultiheadDiffAttention: the mask that the tape keeps has two learned biases; only one can have a gradient");
  layer.backward(x, tape, grad);  // without it nobody minds
  layer.forward(x, learned, tape);
  Matrix<float> other(3, 2);
  CHECK(thrown_by<diffattn::ShapeError>([&] { layer.backward(x, tape, grad, other); }) ==
        "MultiheadDiffAttention: dbias must be 2 x 3, got 3 x 2");
  CHECK((dbias.array() == 7).all());
  CHECK(thrown_by<diffattn::ShapeError>([&] { layer.forward(x, with_bias(CausalMask{}, RelativeBias(three))); }) ==
        "MultiheadDiffAttention: the table of RelativeBias must have 2 rows, one for every head, got 3 x 3");
}
