#include <diffattn/hugging_face/diffllama.hpp>
#include <diffattn/hugging_face/diffllama_export.hpp>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "io/files.hpp"
#include "io/processes.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
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

/// A model whose weights and configuration depend on `number`.
DiffModel numbered_model(int number) {
  auto config = small_config(true);
  config.num_layers = 1;
  config.attention.rotary->base = 1000 * number;
  config.seed = static_cast<std::uint64_t>(number);
  return DiffModel(config);
}

/// Which of those a directory holds; 0 if it holds a mixture.
int loaded_number(const std::filesystem::path& directory) {
  const auto loaded = diffattn::DiffLlama<double>::load(directory);
  const int number = static_cast<int>(loaded.config().rope_theta / 1000);
  const std::vector<Index> tokens = {1, 5, 3, 10, 0};
  return loaded.logits(tokens).isApprox(numbered_model(number).logits(tokens), 1e-12) ? number : 0;
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

TEST_CASE("Weights and configuration of two exports are no model", "[models][diffllama]") {
  const files::Scratch scratch;
  save_diffllama(numbered_model(1), scratch / "one");
  save_diffllama(numbered_model(2), scratch / "two");
  std::filesystem::copy_file(scratch / "two/config.json", scratch / "one/config.json",
                             std::filesystem::copy_options::overwrite_existing);
  const std::string said =
      support::thrown_by<diffattn::FormatError>([&] { diffattn::DiffLlama<double>::load(scratch / "one"); });
  CHECK(said.find("one/config.json: does not belong to the weights beside it") != said.npos);
}

TEST_CASE("Without memory, a model is not exported, saved or loaded, and files are as they were",
          "[models][diffllama]") {
  const auto failures = GENERATE(support::Failures::one, support::Failures::all_later);
  const files::Scratch scratch;
  const auto one = numbered_model(1), two = numbered_model(2);
  save_diffllama(one, scratch / "model");
  const auto bytes = [&] {
    return files::read(scratch / "model/model.safetensors") + files::read(scratch / "model/config.json");
  };
  const std::string before = bytes();
  const auto is_as_before = [&](bool threw) {
    CHECK((bytes() == before) == threw);
    CHECK(scratch.list() == "model");
    if (!threw) save_diffllama(one, scratch / "model");
  };
  std::size_t failed =
      support::for_every_failing_allocation([&] { save_diffllama(two, scratch / "model"); }, is_as_before, failures);
  CHECK(failed >= (support::fails_allocations() ? 30U : 0U));

  save_diffllama(two, scratch / "two");
  const auto loaded = diffattn::DiffLlama<double>::load(scratch / "two");
  std::filesystem::remove_all(scratch / "two");
  save_diffllama(one, scratch / "model");
  support::for_every_failing_allocation([&] { loaded.save(scratch / "model"); }, is_as_before, failures);

  failed = support::for_every_failing_allocation([&] { diffattn::DiffLlama<double>::load(scratch / "model"); },
                                                 [](bool) {}, failures);
  CHECK(failed >= (support::fails_allocations() ? 30U : 0U));
}

TEST_CASE("A model is saved over the files that it is mapped from", "[models][diffllama]") {
  const files::Scratch scratch;
  save_diffllama(numbered_model(1), scratch / "model");
  const auto loaded = diffattn::DiffLlama<double>::load(scratch / "model");
  for (int i = 0; i < 3; ++i) loaded.save(scratch / "model");
  CHECK(loaded_number(scratch / "model") == 1);
  save_diffllama(numbered_model(2), scratch / "model");
  loaded.save(scratch / "again");  // its values are still there
  CHECK(loaded_number(scratch / "again") == 1);
  CHECK(loaded_number(scratch / "model") == 2);
}

#if DIFFATTN_TEST_PROCESSES

/// Kills processes that save models into one directory, for as long; returns how many were left there mixed.
int mixtures_after_kills(std::chrono::milliseconds time) {
  const files::Scratch scratch;
  const auto path = scratch / "model";
  const auto one = numbered_model(1), two = numbered_model(2), three = numbered_model(3);
  save_diffllama(one, path);
  auto rng = support::make_rng();
  int mixtures = 0;
  for (const auto end = std::chrono::steady_clock::now() + time; std::chrono::steady_clock::now() < end;) {
    processes::Child first([&]() -> int {
      for (;;) {
        save_diffllama(two, path);
        save_diffllama(one, path);
      }
    });
    processes::Child second([&]() -> int {
      for (;;) save_diffllama(three, path);
    });
    std::this_thread::sleep_for(std::chrono::microseconds(500 + rng() % 15000));
    if (loaded_number(path) == 0) ++mixtures;
    first.kill();
    if (loaded_number(path) == 0) ++mixtures;
    second.kill();
    if (loaded_number(path) == 0) ++mixtures;
  }
  return mixtures;
}

TEST_CASE("Processes that export to one directory, and are killed, leave one model", "[models][diffllama]") {
  CHECK(mixtures_after_kills(std::chrono::milliseconds(1500)) == 0);
}

TEST_CASE("The same for longer", "[.][models][diffllama]") {
  CHECK(mixtures_after_kills(std::chrono::seconds(60)) == 0);
}

#endif
