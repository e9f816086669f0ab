#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/hugging_face/diffllama.hpp>

#include "hugging_face/checkpoints.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

using diffattn::DiffLlama;
using diffattn::DiffLlamaConfig;
using diffattn::Index;
using diffattn::Matrix;
using diffattn::Safetensors;
using hugging_face::small;
using Kind = diffattn::RotaryScaling::Kind;

const std::string kRandom = DIFFATTN_TEST_DATA "/models/diffllama_0";
const std::string kTrained = DIFFATTN_TEST_DATA "/../../examples/data/diffllama-bytes";

template <typename A, typename B>
double relative_error(const A& logits, const B& exact) {
  return (logits.template cast<double>() - exact).cwiseAbs().maxCoeff() / exact.cwiseAbs().maxCoeff();
}

template <typename Scalar>
void check_golden(const std::string& directory, double bound) {
  const auto model = DiffLlama<Scalar>::load(directory);
  const Safetensors expected(directory + "/expected.safetensors");
  const Matrix<std::int64_t> ids = expected.matrix<std::int64_t>("input_ids");
  const Matrix<double> logits = expected.matrix<double>("logits");
  for (Index i = 0; i < ids.rows(); ++i) {
    const std::vector<Index> tokens(ids.row(i).data(), ids.row(i).data() + ids.cols());
    CHECK(relative_error(model.logits(tokens), logits.middleRows(i * ids.cols(), ids.cols())) < bound);
  }

  const auto prompt = expected.vector<std::int64_t>("greedy_prompt"), all = expected.vector<std::int64_t>("greedy");
  const std::vector<Index> continuation(all.data() + prompt.size(), all.data() + all.size());
  const auto count = static_cast<Index>(continuation.size());
  CHECK(model.generate(prompt, {.max_new_tokens = count}) == continuation);
  CHECK(model.generate(prompt, {.max_new_tokens = count, .prefill_chunk = 3}) == continuation);
}

template <typename Change>
DiffLlamaConfig changed(Change change) {
  DiffLlamaConfig config = small();
  change(config);
  return config;
}

const std::vector<Index> kTokens = {3, 28, 0, 7, 7, 11, 19, 4, 25, 3, 14, 2, 27};

/// The checkpoint in three files, with their index.
void write_shards(const std::filesystem::path& directory, const DiffLlamaConfig& config,
                  const hugging_face::Weights& weights) {
  std::filesystem::create_directory(directory);
  files::write(directory / "config.json", config.to_json());
  hugging_face::Weights shards[3];
  std::string map;
  int n = 0;
  for (const auto& [name, weight] : weights) {
    const std::string file = "model-0000" + std::to_string(n % 3 + 1) + "-of-00003.safetensors";
    map += (n == 0 ? "" : ", ") + ("\"" + name) + "\": \"" + file + "\"";
    shards[n++ % 3][name] = weight;
  }
  for (int i = 0; i < 3; ++i) {
    hugging_face::write_tensors<float>(directory / ("model-0000" + std::to_string(i + 1) + "-of-00003.safetensors"),
                                       shards[i]);
  }
  files::write(directory / "model.safetensors.index.json",
               R"({"metadata": {"total_size": 1}, "weight_map": {)" + map + "}}");
}

template <typename F>
std::string format_error(F&& f) {
  return support::thrown_by<diffattn::FormatError>(f);
}

template <typename F>
std::string refusal(F&& f) {
  return support::thrown_by<std::invalid_argument>(f);
}

}  // namespace

TEST_CASE("DiffLlama reproduces recorded logits and greedy text", "[models][diffllama][golden]") {
  const std::string directory = GENERATE(kRandom, kTrained);
  INFO(directory);
  check_golden<double>(directory, 1e-9);
  check_golden<float>(directory, 1e-4);
}

