// What the answers of the lab rest on, checked: the lab's own attention layers compute what they say, models that are
// compared are of one size, and a question's answer stands where the task says.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <diffattn/training/cross_entropy.hpp>
#include <stdexcept>

#include "parts/model.hpp"
#include "parts/model_makers.hpp"
#include "parts/order_measures.hpp"
#include "parts/task.hpp"
#include "parts/variants.hpp"

namespace {

using lab::Index;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("wrong: %s\n", what.c_str());
  ++failures;
}

/// The gradients that backward gives against differences of the loss Σ y∘dy, in a few entries of each parameter.
template <typename Layer>
void check_gradients(const std::string& name, const typename Layer::Config& config) {
  Layer layer(config);
  const Index n = 7;
  const diffattn::Matrix<double> x = diffattn::Matrix<double>::Random(n, config.embed_dim);
  const diffattn::Matrix<double> dy = diffattn::Matrix<double>::Random(n, config.embed_dim);
  typename Layer::Tape tape;
  layer.forward(x, diffattn::CausalMask{}, tape);
  Layer grad = zeros_like(layer);
  layer.backward(dy, tape, grad);

  std::vector<std::pair<double, double>> pairs;  // a gradient and the difference
  std::vector<const double*> gradients;
  visit_parameters(grad, [&](std::string_view, const auto& values) { gradients.push_back(values.data()); });
  std::size_t number = 0;
  std::size_t parameters = 0;
  visit_parameters(layer, [&](std::string_view parameter, auto& values) {
    for (Index i = 0; i < values.size(); i += std::max<Index>(values.size() / 3, 1)) {
      const double kept = values.data()[i], small = 1e-5;
      const auto loss_at = [&](double value) {
        values.data()[i] = value;
        return layer.forward(x).cwiseProduct(dy).sum();
      };
      const double difference = (loss_at(kept + small) - loss_at(kept - small)) / (2 * small);
      values.data()[i] = kept;
      const double gradient = gradients[number][i];
      expect(std::abs(gradient - difference) < 1e-6 * (1 + std::abs(difference)),
             name + ": gradient of " + std::string(parameter) + " is " + std::to_string(gradient) +
                 ", differences give " + std::to_string(difference));
    }
    ++number;
    parameters += values.size() != 0 ? 1 : 0;
  });
  expect(parameters >= 4, name + " has its parameters");
}

void check_variants() {
  using Ablated = diffattn::AttentionLayer<lab::AblatedVariant<double>>;
  using Control = diffattn::AttentionLayer<lab::ControlVariant<double>>;
  for (const lab::LambdaForm form : {lab::LambdaForm::paper, lab::LambdaForm::raw, lab::LambdaForm::fixed}) {
    check_gradients<Ablated>("ablated", {.embed_dim = 16, .num_heads = 2, .seed = 1, .lambda_form = form});
  }
  check_gradients<Ablated>("ablated, no norm", {.embed_dim = 16, .num_heads = 2, .seed = 1, .head_norm = false});
  check_gradients<Ablated>("ablated, no scale", {.embed_dim = 16, .num_heads = 2, .seed = 1, .head_scale = false});
  check_gradients<Control>("control, norm and sign",
                           {.embed_dim = 16, .num_heads = 4, .seed = 1, .head_norm = true, .head_sign = true});
  check_gradients<Control>(
      "control, sign and wide values",
      {.embed_dim = 16, .num_heads = 2, .head_dim = 4, .seed = 1, .value_heads = 2, .head_sign = true});
}

/// The loss after three steps, which tells two models apart that differ in anything.
double loss_of(const std::string& name, bool forced = false) {
  lab::RecallTask task({.contexts = {12}, .keys = 4, .asked = 4, .tokens = 160});
  diffattn::ThreadPool pool(1);
  const auto model = lab::make_model({.name = name, .vocab_size = task.vocab_size()});
  lab::TaskBatch batch;
  double loss = 0;
  for (Index step = 0; step < 3; ++step) {
    task.draw(batch, 1, step);
    loss = model->step(batch, 1e-2, pool).loss;
  }
  if (!forced) return loss;
  expect(model->force_lambda(0.25), name + " has a λ to force");
  for (const double lambda : model->lambdas(batch)) expect(std::abs(lambda - 0.25) < 1e-6, name + ": λ is as forced");
  return diffattn::cross_entropy(model->logits(batch, pool), batch.targets).mean;
}

void check_models() {
  expect(loss_of("differential") == loss_of("differential-all"), "with all parts the ablated layer is the library's");
  expect(loss_of("transformer") == loss_of("transformer-plain"), "without parts the control is the library's");
  // One of them is told λ, the other the vectors that λ is made of: it is the same but for a rounding.
  const double forced = loss_of("differential", true);
  expect(std::abs(forced - loss_of("differential-all", true)) < 1e-5 * forced, "so they are with λ forced");
  expect(std::abs(forced - loss_of("differential")) > 1e-3 * forced, "which changes the loss");
  for (const char* other :
       {"differential-fixed", "differential-raw", "differential-no-norm", "differential-no-scale"}) {
    expect(loss_of(other) != loss_of("differential-all"), std::string(other) + " differs from all");
    loss_of(other, true);
  }

  std::vector<std::string> names = lab::kModelNames;
  for (const std::string& name : lab::kAblations) names.push_back("differential-" + name);
  for (const std::string& name : lab::kControls) names.push_back("transformer-" + name);
  const auto wanted = static_cast<double>(lab::make_model({})->parameters());
  for (const std::string& name : names) {
    const double parameters = static_cast<double>(lab::make_model({.name = name})->parameters());
    expect(std::abs(parameters / wanted - 1) < 0.01, name + " has as many parameters as the Transformer, within 1 %");
  }
}

