// Attention to another sequence: against recorded values and gradients, plain loops and differences; stacked sequences,
// memories kept in a cache, tapes, threads, strides, nothing to see; and what is refused.

#include <diffattn/layers/cross_attention.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>

#include <numeric>

#include "kernels/masks.hpp"
#include "layers/layer_checks.hpp"
#include "layers/own_variant.hpp"
#include "support/executors.hpp"
#include "support/numerical_gradient.hpp"
#include "support/parameters_of.hpp"

namespace {

namespace cross {

using namespace diffattn;
using layer_checks::for_each_pair;
using support::excess;
using Lengths = std::vector<Index>;
using ByColumns = Eigen::MatrixXf;
using Plain = support::RangeMask;  // any mask of one type: kernels are compiled once for all

template <typename Layer>
Layer randomized(const typename Layer::Config& config, support::Rng& rng) {
  Layer layer(config);
  layer_checks::randomize(layer, rng);
  return layer;
}

/// Calls f(layer) for a small layer of every variant: grouped heads, biases, rotary.
template <typename Scalar, typename F>
void for_each_layer(support::Rng& rng, const F& f) {
  const RotaryConfig rotary;
  f(randomized<MultiheadDiffAttention<Scalar>>(
      {.embed_dim = 16, .num_heads = 4, .num_kv_heads = 2, .head_dim = 4, .rotary = rotary, .bias = true}, rng));
  f(randomized<MultiheadDiffAttentionV2<Scalar>>(
      {.embed_dim = 16, .num_heads = 4, .num_kv_heads = 2, .head_dim = 4, .rotary = rotary, .bias = true}, rng));
  f(randomized<MultiheadAttention<Scalar>>(
      {.embed_dim = 16, .num_heads = 4, .num_kv_heads = 1, .head_dim = 4, .rotary = rotary, .bias = true}, rng));
  f(randomized<layer_checks::OwnAttention<Scalar>>(layer_checks::kOwnConfig, rng));
}

/// Recorded by autograd in float64: values of both scalars, gradients of x, memory and every parameter.
void check_recorded(const std::string& name, const MultiheadDiffAttentionConfig& config) {
  INFO(name);
  const Safetensors file(std::string(DIFFATTN_TEST_DATA "/golden/") + name + ".safetensors");
  const Matrix<double> x = file.matrix<double>("x"), memory = file.matrix<double>("memory");
  const Matrix<double> y = file.matrix<double>("y");
  using Layer = MultiheadDiffAttention<double>;
  Layer layer(config);
  load_parameters(layer, file, "weight.");
  CHECK((layer.forward_cross(x, memory) - y).cwiseAbs().maxCoeff() <= 1e-12 * y.cwiseAbs().maxCoeff());

  MultiheadDiffAttention<float> in_float(config);
  load_parameters(in_float, file, "weight.");
  const Matrix<float> x_float = x.cast<float>(), memory_float = memory.cast<float>();
  const Matrix<double> y_float = in_float.forward_cross(x_float, memory_float).cast<double>();
  CHECK((y_float - y).cwiseAbs().maxCoeff() <= 1e-5 * y.cwiseAbs().maxCoeff());

  Layer::Tape tape;
  CHECK(identical(layer.forward_cross(x, memory, FullMask{}, tape), layer.forward_cross(x, memory)));
  Layer grad = zeros_like(layer), expected = zeros_like(layer);
  const auto [dx, dmemory] = layer.backward_cross(file.matrix<double>("dy"), tape, grad);
  const auto check = [](const auto& got, const auto& recorded) {
    CHECK((got - recorded).cwiseAbs().maxCoeff() <= 1e-9 * recorded.cwiseAbs().maxCoeff());
  };
  check(dx, file.matrix<double>("dx"));
  check(dmemory, file.matrix<double>("dmemory"));
  load_parameters(expected, file, "grad.");
  for_each_pair(grad, expected, [&](const std::string& parameter, const auto& got, const auto& recorded) {
    INFO(parameter);
    check(got, recorded);
  });
}

template <template <typename...> class Layer, typename Config, typename Oracle, typename Mask>
void check_oracle(const Config& config, Index n_q, Index n_k, const Mask& mask, const Oracle& oracle,
                  support::Rng& rng) {
  INFO(n_q << " queries, " << n_k << " keys, embed_dim " << config.embed_dim);
  const auto layer = randomized<Layer<double>>(config, rng);
  const Matrix<double> x = random_matrix<double>(n_q, config.embed_dim, rng);
  const Matrix<double> memory = random_matrix<double>(n_k, config.embed_dim, rng);
  const Matrix<long double> exact =
      oracle(oracle::weights_of<long double>(layer), config, Matrix<long double>(x.template cast<long double>()),
             Matrix<long double>(memory.template cast<long double>()), mask);
  CHECK((layer.forward_cross(x, memory, mask).template cast<long double>() - exact).norm() <= 1e-13L * exact.norm());
  KvCache<double> cache;
  layer.write_memory(memory, cache);
  CHECK((layer.forward_cross(x, cache, mask).template cast<long double>() - exact).norm() <= 1e-13L * exact.norm());

  Layer<float> in_float(config);
  for_each_pair(in_float, layer,
                [](const std::string&, auto& to, const auto& from) { to = from.template cast<float>(); });
  const Matrix<float> y = in_float.forward_cross(Matrix<float>(x.cast<float>()), memory.cast<float>(), mask);
  CHECK((y.template cast<long double>() - exact).norm() <= 1e-5L * exact.norm());
}

template <template <typename...> class Layer, typename Config, typename Oracle>
void check_oracle_at_all_sizes(const Config& config, const Oracle& oracle, support::Rng& rng) {
  const AlibiBias alibi{alibi_slopes(config.num_heads)};
  using Sizes = std::pair<Index, Index>;
  for (const auto& [n_q, n_k] : {Sizes{1, 1}, {1, 40}, {3, 9}, {7, 23}, {31, 13}, {60, 1}, {70, 300}, {150, 90}}) {
    const Matrix<double> bias = random_matrix<double>(config.num_heads * n_q, n_k, rng);
    for (const Plain& mask : {Plain{FullMask{}}, Plain{PaddingMask{n_k / 2 + 1}}, Plain{CausalMask{}}}) {
      check_oracle<Layer>(config, n_q, n_k, mask, oracle, rng);
      check_oracle<Layer>(config, n_q, n_k, with_bias(mask, support::AnyBias<double>{alibi}), oracle, rng);
      check_oracle<Layer>(config, n_q, n_k, with_bias(mask, support::AnyBias<double>{MatrixBias(bias)}), oracle, rng);
    }
  }
}

/// dx, dmemory and every parameter's gradient by differences, with several sequences, some of them empty on either
/// side, and something in grad already.
template <typename Layer, typename Mask>
void check_differences(Layer layer, const Mask& mask, const Lengths& lengths, const Lengths& memory_lengths) {
  auto rng = make_rng();
  Layer grad = zeros_like(layer);
  layer_checks::randomize(grad, rng);
  Layer before = grad;
  const auto rows = [](const Lengths& of) { return std::accumulate(of.begin(), of.end(), Index{0}); };
  const Index width = layer.config().embed_dim;
  Matrix<double> x = random_matrix<double>(rows(lengths), width, rng);
  Matrix<double> memory = random_matrix<double>(rows(memory_lengths), width, rng);
  const Matrix<double> dy = random_matrix<double>(x.rows(), width, rng);
  const auto loss = [&] {
    return layer.forward_cross(x, memory, mask, lengths, memory_lengths).cwiseProduct(dy).sum();
  };
  typename Layer::Tape tape;
  layer.forward_cross(x, memory, mask, lengths, memory_lengths, tape);
  const CrossGradients<double> got = layer.backward_cross(dy, tape, grad);
  CHECK(excess(got.dx, support::numerical_gradient(x, loss)) <= 0);
  CHECK(excess(got.dmemory, support::numerical_gradient(memory, loss)) <= 0);
  for_each_pair(grad, before, [](const std::string&, auto& sum, const auto& start) { sum -= start; });
  layer_checks::parameter_gradients(layer, grad, loss);
}

/// Noise heads that several signal heads share, as soon as the configuration has them.
template <typename Config>
void check_recorded_groups() {
  if constexpr (requires(Config config) { config.num_noise_heads; }) {
    Config config;
    config.embed_dim = 48;
    config.num_heads = 4;
    config.num_kv_heads = config.num_noise_heads = 2;
    config.head_dim = 6;
    config.depth = 3;
    check_recorded("wide_cross_1", config);
  }
}

}  // namespace cross
}  // namespace