TEST_CASE("DiffLlama agrees with checkpoints that transformers wrote and evaluated", "[models][diffllama][golden]") {
  int checkpoints = 0;
  for (const auto& entry : std::filesystem::directory_iterator(DIFFATTN_TEST_DATA "/models/transformers")) {
    if (!entry.is_directory()) continue;
    ++checkpoints;
    INFO(entry.path().filename().string());
    const Safetensors expected(entry.path() / "expected.safetensors");
    const auto model = DiffLlama<double>::load(entry.path());
    // transformers rounds angles and softmax to float even in a double model.
    CHECK(relative_error(model.logits(expected.vector<std::int64_t>("tokens")), expected.matrix<double>("logits")) <
          2e-6);
    const auto stop = expected.vector<std::int64_t>("eos_token_ids");
    CHECK(model.config().eos_token_ids == std::vector<Index>(stop.begin(), stop.end()));

    // What is saved is the same model, whatever the names and the spelling of what was read.
    const files::Scratch scratch;
    model.save(scratch / "again");
    CHECK(support::identical(DiffLlama<double>::load(scratch / "again").logits(kTokens), model.logits(kTokens)));
  }
  CHECK(checkpoints == 22);
}

TEST_CASE("DiffLlama computes what Hugging Face's code does, whatever the configuration", "[models][diffllama]") {
  auto rng = support::make_rng();
  const DiffLlamaConfig config =
      GENERATE(small(), changed([](auto& c) { c.tie_word_embeddings = true; }),
               changed([](auto& c) { c.attention_bias = true; }), changed([](auto& c) { c.num_key_value_heads = 4; }),
               changed([](auto& c) { c.num_key_value_heads = 1; }), changed([](auto& c) {
                 c.num_attention_heads = 12;
                 c.num_key_value_heads = 3;
                 c.head_dim = 2;
                 c.attention_bias = true;
               }),
               changed([](auto& c) { c.head_dim = 10; }), changed([](auto& c) { c.rope_theta = 50; }),
               changed([](auto& c) { c.rope_scaling = {.kind = Kind::linear, .factor = 3}; }), changed([](auto& c) {
                 c.max_position_embeddings = 5;
                 c.rope_scaling = {.kind = Kind::dynamic, .factor = 2, .context = 5};
               }),
               changed([](auto& c) {
                 c.rope_theta = 100;
                 c.rope_scaling = {
                     .kind = Kind::llama3, .factor = 8, .context = 30, .low_freq_factor = 1, .high_freq_factor = 4};
               }));
  INFO(config.to_json());
  auto weights = hugging_face::random_weights(config, rng);
  hugging_face::round_to<Eigen::bfloat16>(weights);
  hugging_face::round_to<Eigen::half>(weights);  // what all four types can hold
  const Matrix<double> exact = hugging_face::logits(config, weights, kTokens);

  const files::Scratch scratch;
  const auto check = [&]<typename T>(T, const char* name) {
    INFO(name);
    hugging_face::write_checkpoint<T>(scratch / name, config, weights);
    CHECK(relative_error(DiffLlama<double>::load(scratch / name).logits(kTokens), exact) < 1e-11);
    CHECK(relative_error(DiffLlama<float>::load(scratch / name).logits(kTokens), exact) < 1e-4);
  };
  check(double{}, "F64");
  check(float{}, "F32");
  check(Eigen::half{}, "F16");
  check(Eigen::bfloat16{}, "BF16");
}

TEST_CASE("What DiffLlama saves it loads, in the types that it read", "[models][diffllama]") {
  auto rng = support::make_rng();
  const DiffLlamaConfig config =
      GENERATE(small(), changed([](auto& c) {
                 c.num_key_value_heads = 1;
                 c.attention_bias = true;
                 c.tie_word_embeddings = true;
                 c.eos_token_ids = {5, 6};
                 c.rope_scaling = {
                     .kind = Kind::llama3, .factor = 8, .context = 16, .low_freq_factor = 1, .high_freq_factor = 4};
               }));
  const auto weights = hugging_face::random_weights(config, rng);
  const files::Scratch scratch;
  const auto check = [&]<typename T>(T) {
    hugging_face::write_checkpoint<T>(scratch / "a", config, weights);
    const auto model = DiffLlama<float>::load(scratch / "a");
    model.save(scratch / "b" / "c");
    const auto again = DiffLlama<float>::load(scratch / "b" / "c");
    CHECK(support::identical(again.logits(kTokens), model.logits(kTokens)));
    CHECK(again.config().to_json() == config.to_json());

    const Safetensors before(scratch / "a" / "model.safetensors"), after(scratch / "b" / "c" / "model.safetensors");
    CHECK(after.metadata().at("format") == "pt");
    REQUIRE(after.tensors().size() == before.tensors().size());
    for (const auto& [name, info] : before.tensors()) {
      INFO(name);
      CHECK(after.info(name).dtype == info.dtype);
      CHECK(after.info(name).shape == info.shape);
      CHECK(after.vector<float>(name) == before.vector<float>(name));
    }
  };
  check(float{});
  check(Eigen::half{});
  check(Eigen::bfloat16{});
}

