// Maps of layers, against plain loops and against what the layers attend to.

#include <cmath>
#include <cstddef>
#include <diffattn/analysis/attention_maps.hpp>
#include <diffattn/analysis/statistics.hpp>
#include <diffattn/io/parameters.hpp>
#include <diffattn/io/safetensors.hpp>
#include <diffattn/kernels/bias.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <stdexcept>
#include <string>

#include "layers/layer_oracle.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

using namespace diffattn;

/// The maps of all heads from q_proj and k_proj in plain loops; `keys_shared`: both maps of a head have the same keys.
template <typename Layer, typename Mask>
void check_maps(const Layer& layer, const Matrix<double>& x, const Mask& mask, Index query_maps, bool keys_shared) {
  const auto weights = oracle::weights_of<double>(layer);
  const auto& config = layer.config();
  const Index d = config.head_dim, n = x.rows(), key_maps = keys_shared ? 1 : query_maps;
  Matrix<double> q = oracle::linear(weights, "q_proj", x), k = oracle::linear(weights, "k_proj", x);
  const Matrix<double> v = oracle::linear(weights, "v_proj", x);
  if (config.rotary) {
    oracle::rotate(q, d, *config.rotary);
    oracle::rotate(k, d, *config.rotary);
  }
  typename Layer::Tape tape;
  layer.forward(x, mask, tape);
  const auto maps = attention_maps(layer, x, mask);
  REQUIRE(maps.size() == static_cast<std::size_t>(config.num_heads));
  for (Index h = 0; h < config.num_heads; ++h) {
    INFO("head " << h);
    const auto& [p1, p2, combined, lambda] = maps[static_cast<std::size_t>(h)];
    const Index g = h / (config.num_heads / config.num_kv_heads), dv = tape.attended.cols() / config.num_heads;
    const auto expected = [&](Index s) -> Matrix<double> {
      Matrix<double> p = Matrix<double>::Zero(n, n);
      for (Index i = 0; i < n; ++i) {
        const auto [begin, end] = mask.visible_keys(i, n, n);
        for (Index j = begin; j < end; ++j) {
          const double score = q.row(i)
                                   .segment((h * query_maps + s) * d, d)
                                   .dot(k.row(j).segment((g * key_maps + (keys_shared ? 0 : s)) * d, d));
          double bias = 0;
          if constexpr (requires { mask.bias(h, i, j, n, n); }) bias = static_cast<double>(mask.bias(h, i, j, n, n));
          p(i, j) = std::exp(score / std::sqrt(static_cast<double>(d)) + bias);
        }
        if (end > begin) p.row(i) /= p.row(i).sum();
      }
      return p;
    };
    CHECK((p1 - expected(0)).cwiseAbs().maxCoeff() <= 1e-13);
    if (query_maps == 2) {
      CHECK((p2 - expected(1)).cwiseAbs().maxCoeff() <= 1e-13);
      REQUIRE(lambda.size() == n);
      CHECK((combined - (p1 - lambda.asDiagonal() * p2)).cwiseAbs().maxCoeff() <= 1e-15);
    } else {
      CHECK(p2.size() == 0);
      CHECK(lambda.size() == 0);
      CHECK(support::identical(combined, p1));
    }
    // And it is what the head attends with.
    CHECK((combined * v.middleCols(g * dv, dv) - tape.attended.middleCols(h * dv, dv)).cwiseAbs().maxCoeff() <= 1e-12);
  }
}

/// Under masks and biases that tell heads apart.
template <typename Layer>
void check_layer_maps(const Layer& layer, Index query_maps, bool keys_shared) {
  auto rng = support::make_rng();
  const Matrix<double> x = support::random_matrix<double>(13, layer.config().embed_dim, rng);
  check_maps(layer, x, CausalMask{}, query_maps, keys_shared);
  check_maps(layer, x, FullMask{}, query_maps, keys_shared);
  check_maps(layer, x, SlidingWindowMask{3}, query_maps, keys_shared);
  const AlibiBias alibi{alibi_slopes(layer.config().num_heads)};
  check_maps(layer, x, with_bias(CausalMask{}, alibi), query_maps, keys_shared);
  check_maps(layer, Matrix<double>(x.topRows(1)), CausalMask{}, query_maps, keys_shared);
}