TEST_CASE("Cross-attention is what was recorded", "[layers][cross_attention][golden]") {
  cross::check_recorded("wide_cross_0",
                        {.embed_dim = 32, .num_heads = 4, .num_kv_heads = 2, .head_dim = 4, .depth = 1});
  cross::check_recorded_groups<diffattn::MultiheadDiffAttentionConfig>();
}

TEST_CASE("Cross-attention agrees with plain loops", "[layers][cross_attention]") {
  auto rng = make_rng();
  const diffattn::RotaryConfig rotary;
  cross::check_oracle_at_all_sizes<diffattn::MultiheadDiffAttention>(
      diffattn::MultiheadDiffAttentionConfig{
          .embed_dim = 48, .num_heads = 4, .num_kv_heads = 2, .depth = 3, .rotary = rotary, .bias = true},
      [](const auto&... arguments) { return oracle::multihead_diff_attention(arguments...); }, rng);
  cross::check_oracle_at_all_sizes<diffattn::MultiheadDiffAttentionV2>(
      diffattn::MultiheadDiffAttentionV2Config{.embed_dim = 36, .num_heads = 3, .num_kv_heads = 1, .rotary = rotary},
      [](const auto&... arguments) { return oracle::multihead_diff_attention_v2(arguments...); }, rng);
  cross::check_oracle_at_all_sizes<diffattn::MultiheadAttention>(
      diffattn::MultiheadAttentionConfig{
          .embed_dim = 40, .num_heads = 4, .num_kv_heads = 2, .rotary = diffattn::RotaryConfig{.dim = 6}, .bias = true},
      [](const auto&... arguments) { return oracle::multihead_attention(arguments...); }, rng);
}