TEST_CASE("DiffLlama's logits behind a cache go into a matrix of yours, without the heap", "[models][diffllama]") {
  const auto model = DiffLlama<float>::load(kTrained);
  diffattn::ThreadPool pool(2);
  diffattn::Workspace workspace;
  auto by_value = model.make_cache(), cache = model.make_cache({.reserve = 30});
  const std::vector<Index> next = {4, 2};
  const Matrix<float> first = model.logits(kTokens, by_value), second = model.logits(next, by_value, pool);
  const Index n = first.rows(), vocabulary = model.config().vocab_size;
  Matrix<float> y(n, vocabulary), z(2, vocabulary), whole(n, vocabulary);
  const auto feed = [&] {
    cache.clear();
    model.logits_into(y, kTokens, cache, workspace, pool);
    model.logits_into(z, next, cache, workspace, pool);
    model.logits_into(whole, kTokens, workspace, pool);
  };
  feed();
  CHECK(support::identical(y, first));
  CHECK(support::identical(z, second));
  CHECK(support::identical(whole, model.logits(kTokens)));
  CHECK(support::identical(whole, model.logits(kTokens, pool)));
  feed();
  const std::size_t before = support::allocations();
  feed();
  CHECK(support::allocations() == before);
  CHECK(model.generate(kTokens, {.max_new_tokens = 9}, pool) == model.generate(kTokens, {.max_new_tokens = 9}));

  // A free function, too, as for a Decoder.
  const files::Scratch scratch;
  save_diffllama(model, scratch / "again");
  CHECK(support::identical(DiffLlama<float>::load(scratch / "again").logits(kTokens), whole));
}

TEST_CASE("Weights stay in the file", "[models][diffllama]") {
  const auto model = DiffLlama<float>::load(kTrained);
  const Safetensors file(kTrained + "/model.safetensors");
  const auto copy = model;
  const auto address = [](const diffattn::FrozenMatrix& weight) {
    return weight.visit([](const auto& view) { return static_cast<const void*>(view.data); });
  };
  CHECK(address(copy.decoder().embedding) == address(model.decoder().embedding));
  const auto& layer = model.decoder().blocks[1];
  const auto& before = model.decoder().embedding;
  // As far from the embedding as in the file: it is one mapping of it.
  const auto distance = [&](const diffattn::FrozenMatrix& weight) {
    return static_cast<const char*>(address(weight)) - static_cast<const char*>(address(before));
  };
  const auto begin = [&](const char* name) { return static_cast<std::ptrdiff_t>(file.info(name).begin); };
  CHECK(distance(layer.feed_forward.up_proj.weight) ==
        begin("model.layers.1.mlp.up_proj.weight") - begin("model.embed_tokens.weight"));
  CHECK(distance(layer.attention.out_proj.weight) ==
        begin("model.layers.1.self_attn.o_proj.weight") - begin("model.embed_tokens.weight"));
}

TEST_CASE("A sharded checkpoint is the same model", "[models][diffllama]") {
  auto rng = support::make_rng();
  const auto config = small();
  const auto weights = hugging_face::random_weights(config, rng);
  const files::Scratch scratch;
  hugging_face::write_checkpoint<float>(scratch / "whole", config, weights);
  write_shards(scratch / "sharded", config, weights);
  CHECK(support::identical(DiffLlama<float>::load(scratch / "sharded").logits(kTokens),
                           DiffLlama<float>::load(scratch / "whole").logits(kTokens)));
}

