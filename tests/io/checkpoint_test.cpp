#include <cstdint>
#include <diffattn/io/checkpoint.hpp>
#include <diffattn/kernels/bias.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/batch_sampler.hpp>
#include <filesystem>
#include <string>
#include <vector>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"
#include "training/parameters.hpp"

using diffattn::AdamW;
using diffattn::Index;
using diffattn::load_checkpoint;
using diffattn::Matrix;
using diffattn::save_checkpoint;
using diffattn::TrainingState;
using support::thrown_by;

namespace {

/// A run on data and noise: linear regression from the tokens, one batch a step.
template <typename Scalar>
struct Regression {
  explicit Regression(std::span<const std::uint8_t> tokens)
      : sampler(tokens, {.length = 5, .batch_size = 2, .seed = 9}),
        optimizer(model, {.learning_rate = 0.01, .weight_decay = 0.1}) {}

  void steps(int count) {
    diffattn::Batch batch;
    for (int i = 0; i < count; ++i) {
      sampler.next(batch);
      SmallModel<Scalar> gradient;
      for (std::size_t t = 0; t < batch.inputs.size(); ++t) {
        const auto column = static_cast<Index>(t % 5);
        const auto error = static_cast<Scalar>(batch.targets[t]) -
                           model.weight(0, column) * static_cast<Scalar>(batch.inputs[t]) - model.norm[column];
        gradient.weight(0, column) -= error * static_cast<Scalar>(batch.inputs[t]);
        gradient.norm[column] -= error + static_cast<Scalar>(random.unit());
        gradient.lambda[0] += static_cast<Scalar>(random.unit()) - Scalar(0.3);
      }
      optimizer.step(model, gradient);
    }
  }

  TrainingState state() const { return {.windows_drawn = sampler.drawn, .random_state = random.state}; }

  void save(const std::filesystem::path& path) const { save_checkpoint(model, optimizer, path, state()); }
  void load(const std::filesystem::path& path) {
    const TrainingState loaded = load_checkpoint(model, optimizer, path);
    sampler.drawn = loaded.windows_drawn;
    random.state = loaded.random_state;
  }

  SmallModel<Scalar> model;
  diffattn::SplitMix64 random{42};
  diffattn::BatchSampler<std::uint8_t> sampler;
  AdamW<Scalar> optimizer;
};

}  // namespace

TEMPLATE_TEST_CASE("A resumed run equals one without interruption, bit for bit", "[training][checkpoint]", float,
                   double) {
  const files::Scratch scratch;
  const std::filesystem::path file = scratch / "run.safetensors";
  std::vector<std::uint8_t> tokens;
  for (int i = 0; i < 200; ++i) tokens.push_back(static_cast<std::uint8_t>(i * i % 251));
  for (const int before : {0, 1, 17, 40}) {  // 40 is in the second epoch
    INFO("interrupted after " << before << " steps");
    Regression<TestType> whole(tokens), first(tokens), resumed(tokens);
    whole.steps(60);
    first.steps(before);
    first.save(file);
    resumed.load(file);
    resumed.steps(60 - before);
    CHECK(same_parameters(resumed.model, whole.model));
    CHECK(same_parameters(resumed.optimizer, whole.optimizer));
    CHECK(resumed.optimizer.steps == 60);
    CHECK(resumed.state().windows_drawn == whole.state().windows_drawn);
    CHECK(resumed.state().random_state == whole.state().random_state);
    CHECK_FALSE(same_parameters(first.model, whole.model));
  }
}

