#include <diffattn/models/diffllama.hpp>
#include <diffattn/models/diffllama_export.hpp>
#include <vector>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"

namespace {

using diffattn::Index;
using diffattn::Matrix;

using DiffModel = diffattn::Decoder<double, diffattn::MultiheadDiffAttention<double>>;

DiffModel::Config small_config(bool tied) {
  return {.vocab_size = 11,
          .num_layers = 3,
          .hidden_dim = 10,
          .attention = {.embed_dim = 16, .num_heads = 2, .num_kv_heads = 1, .rotary = diffattn::RotaryConfig{}},
          .tied_head = tied};
}

}  // namespace

TEST_CASE("An exported decoder is the same function of the tokens", "[models][diffllama]") {
  auto rng = support::make_rng();
  const bool tied = GENERATE(false, true);
  const auto pairing = GENERATE(diffattn::RotaryPairing::interleaved, diffattn::RotaryPairing::half);
  auto config = small_config(tied);
  config.attention.rotary->pairing = pairing;
  config.attention.bias = true;
  DiffModel model(config);
  diffattn::visit_parameters(
      model, [&](std::string_view, auto& p) { p = 0.5 * support::random_matrix<double>(p.rows(), p.cols(), rng); });
  const files::Scratch scratch;
  save_diffllama(model, scratch / "model", {.max_position_embeddings = 40, .eos_token_ids = {3}});
  const auto loaded = diffattn::DiffLlama<double>::load(scratch / "model");
  CHECK(loaded.config().max_position_embeddings == 40);
  CHECK(loaded.config().eos_token_ids == std::vector<Index>{3});
  const std::vector<Index> tokens = {1, 5, 3, 10, 0, 5, 5, 2, 9};
  CHECK(loaded.logits(tokens).isApprox(model.logits(tokens), 1e-12));
}

TEST_CASE("What DiffLlama does not have is not exported", "[models][diffllama]") {
  const files::Scratch scratch;
  const auto message = [&](const DiffModel::Config& config) {
    const std::string text =
        support::thrown_by<std::invalid_argument>([&] { save_diffllama(DiffModel(config), scratch / "model"); });
    CHECK_FALSE(std::filesystem::exists(scratch / "model"));
    return text;
  };
  auto config = small_config(true);
  config.attention.rotary.reset();
  CHECK(message(config) == "save_diffllama: DiffLlama has a rotary embedding, the model has none");
  config = small_config(true);
  config.attention.lambda_init = 0.8;
  CHECK(message(config) == "save_diffllama: DiffLlama has the lambda_init of the layer's depth");
  config = small_config(true);
  config.norm_eps = 1e-6;
  CHECK(message(config) == "save_diffllama: DiffLlama has one norm_eps, attention and decoder have two");
}
