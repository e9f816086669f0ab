#include <diffattn/hugging_face/diffllama_checkpoint.hpp>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "hugging_face/checkpoints.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/throws.hpp"

namespace {

using diffattn::DiffLlamaCheckpoint;
using support::thrown_by;

const std::string kGolden = DIFFATTN_TEST_DATA "/models/diffllama_0";

}  // namespace

TEST_CASE("A checkpoint tells its configuration and its tensors", "[models][diffllama_checkpoint]") {
  const DiffLlamaCheckpoint checkpoint(kGolden);
  CHECK(checkpoint.config.num_hidden_layers == 3);
  CHECK(checkpoint.tensors.tensors().size() == 42);
  CHECK(checkpoint.tensors.info(DiffLlamaCheckpoint::kEmbedding).shape ==
        std::vector<diffattn::Index>{checkpoint.config.vocab_size, checkpoint.config.hidden_size});
}

TEST_CASE("A checkpoint that does not fit its configuration is refused by name", "[models][diffllama_checkpoint]") {
  auto rng = support::make_rng();
  const auto config = hugging_face::small();
  const auto weights = hugging_face::random_weights(config, rng);
  const files::Scratch scratch;
  const auto path = scratch / "a";
  const auto error_with = [&](auto change) {
    auto tensors = weights;
    change(tensors);
    hugging_face::write_checkpoint<float>(path, config, tensors);
    std::string message = thrown_by<diffattn::FormatError>([&] { DiffLlamaCheckpoint{path}; });
    const std::string begin = path.string() + ": does not hold the tensors of its config.json\n  ";
    REQUIRE(message.substr(0, begin.size()) == begin);
    return message.substr(begin.size());
  };
  CHECK(error_with([](auto& t) { t.erase("model.layers.1.mlp.up_proj.weight"); }) ==
        "missing: \"model.layers.1.mlp.up_proj.weight\"");
  CHECK(error_with([](auto& t) { t.erase("lm_head.weight"); }) ==
        "missing: \"lm_head.weight\"\n"
        "A model without a head was saved: save it with its head (…ForCausalLM), or set tie_word_embeddings to true if "
        "the embedding is its head");
  CHECK(error_with([](auto& t) {
          for (const auto& [name, weight] : hugging_face::Weights(t)) {
            t["module." + name] = weight;
            t.erase(name);
          }
        }).ends_with("\nThe names begin with \"module.\": save the model itself, not what it is wrapped in"));
  CHECK(error_with([](auto& t) { t["model.layers.0.mlp.up_proj.lora_A.weight"] = Eigen::MatrixXd::Zero(2, 24); }) ==
        "surplus: \"model.layers.0.mlp.up_proj.lora_A.weight\"\nAn adapter must be merged into its model first");
  CHECK(error_with([](auto& t) { t["model.layers.0.self_attn.q_proj.bias"] = Eigen::MatrixXd::Zero(1, 24); }) ==
        "surplus: \"model.layers.0.self_attn.q_proj.bias\"");
  CHECK(error_with([](auto& t) { t["model.layers.2.self_attn.lambda_q1"] = Eigen::MatrixXd::Zero(1, 6); }) ==
        "surplus: \"model.layers.2.self_attn.lambda_q1\"");
  CHECK(error_with([](auto& t) { t["model.norm.weight"].resize(1, 23); }) ==
        "shape: \"model.norm.weight\" must be [24], got [23]");
  CHECK(error_with([](auto& t) { t["model.layers.0.self_attn.k_proj.weight"].resize(24, 12); }) ==
        "shape: \"model.layers.0.self_attn.k_proj.weight\" must be [12, 24], got [24, 12]");
  const std::string many = error_with([](auto& t) {
    std::erase_if(t, [](const auto& tensor) { return tensor.first.find("layers") != std::string::npos; });
  });
  CHECK(std::count(many.begin(), many.end(), '\n') == 16);
  CHECK(many.ends_with("\n  and 10 more"));
}

TEST_CASE("More layers than there are tensors are refused before they are counted out",
          "[models][diffllama_checkpoint]") {
  const files::Scratch scratch;
  std::filesystem::create_directory(scratch / "a");
  std::filesystem::copy(kGolden + "/model.safetensors", scratch / "a");
  files::write(scratch / "a" / "config.json", R"({"model_type": "diffllama", "num_hidden_layers": 268435456})");
  CHECK(thrown_by<diffattn::FormatError>([&] { DiffLlamaCheckpoint{scratch / "a"}; }) ==
        (scratch / "a").string() + ": has 42 tensors, too few for num_hidden_layers = 268435456");
}

