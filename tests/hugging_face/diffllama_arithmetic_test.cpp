// DiffLlama in bfloat16: the shipped checkpoint says what it says in float, and other weights are refused by name.

#include <diffattn/hugging_face/diffllama.hpp>
#include <filesystem>
#include <string>
#include <vector>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

namespace {

using diffattn::Arithmetic;
using diffattn::DiffLlama;
using diffattn::Dtype;
using diffattn::Index;

const std::filesystem::path kArithmeticModel = DIFFATTN_TEST_DATA "/../../examples/data/diffllama-bytes";

std::vector<Index> arithmetic_prompt(const std::string& text) {
  std::vector<Index> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

}  // namespace

TEST_CASE("The shipped model writes the same text in bfloat16 as in float", "[hugging_face]") {
  const files::Scratch folder;
  diffattn::save_diffllama(DiffLlama<float>::load(kArithmeticModel), folder / "model", {.dtype = Dtype::BF16});
  const auto wide = DiffLlama<float>::load(folder / "model");
  const auto narrow = DiffLlama<float>::load(folder / "model", {.arithmetic = Arithmetic::bfloat16});
  const std::vector<std::vector<Index>> prompts = {arithmetic_prompt("In the beginning"),
                                                   arithmetic_prompt("And the LORD said unto ")};
  const auto expected = wide.generate(prompts[0], {.max_new_tokens = 110});
  CHECK(narrow.generate(prompts[0], {.max_new_tokens = 110}) == expected);
  CHECK(expected.size() >= 100);
  CHECK(narrow.generate(prompts, {.max_new_tokens = 60}) == wide.generate(prompts, {.max_new_tokens = 60}));

  const diffattn::Matrix<float> logits = wide.logits(expected);
  const float difference = (narrow.logits(expected) - logits).norm() / logits.norm();
  CHECK(difference < 0.01f);
  CHECK(difference > 1e-5f);  // it has rounded something
  const auto unpacked =
      DiffLlama<float>::load(folder / "model", {.arithmetic = Arithmetic::bfloat16, .packed_weights = false});
  CHECK(unpacked.logits(expected) == narrow.logits(expected));
  const auto packed = [](const auto& model) { return model.decoder().blocks[0].feed_forward.up_proj.weight.packed(); };
  CHECK((packed(narrow) != nullptr) == diffattn::simd::kUsesPairs);
  CHECK(packed(unpacked) == nullptr);
  CHECK(packed(wide) == nullptr);
  auto cache = narrow.make_cache<Eigen::bfloat16>();
  CHECK((narrow.logits(expected, cache) - logits).norm() / logits.norm() < 0.02f);
}

TEST_CASE("DiffLlama refuses bfloat16 arithmetic for weights of other types", "[hugging_face]") {
  using Catch::Matchers::ContainsSubstring;
  const diffattn::DiffLlamaOptions bfloat16{.arithmetic = Arithmetic::bfloat16};
  const auto refused = [&](const std::filesystem::path& directory) {
    return support::thrown_by<std::invalid_argument>([&] { DiffLlama<float>::load(directory, bfloat16); });
  };
  CHECK_THAT(refused(kArithmeticModel), ContainsSubstring("\"model.embed_tokens.weight\" is F32"));
  const files::Scratch folder;
  diffattn::save_diffllama(DiffLlama<float>::load(kArithmeticModel), folder / "model", {.dtype = Dtype::F16});
  CHECK_THAT(refused(folder / "model"), ContainsSubstring("weights of BF16") && ContainsSubstring("is F16"));
  CHECK_THAT(support::thrown_by<std::invalid_argument>([&] { DiffLlama<double>::load((folder / "model"), bfloat16); }),
             ContainsSubstring("activations of double"));
}
