#include <diffattn/hugging_face/diffllama.hpp>
#include <diffattn/hugging_face/diffllama_export.hpp>
#include <diffattn/hugging_face/diffllama_import.hpp>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "hugging_face/checkpoints.hpp"
#include "io/files.hpp"
#include "io/processes.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

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

namespace {

namespace exporting {

using diffattn::DiffLlama;
using diffattn::Dtype;
using diffattn::load_diffllama;
using nlohmann::json;

const std::vector<Index> kTokens = {3, 28, 0, 7, 7, 11, 19, 4, 25, 3, 14, 2, 27};

json read_json(const std::filesystem::path& path) {
  json read = json::parse(files::read(path));
  CHECK(read.erase("diffattn_save_id") == (path.string().find("saved") != std::string::npos ? 1U : 0U));
  return read;
}

/// The tensors of two directories are the same, in type, shape and bits.
void check_same_tensors(const std::filesystem::path& before, const std::filesystem::path& after) {
  const diffattn::DiffLlamaCheckpoint a(before), b(after);
  for (const auto& [name, file] : b.tensors.tensors()) {
    INFO(name);
    const std::string was = a.stored_name(name);
    CHECK(b.tensors.info(name).dtype == a.tensors.info(was).dtype);
    CHECK(b.tensors.info(name).shape == a.tensors.info(was).shape);
    CHECK(support::identical(b.tensors.file_of(name).matrix<double>(name), a.tensors.file_of(was).matrix<double>(was)));
  }
}

/// A checkpoint of config.json `fields` over those of `config`, in tensors of type T.
template <typename T>
void write_checkpoint(const std::filesystem::path& directory, const diffattn::DiffLlamaConfig& config,
                      const json& fields) {
  auto rng = support::make_rng();
  hugging_face::write_checkpoint<T>(directory, config, hugging_face::random_weights(config, rng));
  json all = json::parse(config.to_json());
  all.update(fields);
  files::write(directory / "config.json", all.dump(2));
}

/// A tokenizer, a generation_config.json and fields that nobody knows.
void write_rich_checkpoint(const std::filesystem::path& directory) {
  write_checkpoint<float>(
      directory, hugging_face::small(),
      {{"bos_token_id", 1},
       {"eos_token_id", {2, 5}},
       {"pad_token_id", 0},
       {"initializer_range", 0.013},
       {"rope_scaling", nullptr},
       {"rope_theta", nullptr},
       {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 500.0}, {"note", "mine"}}},
       {"torch_dtype", nullptr},
       {"dtype", "float32"},
       {"transformers_version", "5.12.0"},
       {"_name_or_path", "somewhere/\u00e9"},
       {"task_specific_params", {{"generation", {{"lists", {1, 2.5, {3}, nullptr}}, {"empty", json::object()}}}}},
       {"id2label", {{"0", "LABEL_0"}}},
       {"huge", 1e300}});
  files::write(directory / "generation_config.json",
               R"({"bos_token_id": 1, "eos_token_id": [2, 6], "temperature": 0.6, "unknown": {"x": [1]}})");
  files::write(directory / "tokenizer.json", std::string("{\"model\": {}}\0\xff", 15));
  files::write(directory / "tokenizer_config.json", "{}");
  files::write(directory / "merges.txt", "");
  files::write(directory / "README.md", "not the model's");
  // Element types that differ, and metadata.
  const diffattn::Safetensors file(directory / "model.safetensors");
  diffattn::SafetensorsWriter writer(std::map<std::string, std::string>{{"format", "pt"}, {"made by", "hand"}});
  for (const auto& [name, info] : file.tensors()) {
    const Matrix<float> values = file.matrix<float>(name);
    if (name.find("norm") != name.npos) {
      writer.add(name, values, info.shape);
    } else if (name.find("lambda") != name.npos) {
      writer.add(name, Matrix<double>(values.cast<double>()), info.shape);
    } else if (name.find("mlp") != name.npos) {
      writer.add(name, Matrix<Eigen::half>(values.cast<Eigen::half>()), info.shape);
    } else {
      writer.add(name, Matrix<Eigen::bfloat16>(values.cast<Eigen::bfloat16>()), info.shape);
    }
  }
  writer.save(directory / "model.safetensors");
}

/// Loads and saves, as a trainable decoder or as DiffLlama.
void load_and_save(const std::filesystem::path& from, const std::filesystem::path& to, bool trainable,
                   const diffattn::DiffLlamaExportOptions& options = {}) {
  if (trainable) {
    save_diffllama(load_diffllama<float>(from), to, options);
  } else {
    save_diffllama(DiffLlama<float>::load(from), to, options);
  }
}

}  // namespace exporting

}  // namespace