TEST_CASE("A checkpoint is a safetensors file of plain names", "[training][checkpoint]") {
  const files::Scratch scratch;
  const std::filesystem::path file = scratch / "run.safetensors";
  auto rng = support::make_rng();
  auto model = random_model<float>(rng);
  AdamW<float> optimizer(model);
  optimizer.step(model, random_model<float>(rng));
  save_checkpoint(model, optimizer, file,
                  {.windows_drawn = 12, .random_state = 0xfedcba9876543210, .notes = {{"text", "kjv"}}});

  const diffattn::Safetensors stored(file);
  CHECK(stored.tensors().size() == 12);
  CHECK(support::identical(stored.matrix<float>("model.layers.0.q_proj.weight"), model.weight));
  CHECK(support::identical(stored.vector<float>("model.layers.0.lambda_q1"), model.lambda));
  CHECK(stored.contains("optimizer.first_moment.layers.0.q_proj.weight"));
  CHECK(stored.contains("optimizer.second_moment.final_norm.weight"));
  CHECK(stored.metadata() == std::map<std::string, std::string>{{"format", "diffattn training 1"},
                                                                {"optimizer_steps", "1"},
                                                                {"random_state", "18364758544493064720"},
                                                                {"text", "kjv"},
                                                                {"windows_drawn", "12"}});
  auto loaded = random_model<float>(rng);
  AdamW<float> loaded_optimizer(loaded);
  const TrainingState state = load_checkpoint(loaded, loaded_optimizer, file);
  CHECK(state.windows_drawn == 12);
  CHECK(state.random_state == 0xfedcba9876543210);
  CHECK(state.notes == std::map<std::string, std::string>{{"text", "kjv"}});
}

TEST_CASE("A file that does not fit changes nothing", "[training][checkpoint]") {
  const files::Scratch scratch;
  const std::filesystem::path file = scratch / "run.safetensors";
  auto rng = support::make_rng();
  auto model = random_model<float>(rng);
  AdamW<float> optimizer(model);
  optimizer.step(model, random_model<float>(rng));
  const auto before = model;
  const auto optimizer_before = optimizer;
  const auto refusal = [&] {
    const std::string message = thrown_by<diffattn::FormatError>([&] { load_checkpoint(model, optimizer, file); });
    CHECK(same_parameters(model, before));
    CHECK(same_parameters(optimizer, optimizer_before));
    CHECK(optimizer.steps == 1);
    return message;
  };
  const std::string path = file.string();

  diffattn::save_parameters(model, file, "model.");
  CHECK(refusal() == path + ": is no training checkpoint: its metadata must hold format = \"diffattn training 1\"");
  diffattn::save_parameters(model, file, "model.", {{"format", "diffattn training 1"}});
  CHECK(refusal() == path + ": its metadata must hold a number as \"windows_drawn\"");
  for (const char* bad : {"-3", "", "12x", "99999999999999999999"}) {
    diffattn::save_parameters(model, file, "model.", {{"format", "diffattn training 1"}, {"windows_drawn", bad}});
    CHECK(refusal() == path + ": its metadata must hold a number as \"windows_drawn\"");
  }

  // Another model, and moments that lack: all in one message.
  const auto other = random_model<float>(rng, 3, 4);
  save_checkpoint(other, AdamW<float>(other), file, {});
  const std::string message = refusal();
  CHECK(message.find("shape: \"model.layers.0.q_proj.weight\" must be [3, 5], got [3, 4]") != message.npos);
  CHECK(message.find("shape: \"optimizer.second_moment.final_norm.weight\" must be [5, 1], got [4, 1]") !=
        message.npos);

  // What cannot be written leaves the last one as it is.
  save_checkpoint(before, optimizer, file, {.windows_drawn = 5});
  CHECK_THROWS_AS(save_checkpoint(before, optimizer, file / "no" / "folder", {}), std::runtime_error);
  CHECK(load_checkpoint(model, optimizer, file).windows_drawn == 5);
}