TEST_CASE("Of x itself it is self-attention, bit for bit", "[layers][cross_attention]") {
  using cross::Plain;
  auto rng = make_rng();
  cross::for_each_layer<float>(rng, [&](const auto& layer) {
    const diffattn::Matrix<float> x = random_matrix<float>(83, layer.config().embed_dim, rng);
    const cross::Lengths lengths = {40, 0, 3, 40};
    const Plain full{diffattn::FullMask{}}, causal{diffattn::CausalMask{}};
    CHECK(identical(layer.forward_cross(x, x), layer.forward(x, full)));
    CHECK(identical(layer.forward_cross(x, x, causal, lengths, lengths), layer.forward(x, causal, lengths)));
  });
}

TEST_CASE("Cross-attention's gradients are what differences say", "[layers][cross_attention][gradients]") {
  using namespace diffattn;
  using cross::Plain;
  using Bias = support::AnyBias<double>;
  auto rng = make_rng();
  cross::for_each_layer<double>(rng, [&](const auto& layer) {
    const Matrix<double> bias = random_matrix<double>(4, 3, rng);
    cross::check_differences(layer, Plain{FullMask{}}, {3}, {5});
    cross::check_differences(layer, Plain{PaddingMask{3}}, {4, 1, 0, 2}, {2, 5, 3, 0});
    cross::check_differences(layer, with_bias(Plain{FullMask{}}, Bias{AlibiBias{alibi_slopes(4)}}), {5, 2}, {3, 4});
    cross::check_differences(layer, with_bias(Plain{PaddingMask{2}}, Bias{MatrixBias(bias)}), {4, 4}, {3, 3});
    cross::check_differences(layer, Plain{CausalMask{}}, {5, 2}, {2, 5});
  });
}