TEST_CASE("A tied head may be stored as well, if it is the embedding", "[models][diffllama]") {
  auto rng = support::make_rng();
  const auto config = changed([](auto& c) { c.tie_word_embeddings = true; });
  auto weights = hugging_face::random_weights(config, rng);
  const files::Scratch scratch;
  const auto load = [&](const char* name) { return DiffLlama<float>::load(scratch / name).logits(kTokens); };
  hugging_face::write_checkpoint<Eigen::half>(scratch / "without", config, weights);
  const Matrix<float> expected = load("without");
  weights["lm_head.weight"] = weights.at("model.embed_tokens.weight");
  hugging_face::write_checkpoint<Eigen::half>(scratch / "with", config, weights);
  CHECK(support::identical(load("with"), expected));
  DiffLlama<float>::load(scratch / "with").save(scratch / "saved");
  CHECK_FALSE(Safetensors(scratch / "saved" / "model.safetensors").contains("lm_head.weight"));

  write_shards(scratch / "sharded", config, weights);
  CHECK_NOTHROW(load("sharded"));

  // With other values the head is one of its own, as it is to transformers.
  weights["lm_head.weight"](28, 23) += 1;
  auto free_config = config;
  free_config.tie_word_embeddings = false;
  hugging_face::write_checkpoint<Eigen::half>(scratch / "free", free_config, weights);
  write_shards(scratch / "sharded", config, weights);
  CHECK_FALSE(DiffLlama<float>::load(scratch / "sharded").config().tie_word_embeddings);
  hugging_face::write_checkpoint<Eigen::half>(scratch / "with", config, weights);
  CHECK(support::identical(load("with"), load("free")));
  CHECK_FALSE(support::identical(load("with"), expected));
  CHECK_FALSE(DiffLlama<float>::load(scratch / "with").config().tie_word_embeddings);
  weights["lm_head.weight"].resize(28, 24);
  hugging_face::write_checkpoint<Eigen::half>(scratch / "with", config, weights);
  CHECK(format_error([&] { load("with"); }) == (scratch / "with").string() +
                                                   ": does not hold the tensors of its config.json\n"
                                                   "  shape: \"lm_head.weight\" must be [29, 24], got [28, 24]");
}

TEST_CASE("A sequence fed whole, in chunks or token by token has the same logits", "[models][diffllama]") {
  const auto model = DiffLlama<float>::load(kRandom);
  std::vector<Index> tokens;
  for (Index i = 0; i < 40; ++i) tokens.push_back(i * i % 97);
  const Matrix<float> whole = model.logits(tokens);
  for (const std::size_t chunk : {1u, 7u, 16u, 40u}) {
    INFO("chunk " << chunk);
    auto cache = model.make_cache();
    for (std::size_t at = 0; at < tokens.size(); at += chunk) {
      const std::span<const Index> some(tokens.data() + at, std::min(chunk, tokens.size() - at));
      const Matrix<float> logits = model.logits(some, cache);
      const auto expected = whole.middleRows(static_cast<Index>(at), logits.rows());
      CHECK((logits - expected).cwiseAbs().maxCoeff() < 1e-5f * whole.cwiseAbs().maxCoeff());
    }
    CHECK(cache.position() == 40);
    auto branch = cache.fork();
    cache.truncate(10);
    CHECK(support::identical(model.logits({5}, cache).row(0), model.logits({5}, branch).row(0)) == false);
    cache.truncate(10);
    const Matrix<float> again = model.logits(std::span<const Index>(tokens).subspan(10, 1), cache);
    CHECK((again - whole.row(10)).cwiseAbs().maxCoeff() < 1e-5f * whole.cwiseAbs().maxCoeff());
  }
}