TEST_CASE("Without memory, neither saving nor loading changes anything", "[training][checkpoint]") {
  const auto failures = GENERATE(support::Failures::one, support::Failures::all_later);
  const files::Scratch scratch;
  const std::filesystem::path file = scratch / "run.safetensors";
  auto rng = support::make_rng();
  auto model = random_model<float>(rng), stored = random_model<float>(rng);
  AdamW<float> optimizer(model), stored_optimizer(stored);
  optimizer.step(model, random_model<float>(rng));
  stored_optimizer.step(stored, random_model<float>(rng));
  stored_optimizer.step(stored, random_model<float>(rng));
  const TrainingState state{
      .windows_drawn = 7, .random_state = 8, .notes = {{"a long key for a note", "of some text"}}};
  save_checkpoint(stored, stored_optimizer, file, state);
  const std::string bytes = files::read(file);
  const auto before = model;
  const auto optimizer_before = optimizer;

  std::size_t failed = support::for_every_failing_allocation([&] { save_checkpoint(model, optimizer, file, {}); },
                                                             [&](bool threw) {
                                                               CHECK((files::read(file) == bytes) == threw);
                                                               CHECK(scratch.list() == "run.safetensors");
                                                               if (!threw) files::write(file, bytes);
                                                             },
                                                             failures);
  CHECK(failed >= (support::fails_allocations() ? 30U : 0U));

  files::write(file, bytes);
  failed = support::for_every_failing_allocation(
      [&] { load_checkpoint(model, optimizer, file); },
      [&](bool threw) {
        CHECK(same_parameters(model, threw ? before : stored));
        CHECK(same_parameters(optimizer, threw ? optimizer_before : stored_optimizer));
        CHECK(optimizer.steps == (threw ? 1 : 2));
        model = before;
        optimizer = optimizer_before;
      },
      failures);
  CHECK(failed >= (support::fails_allocations() ? 30U : 0U));
}

namespace {

/// A decoder whose layers share a learned bias, a model of one's own: its table is a parameter like any other.
struct BiasedDecoder {
  using Model = diffattn::Decoder<float, diffattn::MultiheadDiffAttention<float>>;
  Model decoder{{.vocab_size = 6, .num_layers = 2, .hidden_dim = 8, .attention = {.embed_dim = 8, .num_heads = 2}}};
  Matrix<float> table = Matrix<float>::Zero(2, 7);

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    diffattn::visit_part("decoder", self.decoder, visitor);
    visitor("table", self.table);
  }

  /// Steps towards `target`, the logits of these tokens.
  void learn(const Matrix<float>& target, AdamW<float>& adamw, int steps) {
    const std::vector<int> tokens = {1, 4, 2, 0, 5, 3, 1};
    auto gradient = diffattn::zeros_like(*this);
    Model::Tape tape;
    for (int step = 0; step < steps; ++step) {
      diffattn::set_zero(gradient);
      const auto mask = with_bias(diffattn::CausalMask{}, diffattn::RelativeBias(table));
      const Matrix<float> dlogits = decoder.logits(tokens, mask, {7}, tape) - target;
      decoder.backward(dlogits, tape, gradient.decoder, gradient.table);
      adamw.step(*this, gradient);
    }
  }
};

}  // namespace

TEST_CASE("A learned bias beside a decoder goes through AdamW and a checkpoint", "[io][checkpoint]") {
  const Matrix<float> target = 3 * Matrix<float>::Identity(7, 6);
  const files::Scratch scratch;
  const std::filesystem::path file = scratch / "run.safetensors";
  BiasedDecoder model, resumed;
  AdamW<float> adamw(model, {.learning_rate = 0.01}), loaded(resumed, {.learning_rate = 0.01});
  model.learn(target, adamw, 5);
  save_checkpoint(model, adamw, file);
  const Matrix<float> at_save = model.table;
  CHECK((at_save.leftCols(4).array() != 0).all());
  model.learn(target, adamw, 3);
  load_checkpoint(resumed, loaded, file);
  CHECK(resumed.table == at_save);
  resumed.learn(target, loaded, 3);
  CHECK(resumed.table == model.table);
  CHECK(resumed.decoder.embedding == model.decoder.embedding);
  CHECK_FALSE(resumed.table == at_save);
}