TEST_CASE("Each sequence sees its own memory, and no other", "[layers][cross_attention]") {
  using namespace diffattn;
  auto rng = make_rng();
  cross::for_each_layer<float>(rng, [&](const auto& layer) {
    const Index width = layer.config().embed_dim;
    const cross::Lengths lengths = {7, 0, 12, 41, 6}, memory_lengths = {30, 9, 0, 8, 70};
    const Matrix<float> x = random_matrix<float>(66, width, rng);
    Matrix<float> memory = random_matrix<float>(117, width, rng);
    const cross::Plain mask{PaddingMask{20}};
    const Matrix<float> y = layer.forward_cross(x, memory, mask, lengths, memory_lengths);
    Index first = 0, first_key = 0;
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      INFO("sequence " << s);
      const Matrix<float> alone =
          layer.forward_cross(x.middleRows(first, lengths[s]), memory.middleRows(first_key, memory_lengths[s]), mask);
      CHECK(identical(alone, y.middleRows(first, lengths[s])));
      first += lengths[s];
      first_key += memory_lengths[s];
    }
    memory.row(31).setConstant(std::numeric_limits<float>::quiet_NaN());   // of the second sequence, which is empty
    memory.row(110).setConstant(std::numeric_limits<float>::quiet_NaN());  // padding
    CHECK(identical(layer.forward_cross(x, memory, mask, lengths, memory_lengths), y));
  });
}

TEST_CASE("A memory of no rows is one of which nothing is seen; no queries have no gradient",
          "[layers][cross_attention]") {
  using namespace diffattn;
  auto rng = make_rng();
  cross::for_each_layer<double>(rng, [&](const auto& layer) {
    using Layer = std::decay_t<decltype(layer)>;
    const Index width = layer.config().embed_dim;
    const cross::Plain full{FullMask{}};
    const Matrix<double> none(0, width), some = random_matrix<double>(9, width, rng);
    typename Layer::Tape tape;
    Layer grad = zeros_like(layer);
    const Matrix<double> y = layer.forward_cross(some, none, full, tape);
    CHECK(identical(y, layer.forward_cross(some, some, cross::Plain{PaddingMask{0}})));
    const auto unseen = layer.backward_cross(some, tape, grad);
    CHECK(identical(unseen.dx, Matrix<double>::Zero(9, width)));
    CHECK(unseen.dmemory.rows() == 0);
    CHECK(unseen.dmemory.cols() == width);
    CHECK(grad.k_proj.weight.isZero(0));
    CHECK(grad.q_proj.weight.isZero(0));
    KvCache<float> cache;
    layer.write_memory(none, cache);
    CHECK(identical(layer.forward_cross(some, cache), y));

    layer.write_memory(some, cache);
    CHECK(layer.forward_cross(none, cache).rows() == 0);
    CHECK(layer.forward_cross(none, some, full, tape).rows() == 0);
    set_zero(grad);
    const auto unasked = layer.backward_cross(none, tape, grad);
    CHECK(unasked.dx.rows() == 0);
    CHECK(identical(unasked.dmemory, Matrix<double>::Zero(9, width)));
    visit_parameters(grad, [](std::string_view, const auto& parameter) { CHECK(parameter.isZero(0)); });
    CHECK(layer.forward_cross(none, none).cols() == width);
    CHECK(layer.forward_cross(none, none, full, {}, {}).rows() == 0);
  });
}

