// The maps of whole models: those that their layers attend with, under any mask, and the rows of them.

#include <cstddef>
#include <diffattn/hugging_face/diffllama.hpp>
#include <diffattn/kernels/bias.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <diffattn/models/model_maps.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

using namespace diffattn;

/// What the maps add values up to is what the heads of a training pass attend to.
template <typename Attention>
void check_model_maps(const ModelMaps<double>& maps, const Attention& attention, const typename Attention::Tape& tape,
                      std::size_t layer) {
  const auto& config = attention.config();
  REQUIRE(maps[layer].size() == static_cast<std::size_t>(config.num_heads));
  const Index dv = tape.attended.cols() / config.num_heads, sharers = config.num_heads / config.num_kv_heads;
  for (Index h = 0; h < config.num_heads; ++h) {
    INFO("layer " << layer << ", head " << h);
    const Matrix<double> attended =
        maps[layer][static_cast<std::size_t>(h)].combined * tape.v.middleCols(h / sharers * dv, dv);
    CHECK((attended - tape.attended.middleCols(h * dv, dv)).cwiseAbs().maxCoeff() <= 1e-12);
  }
}

template <typename Attention, typename Mask>
void check_decoder_maps(const typename Attention::Config& config, const Mask& mask) {
  const Decoder<double, Attention> model(
      {.vocab_size = 19, .num_layers = 3, .hidden_dim = 20, .attention = config, .seed = 4});
  const std::vector<int> tokens = {3, 1, 18, 0, 0, 7, 7, 2, 11, 4, 5};
  const ModelMaps<double> maps = attention_maps(model, tokens, mask);
  REQUIRE(maps.size() == 3);
  typename Decoder<double, Attention>::Tape tape;
  model.logits(tokens, mask, {11}, tape);
  for (std::size_t layer = 0; layer < 3; ++layer) {
    check_model_maps(maps, model.blocks[layer].attention, tape.blocks[layer].attention, layer);
  }
  const ModelMaps<double> rows = attention_maps(model, tokens, mask, {4, 2});
  for (std::size_t layer = 0; layer < 3; ++layer) {
    CHECK(support::identical(rows[layer][1].combined, maps[layer][1].combined.middleRows(4, 2)));
  }
}

}  // namespace

TEST_CASE("maps of a Decoder are those its layers attend with", "[models][analysis]") {
  const auto biased = with_bias(CausalMask{}, AlibiBias{alibi_slopes(2)});
  check_decoder_maps<MultiheadDiffAttention<double>>({.embed_dim = 16, .num_heads = 2, .rotary = RotaryConfig{}},
                                                     CausalMask{});
  check_decoder_maps<MultiheadDiffAttention<double>>({.embed_dim = 16, .num_heads = 2, .num_kv_heads = 1}, biased);
  check_decoder_maps<MultiheadDiffAttentionV2<double>>({.embed_dim = 16, .num_heads = 2, .rotary = RotaryConfig{}},
                                                       SlidingWindowMask{3});
  check_decoder_maps<MultiheadAttention<double>>({.embed_dim = 16, .num_heads = 2}, biased);
}

TEST_CASE("maps of a Decoder, by the simplest call and with what does not fit", "[models][analysis]") {
  const Decoder<float, MultiheadDiffAttention<float>> model(
      {.vocab_size = 19, .num_layers = 2, .hidden_dim = 20, .attention = {.embed_dim = 16, .num_heads = 2}});
  const std::vector<Index> tokens = {1, 2, 3};
  const auto maps = attention_maps(model, {1, 2, 3});
  CHECK(support::identical(maps[1][0].combined, attention_maps(model, tokens)[1][0].combined));
  CHECK(attention_maps(model, std::vector<Index>{})[1][1].p1.size() == 0);
  CHECK(support::thrown_by<std::invalid_argument>([&] {
          attention_maps(model, {1, 19});
        }) == "Decoder: token 1 is 19, outside the vocabulary of 19");
  CHECK(support::thrown_by<std::invalid_argument>([&] {
          attention_maps(model, tokens, CausalMask{}, {2, 2});
        }) == "attention_maps: rows.first = 2 and rows.count = 2 are out of range: there are 3 queries");
}

TEST_CASE("maps of a DiffLlama are those of its decoder", "[models][analysis]") {
  const auto model = DiffLlama<double>::load(DIFFATTN_TEST_DATA "/models/diffllama_0");
  const std::vector<Index> tokens = {1, 5, 9, 2, 2, 7};
  const ModelMaps<double> maps = attention_maps(model, tokens),
                          rows = attention_maps(model, tokens, CausalMask{}, {5, 1});
  REQUIRE(maps.size() == model.decoder().blocks.size());
  for (std::size_t layer = 0; layer < maps.size(); ++layer) {
    const double lambda = model.decoder().blocks[layer].attention.lambda_value();
    for (std::size_t h = 0; h < maps[layer].size(); ++h) {
      CHECK((maps[layer][h].combined.rowwise().sum().array() - (1 - lambda)).abs().maxCoeff() <= 1e-12);
      CHECK(support::identical(rows[layer][h].p2, maps[layer][h].p2.bottomRows(1)));
    }
  }
}

TEST_CASE("maps of an Encoder see the whole sequence", "[models][analysis]") {
  using Attention = MultiheadDiffAttention<double>;
  const NormPlacement placement = GENERATE(NormPlacement::before, NormPlacement::after);
  const Encoder<double, Attention> model(
      {.num_layers = 2, .hidden_dim = 20, .attention = {.embed_dim = 16, .num_heads = 2}, .norm_placement = placement});
  auto rng = support::make_rng();
  const Matrix<double> x = support::random_matrix<double>(7, 16, rng);
  const ModelMaps<double> maps = attention_maps(model, x);
  typename Encoder<double, Attention>::Tape tape;
  model.forward(x, FullMask{}, tape);
  for (std::size_t layer = 0; layer < 2; ++layer) {
    check_model_maps(maps, model.blocks[layer].attention, tape.blocks[layer].attention, layer);
    CHECK((maps[layer][0].p1.array() > 0).all());
  }
  CHECK(support::identical(attention_maps(model, x, CausalMask{}, {3, 2})[1][1].p1,
                           attention_maps(model, x, CausalMask{})[1][1].p1.middleRows(3, 2)));
}