TEST_CASE("Two names of one tensor are refused", "[models][diffllama_checkpoint]") {
  auto rng = support::make_rng();
  const auto config = hugging_face::small();
  auto weights = hugging_face::random_weights(config, rng);
  weights["norm.weight"] = weights.at("model.norm.weight");
  const files::Scratch scratch;
  hugging_face::write_checkpoint<float>(scratch / "a", config, weights);
  CHECK(thrown_by<diffattn::FormatError>([&] { DiffLlamaCheckpoint{scratch / "a"}; }) ==
        (scratch / "a").string() +
            ": has both \"model.norm.weight\" and \"norm.weight\", which are names of one tensor");
}

TEST_CASE("A directory without safetensors says what to do", "[models][diffllama_checkpoint]") {
  const files::Scratch scratch;
  const auto a = scratch / "a";
  const auto says = [&](const std::filesystem::path& path) {
    const std::string message = thrown_by<std::runtime_error>([&] { DiffLlamaCheckpoint{path}; });
    REQUIRE(message.starts_with(path.string() + ": "));
    return message.substr(path.string().size() + 2);
  };
  const auto says_with = [&](const std::vector<std::string>& names) {
    std::filesystem::remove_all(a);
    std::filesystem::create_directory(a);
    for (const std::string& name : names) files::write(a / name, "{}");
    return says(a);
  };
  CHECK(says(a) == "there is no such directory");
  CHECK(says_with({}) == "has no model.safetensors, nor a model.safetensors.index.json and the files that it names");
  const std::string load = "AutoModelForCausalLM.from_pretrained(\"" + a.string() + "\"",
                    convert = ".save_pretrained(…) in Python with transformers writes model.safetensors";
  for (const char* const name : {"pytorch_model.bin", "pytorch_model.bin.index.json", "model.pth", "tf_model.h5"}) {
    for (const bool with_config : {true, false}) {
      std::vector<std::string> names = {name};
      if (with_config) names.push_back("config.json");
      CHECK(says_with(names) ==
            "has no model.safetensors, but \"" + std::string(name) + "\", which is not read: " + load + ")" + convert);
    }
  }
  CHECK(says_with({"q8.gguf"}) ==
        "has no model.safetensors, but \"q8.gguf\", which is not read: " + load + ", gguf_file=\"q8.gguf\")" + convert);
  CHECK(
      says_with({"adapter_config.json", "adapter_model.safetensors"}) ==
      "has no model.safetensors, but an adapter: merge it into its model first (merge_and_unload() in peft), and save "
      "that");
  CHECK(says_with({"model.fp16.safetensors"}) ==
        "has no model.safetensors, but \"model.fp16.safetensors\": call it model.safetensors");
  CHECK(
      says_with({"model-00001-of-00002.safetensors"}) ==
      "has no model.safetensors, but \"model-00001-of-00002.safetensors\": model.safetensors.index.json, which belongs "
      "to it, is missing");
  std::filesystem::remove(a / "model-00001-of-00002.safetensors");
  files::write(a / "model.safetensors", files::safetensors("{}", ""));
  CHECK(says(a) == "has no config.json, which says what model its weights are of");
  CHECK(says(a / "model.safetensors") == "is a file; give the directory that it is in, with the model's other files");
}

TEST_CASE("A generation_config.json that is none is refused", "[models][diffllama_checkpoint]") {
  const files::Scratch scratch;
  std::filesystem::copy(kGolden, scratch / "a");
  const auto path = scratch / "a" / "generation_config.json";
  const auto refused = [&](const std::string& text) {
    files::write(path, text);
    const std::string message = thrown_by<diffattn::FormatError>([&] { DiffLlamaCheckpoint{scratch / "a"}; });
    REQUIRE(message.starts_with(path.string() + ": "));
    return message.substr(path.string().size() + 2);
  };
  CHECK(refused("{").starts_with("is not valid JSON: "));
  CHECK(refused(R"({"eos_token_id": "x"})") == "eos_token_id must be token ids, got \"x\"");
  CHECK(refused(R"({"eos_token_id": [1, 2.5]})") == "eos_token_id must be token ids, got a list");
  files::write(path, R"({"eos_token_id": [3, -1]})");
  CHECK(DiffLlamaCheckpoint(scratch / "a").config.eos_token_ids == std::vector<diffattn::Index>{3});
}
