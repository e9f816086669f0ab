// A checkpoint that is loaded to be trained: the same model, its gradients, a step that helps.

#include <diffattn/hugging_face/diffllama.hpp>
#include <diffattn/hugging_face/diffllama_export.hpp>
#include <diffattn/hugging_face/diffllama_import.hpp>
#include <diffattn/io/checkpoint.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/cross_entropy.hpp>

#include <filesystem>
#include <string>
#include <type_traits>
#include <vector>

#include "hugging_face/checkpoints.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/numerical_gradient.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

namespace loading {

using diffattn::DiffLlama;
using diffattn::DiffLlamaConfig;
using diffattn::Index;
using diffattn::load_diffllama;
using diffattn::Matrix;
using diffattn::MultiheadDiffAttention;
template <typename Scalar>
using Trainable = diffattn::Decoder<Scalar, MultiheadDiffAttention<Scalar>>;

const std::string kTiny = DIFFATTN_TEST_DATA "/models/diffllama_0";
const std::vector<Index> kTokens = {3, 28, 0, 7, 7, 11, 19, 4, 25, 3, 14, 2, 27};
const std::vector<Index> kTargets(kTokens.begin() + 1, kTokens.end());

static_assert(std::is_same_v<decltype(load_diffllama<float>("")), Trainable<float>>);

/// The mean loss of the tokens that follow each other.
template <typename Scalar>
double loss(const Trainable<Scalar>& model) {
  const std::vector<Index> inputs(kTokens.begin(), kTokens.end() - 1);
  return diffattn::cross_entropy(model.logits(inputs), kTargets).mean;
}

template <typename Scalar>
Trainable<Scalar> gradient_of(const Trainable<Scalar>& model) {
  const std::vector<Index> inputs(kTokens.begin(), kTokens.end() - 1), lengths = {static_cast<Index>(inputs.size())};
  typename Trainable<Scalar>::Tape tape;
  Matrix<Scalar> logits = model.logits(inputs, lengths, tape);
  diffattn::Workspace workspace;
  diffattn::cross_entropy_into(logits, logits, kTargets, diffattn::kIgnoreTarget, workspace);
  auto gradient = zeros_like(model);
  model.backward(logits, tape, gradient);
  return gradient;
}

}  // namespace loading

}  // namespace

TEST_CASE("A checkpoint is loaded as a decoder that computes what DiffLlama does", "[models][diffllama]") {
  std::vector<std::filesystem::path> directories = {loading::kTiny,
                                                    DIFFATTN_TEST_DATA "/../../examples/data/diffllama-bytes"};
  for (const auto& entry : std::filesystem::directory_iterator(DIFFATTN_TEST_DATA "/models/transformers")) {
    if (entry.is_directory()) directories.push_back(entry.path());
  }
  CHECK(directories.size() == 24);
  for (const auto& directory : directories) {
    INFO(directory.filename().string());
    const auto trainable = loading::load_diffllama<float>(directory);
    const auto model = loading::DiffLlama<float>::load(directory);
    CHECK(support::identical(trainable.logits(loading::kTokens), model.logits(loading::kTokens)));
    const auto exact = loading::load_diffllama<double>(directory);
    CHECK(support::identical(exact.logits(loading::kTokens),
                             loading::DiffLlama<double>::load(directory).logits(loading::kTokens)));
  }
}