TEST_CASE("A memory kept in a cache serves any number of calls", "[layers][cross_attention][kv_cache]") {
  using namespace diffattn;
  auto rng = make_rng();
  cross::for_each_layer<float>(rng, [&](const auto& layer) {
    const Index width = layer.config().embed_dim;
    const Matrix<float> x = random_matrix<float>(40, width, rng), memory = random_matrix<float>(300, width, rng);
    const cross::Plain padding{PaddingMask{290}};
    const Matrix<float> whole = layer.forward_cross(x, memory, padding);
    KvCache<float> cache, in_pieces;
    layer.write_memory(memory, cache);
    const Matrix<float> y = layer.forward_cross(x, cache, padding);
    CHECK(y.isApprox(whole, 1e-5f));
    CHECK(layer.forward_cross(x, cache).isApprox(layer.forward_cross(x, memory), 1e-5f));
    CHECK(cache.position() == 300);
    CHECK(identical(layer.forward_cross(x, cache, padding), y));

    // In pieces it is the same memory, whose positions go on.
    layer.write_memory(memory.topRows(100), in_pieces);
    const KvCache<float> fork = in_pieces;
    layer.write_memory(memory.bottomRows(200), in_pieces);
    CHECK(layer.forward_cross(x, in_pieces, padding).isApprox(y, 1e-6f));
    CHECK(layer.forward_cross(x, fork).isApprox(layer.forward_cross(x, memory.topRows(100)), 1e-5f));
    in_pieces.truncate(100);
    CHECK(identical(layer.forward_cross(x, in_pieces), layer.forward_cross(x, fork)));

    KvCache<Eigen::bfloat16> small;
    layer.write_memory(memory, small);
    CHECK(layer.forward_cross(x, small, padding).isApprox(whole, 0.05f));
  });
}

TEST_CASE("Cross-attention: the same bits from any threads, matrices and workspaces", "[layers][cross_attention]") {
  using namespace diffattn;
  auto rng = make_rng();
  cross::for_each_layer<float>(rng, [&](const auto& layer) {
    using Layer = std::decay_t<decltype(layer)>;
    const Index width = layer.config().embed_dim;
    const cross::Plain mask{PaddingMask{150}};
    for (const auto& [lengths, memory_lengths] : {std::pair{cross::Lengths{90}, cross::Lengths{200}},
                                                  std::pair{cross::Lengths{30, 30, 30}, cross::Lengths{60, 70, 70}}}) {
      const Matrix<float> x = random_matrix<float>(90, width, rng), memory = random_matrix<float>(200, width, rng);
      const Matrix<float> dy = random_matrix<float>(90, width, rng);
      typename Layer::Tape tape;
      Layer grad = zeros_like(layer);
      const Matrix<float> y = layer.forward_cross(x, memory, mask, lengths, memory_lengths, tape);
      CHECK(identical(y, layer.forward_cross(x, memory, mask, lengths, memory_lengths)));
      const auto expected = layer.backward_cross(dy, tape, grad);
      KvCache<float> cache;
      layer.write_memory(memory, cache);
      const Matrix<float> of_cache = layer.forward_cross(x, cache, mask);

      // By columns, and as parts of wider matrices.
      const cross::ByColumns x_columns = x, memory_columns = memory, dy_columns = dy;
      cross::ByColumns y_columns(90, width);
      Matrix<float> dx_frame = Matrix<float>::Constant(92, width + 3, 7), dmemory_frame(205, 2 * width);
      ThreadPool pool(3);
      support::Backwards backwards;
      Serial serial;
      for (support::AnyExecutor executor :
           {support::AnyExecutor(serial), support::AnyExecutor(pool), support::AnyExecutor(backwards)}) {
        Workspace workspace;
        for (int round = 0; round < 2; ++round) {
          y_columns.setZero();
          layer.forward_cross_into(y_columns, x_columns, memory_columns, mask, lengths, memory_lengths, workspace,
                                   executor);
          CHECK(identical(y_columns, y));
          y_columns.setZero();
          layer.forward_cross_into(y_columns, x_columns, memory_columns, mask, lengths, memory_lengths, tape, workspace,
                                   executor);
          CHECK(identical(y_columns, y));
          Layer again = zeros_like(layer);
          layer.backward_cross_into(dx_frame.block(1, 2, 90, width), dmemory_frame.block(3, 1, 200, width), dy_columns,
                                    tape, again, workspace, executor);
          CHECK(identical(dx_frame.block(1, 2, 90, width), expected.dx));
          CHECK(identical(dmemory_frame.block(3, 1, 200, width), expected.dmemory));
          CHECK(support::parameters_of(again) == support::parameters_of(grad));
          cache.clear();
          layer.write_memory(memory_columns, cache, workspace, executor);
          layer.forward_cross_into(y_columns, x_columns, cache, mask, workspace, executor);
          CHECK(identical(y_columns, of_cache));
        }
      }
      CHECK(dx_frame.col(1).isConstant(7));
      CHECK(dx_frame.row(91).isConstant(7));
    }
    // An expression is evaluated once.
    const Matrix<float> x = random_matrix<float>(5, width, rng);
    CHECK(
        identical(layer.forward_cross(x + x, x * 3), layer.forward_cross(Matrix<float>(x + x), Matrix<float>(x * 3))));
  });
}