TEST_CASE("What was read beside the weights is written back", "[models][diffllama]") {
  const bool trainable = GENERATE(true, false);
  const files::Scratch scratch;
  exporting::write_rich_checkpoint(scratch / "read");
  exporting::load_and_save(scratch / "read", scratch / "saved", trainable);
  for (const char* const file : {"config.json", "generation_config.json"}) {
    CHECK(exporting::read_json(scratch / "saved" / file) == exporting::read_json(scratch / "read" / file));
  }
  for (const char* const file : {"tokenizer.json", "tokenizer_config.json", "merges.txt"}) {
    CHECK(files::read(scratch / "saved" / file) == files::read(scratch / "read" / file));
  }
  CHECK_FALSE(std::filesystem::exists(scratch / "saved/README.md"));
  exporting::check_same_tensors(scratch / "read", scratch / "saved");
  CHECK(diffattn::Safetensors(scratch / "saved/model.safetensors").metadata().at("made by") == "hand");
  CHECK(diffattn::DiffLlamaCheckpoint(scratch / "saved").config.eos_token_ids == std::vector<Index>{2, 6});

  // Again, over itself, and from there: always the same bytes.
  const auto bytes = [&](const char* directory) {
    std::string all;
    for (const char* const file : {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}) {
      all += files::read(scratch / directory / file);
    }
    return all;
  };
  const std::string saved = bytes("saved");
  exporting::load_and_save(scratch / "saved", scratch / "saved", trainable);
  CHECK(bytes("saved") == saved);
  exporting::load_and_save(scratch / "saved", scratch / "saved again", !trainable);
  CHECK(bytes("saved again") == saved);
  exporting::load_and_save(scratch / "read", scratch / "read", trainable);
  CHECK(bytes("read") == saved);
}

TEST_CASE("Checkpoints of every spelling are written as they were read", "[models][diffllama]") {
  const bool trainable = GENERATE(true, false);
  for (const auto& entry : std::filesystem::directory_iterator(DIFFATTN_TEST_DATA "/models/transformers")) {
    if (!entry.is_directory()) continue;
    INFO(entry.path().filename().string());
    const files::Scratch scratch;
    exporting::load_and_save(entry.path(), scratch / "saved", trainable);
    auto expected = exporting::read_json(entry.path() / "config.json");
    if (entry.path().filename() == "tied_but_different") expected["tie_word_embeddings"] = false;  // for every reader
    CHECK(exporting::read_json(scratch / "saved/config.json") == expected);
    exporting::check_same_tensors(entry.path(), scratch / "saved");
    CHECK(support::identical(exporting::DiffLlama<float>::load(scratch / "saved").logits(exporting::kTokens),
                             exporting::DiffLlama<float>::load(entry.path()).logits(exporting::kTokens)));
    CHECK(exporting::DiffLlama<float>::load(scratch / "saved").config().eos_token_ids ==
          exporting::DiffLlama<float>::load(entry.path()).config().eos_token_ids);
  }
}

TEST_CASE("Options change what was read, and nothing else", "[models][diffllama]") {
  const bool trainable = GENERATE(true, false);
  const files::Scratch scratch;
  exporting::write_rich_checkpoint(scratch / "read");
  exporting::load_and_save(scratch / "read", scratch / "saved", trainable,
                           {.max_position_embeddings = 99,
                            .eos_token_ids = {7},
                            .bos_token_id = 8,
                            .pad_token_id = 9,
                            .dtype = exporting::Dtype::BF16});
  auto config = exporting::read_json(scratch / "read/config.json"),
       generation = exporting::read_json(scratch / "read/generation_config.json");
  config.update({{"max_position_embeddings", 99}, {"dtype", "bfloat16"}, {"torch_dtype", "bfloat16"}});
  for (auto* const json : {&config, &generation}) {
    json->update({{"eos_token_id", 7}, {"bos_token_id", 8}, {"pad_token_id", 9}});
  }
  CHECK(exporting::read_json(scratch / "saved/config.json") == config);
  CHECK(exporting::read_json(scratch / "saved/generation_config.json") == generation);
  const diffattn::Safetensors file(scratch / "saved/model.safetensors");
  for (const auto& [name, info] : file.tensors()) CHECK(info.dtype == exporting::Dtype::BF16);

  const auto refusal = [&](const diffattn::DiffLlamaExportOptions& options) {
    const std::string before = files::read(scratch / "saved/config.json");
    std::string said = support::thrown_by<std::invalid_argument>(
        [&] { exporting::load_and_save(scratch / "read", scratch / "saved", trainable, options); });
    CHECK(files::read(scratch / "saved/config.json") == before);
    return said;
  };
  CHECK(refusal({.eos_token_ids = {3, 29}}) == "save_diffllama: the eos_token_id 29 is outside the vocabulary of 29");
  CHECK(refusal({.pad_token_id = -1}) == "save_diffllama: the pad_token_id -1 is outside the vocabulary of 29");
  CHECK(refusal({.dtype = exporting::Dtype::I32}) == "save_diffllama: dtype must be F64, F32, F16 or BF16, got I32");
  CHECK(refusal({.max_position_embeddings = 0}).find("max_position_embeddings") != std::string::npos);
}

