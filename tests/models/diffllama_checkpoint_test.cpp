#include <diffattn/models/diffllama_checkpoint.hpp>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "models/hugging_face.hpp"
#include "support/catch.hpp"
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
  CHECK(error_with([](auto& t) { t.erase("lm_head.weight"); }) == "missing: \"lm_head.weight\"");
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