TEST_CASE("What does not fit cross-attention is refused before any work", "[layers][cross_attention]") {
  using namespace diffattn;
  using Layer = MultiheadDiffAttention<double>;
  const std::string name = "MultiheadDiffAttention: ";
  const Layer layer({.embed_dim = 24, .num_heads = 6, .num_kv_heads = 3}), other({.embed_dim = 24, .num_heads = 6});
  const Matrix<double> x = Matrix<double>::Ones(4, 24), memory = Matrix<double>::Ones(6, 24);
  const cross::Plain full{FullMask{}};
  Matrix<double> y = Matrix<double>::Constant(4, 24, 7);
  Workspace workspace;
  const auto shape_error = [&](const auto& f) { return thrown_by<ShapeError>(f); };
  const auto into = [&](const auto& x_, const auto& memory_) {
    return shape_error([&] { layer.forward_cross_into(y, x_, memory_, full, workspace); });
  };
  CHECK(into(x, memory.leftCols(23)) == name + "memory must be 6 x 24, got 6 x 23");
  CHECK(into(x, memory.transpose()) == name +
                                           "memory must have embed_dim = 24 columns, one token a row, got 24 x 6: did "
                                           "you mean memory.transpose()?");
  CHECK(into(x.leftCols(23), memory) == name + "x must be 4 x 24, got 4 x 23");
  CHECK(into(x.topRows(3), memory) == name + "y must be 3 x 24, got 4 x 24");
  const auto stacked = [&](const cross::Lengths& lengths, const cross::Lengths& memory_lengths) {
    return thrown_by<std::invalid_argument>(
        [&] { layer.forward_cross_into(y, x, memory, full, lengths, memory_lengths, workspace); });
  };
  CHECK(stacked({2, 1}, {3, 3}) == name + "the lengths of the sequences must add up to the 4 rows of x, got 3");
  CHECK(stacked({2, 2}, {3, 2}) == name + "the lengths of the sequences must add up to the 6 rows of memory, got 5");
  CHECK(stacked({2, 2}, {6}) == name + "every sequence needs its memory: lengths has 2 sequences, memory_lengths 1");
  CHECK(stacked({2, 2}, {7, -1}) == name + "a sequence cannot have -1 tokens");
  CHECK_THROWS_AS(layer.forward_cross_into(y, x, memory, cross::Plain{PaddingMask{-1}}, workspace),
                  std::invalid_argument);
  const Matrix<double> bias = Matrix<double>::Zero(4, 4);
  CHECK_THROWS_AS(layer.forward_cross(x, memory, with_bias(full, support::AnyBias<double>{MatrixBias(bias)})),
                  ShapeError);

  KvCache<float> cache, windowed({.window = 16});
  const auto of_cache = [&](const KvCache<float>& from) {
    return thrown_by<std::invalid_argument>([&] { layer.forward_cross_into(y, x, from, full, workspace); });
  };
  CHECK(of_cache(cache) == name + "no memory has been written to the cache; call write_memory(memory, cache)");
  const std::string window = name +
                             "the cache of a memory must have no window, got one of 16 tokens; did you mean a "
                             "PaddingMask?";
  CHECK(thrown_by<std::invalid_argument>([&] { layer.write_memory(memory, windowed); }) == window);
  CHECK(of_cache(windowed) == window);
  CHECK(shape_error([&] { layer.write_memory(memory.leftCols(3), cache); }) ==
        name + "memory must be 6 x 24, got 6 x 3");
  CHECK(cache.memory_bytes() == 0);
  other.write_memory(memory, cache);
  CHECK(of_cache(cache).find(name + "the cache must hold 3 heads of 2 x 2 key and 4 value columns") == 0);
  CHECK_THROWS_AS(layer.write_memory(memory, cache), ShapeError);
  CHECK(cache.position() == 6);
  KvCache<float> full_cache(KvCacheOptions{.max_tokens = 8});
  layer.write_memory(memory, full_cache);
  CHECK_THROWS_AS(layer.write_memory(memory, full_cache), std::invalid_argument);
  CHECK(full_cache.position() == 6);
  CHECK(shape_error([&] { layer.forward_cross_into(y, x.leftCols(5), full_cache, full, workspace); }) ==
        name + "x must be 4 x 24, got 4 x 5");
  CHECK_THROWS_AS(layer.forward_cross(x, full_cache, cross::Plain{PaddingMask{-1}}), std::invalid_argument);
  CHECK((y.array() == 7).all());
}