/// A file of golden/ with the maps of all heads, one below the other.
Safetensors maps_file(const std::string& name) {
  return Safetensors(std::string(DIFFATTN_TEST_DATA "/golden/") + name + ".safetensors");
}

/// The layer that a file describes.
MultiheadDiffAttention<double> maps_layer(const Safetensors& file) {
  const auto number = [&](const char* key) -> Index { return std::stol(file.metadata().at(key)); };
  MultiheadDiffAttentionConfig config{.embed_dim = number("embed_dim"),
                                      .num_heads = number("num_heads"),
                                      .num_kv_heads = number("num_kv_heads"),
                                      .head_dim = number("head_dim"),
                                      .num_noise_heads = number("num_noise_heads"),
                                      .depth = number("depth")};
  if (number("rotary") != 0) config.rotary = RotaryConfig{};
  MultiheadDiffAttention<double> layer(config);
  load_parameters(layer, file, "weight.");
  return layer;
}

void check_recorded_maps(const std::vector<AttentionMaps<double>>& maps, const Safetensors& file, double lambda) {
  const Matrix<double> p1 = file.matrix<double>("p1"), p2 = file.matrix<double>("p2");
  const auto heads = static_cast<Index>(maps.size()), n = p1.rows() / heads;
  for (Index h = 0; h < heads; ++h) {
    INFO("head " << h);
    const AttentionMaps<double>& head = maps[static_cast<std::size_t>(h)];
    CHECK((head.p1 - p1.middleRows(h * n, n)).cwiseAbs().maxCoeff() <= 1e-12);
    CHECK((head.p2 - p2.middleRows(h * n, n)).cwiseAbs().maxCoeff() <= 1e-12);
    CHECK((head.lambda.array() - lambda).abs().maxCoeff() <= 1e-12);
    CHECK((head.combined - (head.p1 - lambda * head.p2)).cwiseAbs().maxCoeff() <= 1e-12);
  }
}

double recorded_lambda(const Safetensors& file) { return std::stod(file.metadata().at("lambda_value")); }

/// The maps of some queries are those rows of the whole maps, bit for bit, with a mask that tells queries apart.
template <typename Layer>
void check_map_rows(const Layer& layer) {
  auto rng = support::make_rng();
  const Index n = 17;
  const Matrix<double> x = support::random_matrix<double>(n, layer.config().embed_dim, rng);
  const Matrix<double> bias = support::random_matrix<double>(layer.config().num_heads * n, n, rng);
  const auto check = [&](const auto& mask) {
    const auto whole = attention_maps(layer, x, mask);
    for (const MapRows rows : {MapRows{0, n}, MapRows{5, 3}, MapRows{16, 1}, MapRows{17, 0}, MapRows{.first = 9}}) {
      const auto some = attention_maps(layer, x, mask, rows);
      const Index count = rows.count == MapRows::kToTheEnd ? n - rows.first : rows.count;
      REQUIRE(some.size() == whole.size());
      for (std::size_t h = 0; h < some.size(); ++h) {
        REQUIRE(some[h].p1.rows() == count);
        CHECK(support::identical(some[h].p1, whole[h].p1.middleRows(rows.first, count)));
        CHECK(support::identical(some[h].combined, whole[h].combined.middleRows(rows.first, count)));
        if (whole[h].p2.size() == 0) continue;
        CHECK(support::identical(some[h].p2, whole[h].p2.middleRows(rows.first, count)));
        CHECK(support::identical(some[h].lambda, whole[h].lambda.segment(rows.first, count)));
      }
    }
  };
  check(CausalMask{});
  check(SlidingWindowMask{4});
  check(with_bias(CausalMask{}, MatrixBias(bias)));
}

}  // namespace

TEST_CASE("maps of a differential layer", "[analysis]") {
  MultiheadDiffAttention<double> layer({.embed_dim = 24, .num_heads = 4, .num_kv_heads = 2, .depth = 3, .seed = 5});
  check_layer_maps(layer, 2, false);
  auto rng = support::make_rng();
  for (const auto& head : attention_maps(layer, support::random_matrix<double>(6, 24, rng))) {
    CHECK((head.lambda.array() == layer.lambda_value()).all());
    CHECK((head.combined.rowwise().sum().array() - (1 - layer.lambda_value())).abs().maxCoeff() <= 1e-14);
  }
  const MultiheadDiffAttention<double> narrow({.embed_dim = 24,
                                               .num_heads = 2,
                                               .num_kv_heads = 1,
                                               .head_dim = 4,
                                               .rotary = RotaryConfig{},
                                               .bias = true,
                                               .seed = 6});
  check_layer_maps(narrow, 2, false);
}