TEST_CASE("The gradients of a checkpoint are those of its loss", "[models][diffllama]") {
  // A few elements of every parameter of the golden checkpoint, and all of one that has everything else.
  auto rng = support::make_rng();
  loading::DiffLlamaConfig config = hugging_face::small();
  config.num_key_value_heads = 1;
  config.attention_bias = true;
  config.tie_word_embeddings = true;
  const files::Scratch scratch;
  hugging_face::write_checkpoint<double>(scratch / "odd", config, hugging_face::random_weights(config, rng));
  for (const std::string& directory : {loading::kTiny, (scratch / "odd").string()}) {
    auto model = loading::load_diffllama<double>(directory);
    const auto gradient = loading::gradient_of(model);
    std::vector<loading::Matrix<double>> expected;
    visit_parameters(gradient, [&](std::string_view, const auto& p) { expected.push_back(p.template cast<double>()); });
    std::size_t at = 0;
    visit_parameters(model, [&](std::string_view name, auto& parameter) {
      INFO(name);
      const loading::Matrix<double>& analytic = expected[at++];
      for (const loading::Index i : {loading::Index{0}, parameter.size() / 3, parameter.size() - 1}) {
        Eigen::Map<loading::Matrix<double>> one(parameter.data() + i, 1, 1);
        const loading::Matrix<double> numeric = support::numerical_gradient(one, [&] { return loading::loss(model); });
        CHECK(support::excess(Eigen::Map<const loading::Matrix<double>>(analytic.data() + i, 1, 1), numeric) <= 0);
      }
    });
    CHECK(at == expected.size());
  }
}

TEST_CASE("A step of AdamW on a checkpoint lowers its loss", "[models][diffllama]") {
  auto model = loading::load_diffllama<float>(loading::kTiny);
  const double before = loading::loss(model);
  diffattn::AdamW<float> optimizer(model, {.learning_rate = 1e-3});
  optimizer.step(model, loading::gradient_of(model), 1e-3);
  const double after = loading::loss(model);
  CHECK(after < before - 0.01);

  // What it learned is in the files.
  const files::Scratch scratch;
  save_diffllama(model, scratch / "tuned");
  CHECK(support::identical(loading::load_diffllama<float>(scratch / "tuned").logits(loading::kTokens),
                           model.logits(loading::kTokens)));
}

TEST_CASE("Fine-tuning that was interrupted goes on bit for bit", "[models][diffllama]") {
  const files::Scratch scratch;
  auto model = loading::load_diffllama<float>(loading::kTiny);
  diffattn::AdamW<float> optimizer(model);
  optimizer.step(model, loading::gradient_of(model), 1e-3);
  save_checkpoint(model, optimizer, scratch / "training.safetensors");
  auto resumed = loading::load_diffllama<float>(loading::kTiny);
  diffattn::AdamW<float> other(resumed);
  load_checkpoint(resumed, other, scratch / "training.safetensors");
  optimizer.step(model, loading::gradient_of(model), 1e-3);
  other.step(resumed, loading::gradient_of(resumed), 1e-3);
  save_diffllama(model, scratch / "straight");
  save_diffllama(resumed, scratch / "resumed");
  for (const char* const file : {"model.safetensors", "config.json"}) {
    CHECK(files::read(scratch / "straight" / file) == files::read(scratch / "resumed" / file));
  }
}

TEST_CASE("A trainable model has memory of its own", "[models][diffllama]") {
  const files::Scratch scratch;
  std::filesystem::copy(loading::kTiny, scratch / "model");
  const auto model = loading::load_diffllama<float>(scratch / "model");
  const auto before = model.logits(loading::kTokens);
  std::filesystem::resize_file(scratch / "model/model.safetensors", 0);
  CHECK(support::identical(model.logits(loading::kTokens), before));
}

TEST_CASE("What is no checkpoint is not loaded, nor is one without memory", "[models][diffllama]") {
  const files::Scratch scratch;
  CHECK(support::thrown_by<std::runtime_error>([&] { loading::load_diffllama<float>(scratch / "none"); }) ==
        (scratch / "none").string() + ": there is no such directory");
  const std::size_t failed = support::for_every_failing_allocation(
      [] { loading::load_diffllama<float>(DIFFATTN_TEST_DATA "/models/transformers/further_tensors"); }, [](bool) {},
      support::Failures::all_later);
  CHECK(failed >= (support::fails_allocations() ? 100U : 0U));
}