TEST_CASE("A tape knows what filled it", "[layers][cross_attention][gradients]") {
  using namespace diffattn;
  using Layer = MultiheadDiffAttention<double>;
  const std::string name = "MultiheadDiffAttention: ";
  const Layer layer({.embed_dim = 24, .num_heads = 6, .num_kv_heads = 3}), other({.embed_dim = 24, .num_heads = 6});
  const Matrix<double> x = Matrix<double>::Ones(4, 24), memory = Matrix<double>::Ones(6, 24);
  const cross::Plain full{FullMask{}};
  Layer grad = zeros_like(layer), other_grad = zeros_like(other);
  Layer::Tape tape;
  const auto crossed = [&](const Layer& of, const Matrix<double>& dy, Layer& to) {
    return thrown_by<std::invalid_argument>([&] { of.backward_cross(dy, tape, to); });
  };
  CHECK(crossed(layer, x, grad) ==
        name + "backward_cross needs a tape that forward_cross(x, memory, mask, tape) has filled");
  layer.forward(x, full, tape);
  CHECK(crossed(layer, x, grad) ==
        name + "the tape was filled by forward(x, mask, tape); call backward(dy, tape, grad)");
  layer.forward_cross(x, memory, full, tape);
  CHECK(thrown_by<std::invalid_argument>([&] { layer.backward(x, tape, grad); }) ==
        name + "the tape was filled by forward_cross(x, memory, mask, tape); call backward_cross(dy, tape, grad)");
  CHECK(crossed(layer, x, other_grad) == name + "grad must be a layer of the same configuration");
  CHECK(crossed(other, x, other_grad) == name + "the tape was filled by a layer of another configuration");
  CHECK(crossed(layer, memory, grad) == name + "dy must be 4 x 24, got 6 x 24");
  Matrix<double> dx(4, 24), dmemory(6, 24);
  Workspace workspace;
  CHECK(thrown_by<ShapeError>([&] { layer.backward_cross_into(dx, dx, x, tape, grad, workspace); }) ==
        name + "dmemory must be 6 x 24, got 4 x 24");
  CHECK(thrown_by<ShapeError>([&] { layer.backward_cross_into(dmemory, dmemory, x, tape, grad, workspace); }) ==
        name + "dx must be 4 x 24, got 6 x 24");
  visit_parameters(grad, [](std::string_view, const auto& parameter) { CHECK(parameter.isZero(0)); });
  CHECK_THROWS_AS(layer.forward_cross(x, memory.leftCols(3), full, tape), ShapeError);
  CHECK(crossed(layer, x, grad) ==
        name + "backward_cross needs a tape that forward_cross(x, memory, mask, tape) has filled");

  // One tape, used for the one and the other: as a new one each time.
  auto rng = make_rng();
  const Matrix<double> long_x = random_matrix<double>(9, 24, rng);
  const auto gradient = [&](Layer::Tape& on) {
    Layer sum = zeros_like(layer);
    layer.forward_cross(x, long_x, full, on);
    const auto [dx_, dmemory_] = layer.backward_cross(x, on, sum);
    layer.forward(long_x, full, on);
    return std::pair{Matrix<double>(dmemory_ + layer.backward(long_x, on, sum)), support::parameters_of(sum)};
  };
  Layer::Tape fresh;
  const auto expected = gradient(fresh), got = gradient(tape);
  CHECK(identical(got.first, expected.first));
  CHECK(got.second == expected.second);
}