void check_recall(bool carried) {
  const lab::RecallConfig config{.contexts = {20, 40}, .keys = 6, .asked = 4, .tokens = 300, .carried = carried};
  lab::RecallTask task(config), same(config);
  lab::TaskBatch batch, again, other;
  task.draw(batch, 5, 17);
  same.draw(again, 5, 17);
  same.draw(other, 6, 17);
  expect(batch.inputs == again.inputs && batch.targets == again.targets, "a batch can be drawn again");
  expect(batch.inputs != other.inputs, "seeds give different batches");
  expect(static_cast<Index>(batch.questions.size()) == 4 * static_cast<Index>(batch.lengths.size()), "questions");
  const Index first_pair = config.key_kinds + config.value_kinds + config.noise_kinds;
  for (const auto& question : batch.questions) {
    const auto row = static_cast<std::size_t>(question.row), answer = static_cast<std::size_t>(question.answer);
    const Index key = batch.inputs[row], value = batch.targets[row] - config.key_kinds;
    expect(question.answer < question.row && question.depth >= 0 && question.depth <= 1, "the answer stands before");
    if (carried) {
      expect(batch.inputs[answer] == first_pair + key * config.value_kinds + value, "the needle has key and value");
    } else {
      expect(batch.inputs[answer - 1] == key && batch.inputs[answer] == batch.targets[row],
             "the value is behind its key");
    }
  }
}

/// Plain loops and kernels give the same logits, and every score and hidden value is seen.
void check_rounding() {
  const std::vector<Index> tokens = {7, 1, 250, 3, 3, 99, 0, 12, 7};
  const auto n = static_cast<Index>(tokens.size());
  diffattn::ThreadPool pool(1);
  for (const char* name : {"transformer", "differential", "grouped"}) {
    const auto model = lab::make_model({.name = name});
    const lab::Matrix<float> logits = model->logits({tokens, tokens, {n}, {}}, pool);
    lab::InnerValues seen;
    const auto error = [&](int bits) {
      return (model->rounded(tokens, bits, bits == 0 ? &seen : nullptr) - logits).cwiseAbs().maxCoeff();
    };
    expect(error(0) < 1e-5f, std::string(name) + ": without rounding the logits are the model's");
    expect(error(12) < error(8) && error(8) < error(3), std::string(name) + ": fewer bits, larger errors");
    // Two layers of four heads, of two with two maps, of four with two maps.
    const std::size_t maps = std::string(name) == "grouped" ? 16 : 8;
    expect(seen.scores.size() == maps * static_cast<std::size_t>(n * (n + 1) / 2), "every score is seen");
    expect(seen.hidden.size() == static_cast<std::size_t>(2 * 64 * n), "every hidden value is seen");
  }
  bool refused = false;
  try {
    lab::make_model({.name = "v2"})->rounded(tokens, 4, nullptr);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  expect(refused, "rounded says of which models it knows nothing");
}

/// Items of a group share a label, the examples are asked before they are shown, and other orders hold the same examples.
void check_order() {
  const lab::OrderConfig config{.groups = 3, .members = 2, .labels = 5, .shots = 40, .batch = 3, .noise = 0.3};
  lab::OrderTask task(config);
  lab::TaskBatch batch;
  task.draw(batch, 3, 8);
  expect(static_cast<Index>(batch.inputs.size()) == 3 * config.length(), "as many tokens as asked for");
  Index wrong = 0;
  for (std::size_t sequence = 0; sequence < 3; ++sequence) {
    std::vector<Index> label_of_group(3, -1);
    for (std::size_t i = 80 * sequence; i < 80 * (sequence + 1); i += 2) {
      const Index item = batch.inputs[i], label = batch.targets[i] - config.label_token(0);
      Index& known = label_of_group[static_cast<std::size_t>(item / 2)];
      if (known == -1) known = label;
      expect(known == label && label >= 0 && label < 5, "a group has one label");
      const Index shown = batch.inputs[i + 1] - config.example(item, 0);
      expect(shown >= 0 && shown < 5, "the example is of the item that was asked");
      wrong += shown != label ? 1 : 0;
    }
  }
  expect(wrong > 10 && wrong < 50, "about a quarter of the examples is wrong: " + std::to_string(wrong) + " of 120");

  diffattn::SplitMix64 random(1);
  std::vector<lab::Shot> shots;
  for (Index i = 0; i < 30; ++i) shots.push_back({i, i % 5, 0});
  arrange(shots, lab::Arrangement::by_label, 5, random);
  Index changes = 0, items = 0;
  for (std::size_t i = 0; i < shots.size(); ++i) {
    items += shots[i].item;
    changes += i > 0 && shots[i].shown != shots[i - 1].shown ? 1 : 0;
  }
  expect(changes == 4 && items == 29 * 30 / 2, "label after label, and the same examples");
}

}  // namespace

int main() {
  check_variants();
  check_models();
  check_recall(true);
  check_recall(false);
  check_rounding();
  check_order();
  std::printf("%d checks failed\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