TEST_CASE("maps of a DIFF V2 layer have a lambda for every query", "[analysis]") {
  MultiheadDiffAttentionV2<double> layer(
      {.embed_dim = 32, .num_heads = 4, .num_kv_heads = 2, .rotary = RotaryConfig{}, .seed = 7});
  check_layer_maps(layer, 2, true);
  auto rng = support::make_rng();
  const Matrix<double> x = support::random_matrix<double>(6, 32, rng);
  const auto maps = attention_maps(layer, x);
  const Matrix<double> logits = oracle::linear(oracle::weights_of<double>(layer), "lambda_proj", x);
  for (Index h = 0; h < 4; ++h) {
    const Vector<double> expected = (1 + (-logits.col(h).array()).exp()).inverse();
    CHECK((maps[static_cast<std::size_t>(h)].lambda - expected).cwiseAbs().maxCoeff() <= 1e-14);
  }
}

TEST_CASE("maps of a standard layer are single", "[analysis]") {
  check_layer_maps(MultiheadAttention<double>(
                       {.embed_dim = 24, .num_heads = 4, .num_kv_heads = 2, .rotary = RotaryConfig{}, .seed = 8}),
                   1, false);
}

TEST_CASE("maps of nothing, and of what does not fit", "[analysis]") {
  const MultiheadDiffAttention<float> layer({.embed_dim = 8, .num_heads = 2});
  const auto maps = attention_maps(layer, Matrix<float>(0, 8));
  REQUIRE(maps.size() == 2);
  CHECK(maps[1].p1.size() == 0);
  CHECK(support::thrown_by<ShapeError>([&] { (void)attention_maps(layer, Matrix<float>(3, 7)); }) ==
        "MultiheadDiffAttention: x must be 3 x 8, got 3 x 7");
  const Matrix<float> bias = Matrix<float>::Zero(3, 2);
  CHECK_THROWS_AS(
      attention_maps(layer, Matrix<float>(Matrix<float>::Zero(3, 8)), with_bias(CausalMask{}, MatrixBias(bias))),
      ShapeError);
}

TEST_CASE("maps recorded from a layer with ALiBi", "[analysis][golden]") {
  const Safetensors file = maps_file("wide_alibi_0");
  const auto layer = maps_layer(file);
  const Vector<double> slopes = file.vector<double>("slopes");
  const auto mask = with_bias(CausalMask{}, AlibiBias({slopes.begin(), slopes.end()}));
  check_recorded_maps(attention_maps(layer, file.matrix<double>("x"), mask), file, recorded_lambda(file));
}

TEST_CASE("maps recorded from heads that share their noise map", "[analysis][golden]") {
  const Safetensors file = maps_file("wide_grouped_0");
  const auto layer = maps_layer(file);
  check_recorded_maps(attention_maps(layer, file.matrix<double>("x")), file, recorded_lambda(file));
}

TEST_CASE("maps recorded of attention to another sequence", "[analysis][golden]") {
  const std::string name = GENERATE("wide_cross_0", "wide_cross_1");
  INFO(name);
  const Safetensors file = maps_file(name);
  const auto layer = maps_layer(file);
  const Matrix<double> x = file.matrix<double>("x"), memory = file.matrix<double>("memory");
  const auto maps = attention_maps_cross(layer, x, memory);
  REQUIRE(maps[0].p1.cols() == memory.rows());
  check_recorded_maps(maps, file, recorded_lambda(file));

  // Of a tape, and of some rows under a mask.
  MultiheadDiffAttention<double>::Tape tape;
  const PaddingMask padding{memory.rows() - 3};
  layer.forward_cross(x, memory, padding, tape);
  const auto of_tape = attention_maps(layer, tape, {2, 3});
  const auto direct = attention_maps_cross(layer, x, memory, padding, {2, 3});
  CHECK(support::identical(of_tape[1].combined, direct[1].combined));
  CHECK(direct[1].combined.rows() == 3);
  CHECK((direct[1].combined.rightCols(3).array() == 0).all());
  CHECK(support::thrown_by<std::invalid_argument>([&] {
          attention_maps_cross(layer, x, memory, FullMask{}, {x.rows(), 1});
        }) == "attention_maps_cross: rows.first = " + std::to_string(x.rows()) +
                  " and rows.count = 1 are out of range: there are " + std::to_string(x.rows()) + " queries");
}