TEST_CASE("A length that is asked for does not change the frequencies of scaled rotary embeddings",
          "[models][diffllama]") {
  const files::Scratch scratch;
  const std::string directory = DIFFATTN_TEST_DATA "/models/transformers/";
  for (const char* const name : {"rope_llama3_default_length", "rope_yarn", "rope_longrope_short", "rope_linear"}) {
    INFO(name);
    const auto model = exporting::load_diffllama<float>(directory + name);
    save_diffllama(model, scratch / name, {.max_position_embeddings = 4321});
    const auto again = exporting::DiffLlama<float>::load(scratch / name);
    CHECK(again.config().max_position_embeddings == 4321);
    CHECK(support::identical(again.logits(exporting::kTokens), model.logits(exporting::kTokens)));
  }
  const auto dynamic = exporting::load_diffllama<float>(directory + "rope_dynamic");
  CHECK(support::thrown_by<std::invalid_argument>([&] {
          save_diffllama(dynamic, scratch / "dynamic", {.max_position_embeddings = 4321});
        }).find("save_diffllama: max_position_embeddings 4321 is also the context of dynamic scaling, which is ") == 0);
  CHECK_FALSE(std::filesystem::exists(scratch / "dynamic"));

  // A decoder with a longer context is its own configuration.
  auto config = small_config(true);
  config.attention.rotary->scaling = {.kind = diffattn::RotaryScaling::Kind::dynamic, .factor = 2, .context = 5};
  const DiffModel made(config);
  save_diffllama(made, scratch / "made");
  const std::vector<Index> tokens = {1, 5, 3, 10, 0, 5, 5, 2, 9};
  CHECK(exporting::DiffLlama<double>::load(scratch / "made").logits(tokens).isApprox(made.logits(tokens), 1e-12));
}

TEST_CASE("A copy with another rotary embedding says so in the fields that count", "[models][diffllama]") {
  const files::Scratch scratch;
  exporting::write_rich_checkpoint(scratch / "read");
  const auto model = exporting::load_diffllama<float>(scratch / "read");
  auto config = model.config();
  config.attention.rotary->scaling = {.kind = diffattn::RotaryScaling::Kind::linear, .factor = 3};
  auto longer = diffattn::Decoder<float, diffattn::MultiheadDiffAttention<float>>(config);
  std::vector<Matrix<float>> values;
  visit_parameters(model, [&](std::string_view, const auto& p) { values.emplace_back(p); });
  std::size_t at = 0;
  visit_parameters(longer, [&](std::string_view, auto& p) { p = values[at++]; });
  save_diffllama(longer, scratch / "saved");
  CHECK(support::identical(exporting::DiffLlama<float>::load(scratch / "saved").logits(exporting::kTokens),
                           longer.logits(exporting::kTokens)));
  auto expected = exporting::read_json(scratch / "read/config.json");
  expected.erase("rope_parameters");
  expected.update({{"rope_theta", 500.0}, {"rope_scaling", {{"rope_type", "linear"}, {"factor", 3.0}}}});
  CHECK(exporting::read_json(scratch / "saved/config.json") == expected);
}

TEST_CASE("An odd number of key and value heads stays odd until training moves copies apart", "[models][diffllama]") {
  const files::Scratch scratch;
  auto config = hugging_face::small();
  config.num_attention_heads = 12;
  config.num_key_value_heads = 3;
  config.head_dim = 2;
  config.attention_bias = true;
  exporting::write_checkpoint<float>(scratch / "read", config, {{"bos_token_id", 4}});
  auto model = exporting::load_diffllama<float>(scratch / "read");
  save_diffllama(model, scratch / "saved");
  CHECK(exporting::read_json(scratch / "saved/config.json") == exporting::read_json(scratch / "read/config.json"));
  exporting::check_same_tensors(scratch / "read", scratch / "saved");

  const auto change = GENERATE(0, 1, 2);
  auto& attention = model.blocks[1].attention;
  if (change == 0) attention.k_proj.weight(0, 0) += 1;
  if (change == 1) attention.v_proj.weight(3, 2) += 1;
  if (change == 2) attention.k_proj.bias(1) += 1;
  save_diffllama(model, scratch / "saved");
  auto expected = exporting::read_json(scratch / "read/config.json");
  expected["num_key_value_heads"] = 6;
  CHECK(exporting::read_json(scratch / "saved/config.json") == expected);
  const auto again = exporting::load_diffllama<float>(scratch / "saved");
  CHECK(support::identical(again.logits(exporting::kTokens), model.logits(exporting::kTokens)));
}