TEST_CASE("Tokens outside the vocabulary and sequences that are too long are refused", "[models][diffllama]") {
  const auto model = DiffLlama<float>::load(kTrained);
  CHECK(refusal([&] { model.logits({65, 256}); }) == "Decoder: token 1 is 256, outside the vocabulary of 256");
  CHECK(refusal([&] { model.generate({65, -1}); }) == "Decoder: token 1 is -1, outside the vocabulary of 256");
  const std::vector<int> long_prompt(1025, 65);
  CHECK(refusal([&] { model.logits(long_prompt); }) ==
        "DiffLlama: a sequence of 1025 tokens is longer than the 1024 positions that the model has");
  CHECK(refusal([&] { model.generate(long_prompt); }) ==
        "generate: the prompt has 1025 tokens, there is room for 1024");

  auto cache = model.make_cache({.max_tokens = 6});
  model.logits({1, 2, 3, 4}, cache);
  CHECK(refusal([&] {
          model.logits({5, 6, 7}, cache);
        }) == "Decoder: the cache holds at most 6 tokens and has 4, cannot append 3");
  CHECK(refusal([&] { model.logits({5, 600}, cache); }) == "Decoder: token 1 is 600, outside the vocabulary of 256");
  CHECK(cache.position() == 4);
  auto other = diffattn::DecoderCache<float>(3);
  CHECK(refusal([&] { model.logits({5}, other); }) == "Decoder: the cache must have 4 layers, got 3");
  const auto expected = model.logits({1, 2, 3, 4, 5, 6}).row(5).eval();
  CHECK((model.logits({5, 6}, cache).row(1) - expected).cwiseAbs().maxCoeff() < 1e-4f * expected.cwiseAbs().maxCoeff());
}

TEST_CASE("Memory may fail at any point of loading", "[models][diffllama]") {
  const std::string directory = DIFFATTN_TEST_DATA "/models/transformers/further_tensors";
  const Matrix<float> expected = DiffLlama<float>::load(directory).logits({1, 2, 3});
  for (const auto failures : {support::Failures::one, support::Failures::all_later}) {
    const std::size_t failed =
        support::for_every_failing_allocation([&] { DiffLlama<float>::load(directory); }, [](bool) {}, failures);
    CHECK(failed >= (support::fails_allocations() ? 100U : 0U));
  }
  CHECK(support::identical(DiffLlama<float>::load(directory).logits({1, 2, 3}), expected));
}

TEST_CASE("DiffLlama writes many texts at once, and gives logits of many sequences", "[models][diffllama][batch]") {
  const auto model = DiffLlama<float>::load(kTrained);
  diffattn::ThreadPool pool(2);
  const std::vector<std::vector<int>> prompts = {{65, 110, 100, 32}, {84}, {71, 111, 100}};
  const auto options = std::vector<diffattn::GenerateOptions>{{.max_new_tokens = 12},
                                                              {.max_new_tokens = 9, .temperature = 0.7, .seed = 3},
                                                              {.max_new_tokens = 15, .stop_tokens = {32}}};
  std::vector<std::vector<Index>> expected;
  for (std::size_t i = 0; i < 3; ++i) expected.push_back(model.generate(prompts[i], options[i]));
  CHECK(model.generate(prompts, options) == expected);
  CHECK(model.generate(prompts, options, pool) == expected);
  auto a = model.make_cache(), b = model.make_cache({.window = 200}), c = model.make_cache({.reserve = 50});
  const std::vector<diffattn::DecoderCache<float>*> caches = {&a, &b, &c};
  CHECK(model.generate(prompts, options, caches, pool) == expected);
  CHECK(model.generate(prompts, {.max_new_tokens = 12})[0] == expected[0]);

  const std::vector<Index> next = {97, 98, 99};
  auto fork = b.fork();
  const Matrix<float> logits = model.logits(next, caches);
  // Not bit for bit: the activation of a row that is no whole number of packets is rounded by where it lies.
  CHECK(logits.row(1).isApprox(model.logits({98}, fork), 1e-4f));
  CHECK(refusal([&] {
          model.logits({97, 98, 256}, caches);
        }) == "Decoder: sequence 2: token 0 is 256, outside the vocabulary of 256");
  // As long as the model has positions.
  model.logits(std::vector<Index>(static_cast<std::size_t>(1024 - a.position()), 65), a);
  CHECK(refusal([&] { model.logits(next, caches); }) ==
        "DiffLlama: sequence 0: a sequence of 1025 tokens is longer than the 1024 positions that the model has");
  CHECK(refusal([&] { model.generate(prompts, options, caches); }) ==
        "generate: sequence 0: the prompt has 4 tokens, there is room for 0");

  // A mask, as for every model.
  CHECK(support::identical(model.logits(next, diffattn::SlidingWindowMask{1 << 20}), model.logits(next)));
  CHECK(!support::identical(model.logits(next, diffattn::SlidingWindowMask{1}), model.logits(next)));
}