TEST_CASE("the maps of some queries are rows of the whole maps", "[analysis]") {
  check_map_rows(MultiheadDiffAttention<double>({.embed_dim = 24, .num_heads = 2, .num_kv_heads = 1, .seed = 5}));
  check_map_rows(MultiheadDiffAttentionV2<double>({.embed_dim = 24, .num_heads = 2, .seed = 6}));
  check_map_rows(MultiheadAttention<double>({.embed_dim = 24, .num_heads = 4, .num_kv_heads = 2, .seed = 7}));
}

TEST_CASE("rows that there are not, and tapes that do not fit, are refused by name", "[analysis]") {
  const MultiheadDiffAttention<float> layer({.embed_dim = 8, .num_heads = 2}), other({.embed_dim = 8, .num_heads = 1});
  auto rng = support::make_rng();
  const Matrix<float> x = support::random_matrix<float>(6, 8, rng);
  const auto message = [&](const MapRows& rows) {
    return support::thrown_by<std::invalid_argument>([&] { attention_maps(layer, x, CausalMask{}, rows); });
  };
  const std::string six = " out of range: there are 6 queries";
  CHECK(message({4, 3}) == "attention_maps: rows.first = 4 and rows.count = 3 are" + six);
  CHECK(message({-1, 2}) == "attention_maps: rows.first = -1 and rows.count = 2 are" + six);
  CHECK(message({2, -1}) == "attention_maps: rows.first = 2 and rows.count = -1 are" + six);
  CHECK(message({.first = 7}) == "attention_maps: rows.first = 7 is" + six);
  CHECK(message({.first = -1}) == "attention_maps: rows.first = -1 is" + six);
  CHECK(attention_maps(layer, x, CausalMask{}, {.first = 6})[0].p1.rows() == 0);

  MultiheadDiffAttention<float>::Tape tape;
  const auto tape_message = [&](const auto& of) {
    return support::thrown_by<std::invalid_argument>([&] { attention_maps(of, tape); });
  };
  CHECK(tape_message(layer) == "attention_maps: the tape is empty, forward(x, mask, tape) fills it");
  layer.forward(x, CausalMask{}, {4, 2}, tape);
  CHECK(tape_message(layer) == "attention_maps: the tape must hold one sequence, got 2");
  layer.forward(x, CausalMask{}, tape);
  CHECK(support::identical(attention_maps(layer, tape)[1].p2, attention_maps(layer, x)[1].p2));
  const MultiheadDiffAttention<float> narrow({.embed_dim = 8, .num_heads = 2, .head_dim = 3});
  CHECK(tape_message(narrow) == "attention_maps: the tape was filled by a layer of another configuration");
}

TEST_CASE("maps and statistics of a layer whose attention is known", "[analysis]") {
  // Queries of zeros attend evenly: under a causal mask, query i to i + 1 keys with both maps.
  MultiheadDiffAttention<double> layer({.embed_dim = 8, .num_heads = 2, .seed = 9});
  layer.q_proj.weight.setZero();
  auto rng = support::make_rng();
  const double lambda = layer.lambda_value();
  for (const auto& head : attention_maps(layer, support::random_matrix<double>(5, 8, rng))) {
    const Vector<double> support = effective_support(head.p1), entropy = row_entropy(head.combined);
    for (Index i = 0; i < 5; ++i) {
      const auto seen = static_cast<double>(i + 1);
      CHECK(std::abs(support(i) - seen) <= 1e-12);
      CHECK(std::abs(entropy(i) - std::log(seen)) <= 1e-12);
      CHECK(std::abs(attention_share(head.p2, {i}, {0}) - 1 / seen) <= 1e-14);
      CHECK(std::abs(attention_share(head.combined, {i}, {0}) - (1 - lambda) / seen) <= 1e-14);
    }
    CHECK(negative_mass(head.combined).maxCoeff() == 0);
  }
}