TEST_CASE("What an element type cannot hold is not saved in it", "[models][diffllama]") {
  const files::Scratch scratch;
  exporting::write_rich_checkpoint(scratch / "read");
  auto model = exporting::load_diffllama<float>(scratch / "read");
  model.blocks[0].feed_forward.up_proj.weight(1, 1) = 1e6f;
  CHECK(support::thrown_by<std::invalid_argument>([&] { save_diffllama(model, scratch / "saved"); }) ==
        "save_diffllama: model.layers.0.mlp.up_proj.weight holds 1000000.000000, which float16 cannot: ask for another "
        "dtype, Dtype::BF16 for instance");
  CHECK_FALSE(std::filesystem::exists(scratch / "saved"));
  save_diffllama(model, scratch / "saved", {.dtype = exporting::Dtype::F32});
  CHECK(support::identical(exporting::load_diffllama<float>(scratch / "saved").logits(exporting::kTokens),
                           model.logits(exporting::kTokens)));
  model.blocks[0].feed_forward.up_proj.weight(1, 1) = std::numeric_limits<float>::infinity();
  CHECK_NOTHROW(save_diffllama(model, scratch / "saved"));  // it can hold that
}

TEST_CASE("Layers that no DiffLlama has are refused by their field", "[models][diffllama]") {
  const files::Scratch scratch;
  const auto message = [&](auto&& change) {
    auto config = small_config(true).attention_of(1);
    change(config);
    DiffModel model(small_config(true));
    model.blocks[1].attention = diffattn::MultiheadDiffAttention<double>(config);
    std::string text = support::thrown_by<std::invalid_argument>([&] { save_diffllama(model, scratch / "model"); });
    CHECK_FALSE(std::filesystem::exists(scratch / "model"));
    return text;
  };
  CHECK(message([](auto& c) { c.depth = 2; }) ==
        "save_diffllama: lambda_init of layer 1 is 0.470713, in a DiffLlama it is 0.355509, that of its depth");
  CHECK(message([](auto& c) { c.lambda_init = 0.8; }) ==
        "save_diffllama: lambda_init of layer 1 is 0.800000, in a DiffLlama it is 0.355509, that of its depth");
  CHECK(
      message([](auto& c) { c.rotary->base = 500; }) ==
      "save_diffllama: rotary.base of layer 1 is 500.000000, in a DiffLlama it is 10000.000000, as in the first layer");
  CHECK(message([](auto& c) { c.rotary.reset(); }) ==
        "save_diffllama: rotary of layer 1 is left out, in a DiffLlama it is that of the first layer");
  CHECK(
      message([](auto& c) { c.rotary->scaling = {.kind = diffattn::RotaryScaling::Kind::linear, .factor = 2}; }) ==
      "save_diffllama: rotary.scaling of layer 1 is {\"rope_type\": \"linear\", \"factor\": 2.0}, in a DiffLlama it is "
      "null");
  CHECK(message([](auto& c) { c.norm_eps = 1e-3; }) ==
        "save_diffllama: norm_eps of layer 1 is 0.001000, in a DiffLlama it is 0.000010, as in the first layer");
  CHECK(message([](auto& c) { c.num_noise_heads = 1; }) ==
        "save_diffllama: num_noise_heads of layer 1 is 1, in a DiffLlama it is 2, one for every head");
  CHECK(message([](auto& c) { c.num_kv_heads = 2; }) ==
        "save_diffllama: num_kv_heads of layer 1 is 2, in a DiffLlama it is 1, as in the first layer");
}

TEST_CASE("A generation_config.json of another model does not stay", "[models][diffllama]") {
  const files::Scratch scratch;
  exporting::write_rich_checkpoint(scratch / "saved");
  exporting::load_and_save(scratch / "saved", scratch / "saved", true);
  const auto one = numbered_model(1);
  save_diffllama(one, scratch / "saved", {.eos_token_ids = {4}});
  CHECK(exporting::read_json(scratch / "saved/generation_config.json") ==
        nlohmann::json(
            {{"_from_model_config", true}, {"bos_token_id", nullptr}, {"eos_token_id", 4}, {"pad_token_id", nullptr}}));
  CHECK(exporting::DiffLlama<double>::load(scratch / "saved").config().eos_token_ids == std::vector<Index>{4});
  save_diffllama(one, scratch / "saved");
  CHECK(exporting::DiffLlama<double>::load(scratch / "saved").config().eos_token_ids.empty());
  CHECK(loaded_number(scratch / "saved") == 1);
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
