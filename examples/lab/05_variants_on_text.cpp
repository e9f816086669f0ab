// Questions 5 and 6 on text: the loss of language models whose attention lacks a part of the differential one, or is
// ordinary attention with a part of it, and λ of every layer through training.

#include "parts/language.hpp"

int main(int argc, char** argv) {
  lab::LanguageOptions options;
  options.models = lab::kLambdaModels;
  for (const char* control : {"norm", "wide", "sign", "wide-value", "wide-sign-norm"}) {
    options.models.push_back(std::string("transformer-") + control);
  }
  const auto experiment = [&] {
    options.shrink();
    const lab::Text text(options.text, options.length);
    const lab::TaskBatch batch = held_out(text, options.length, options.validation_windows);
    const auto measure = [&](const lab::Run& run, const lab::LanguageSize& /*size*/, lab::Model& model,
                             const lab::Progress& progress, lab::MeasurementFile& file, diffattn::ThreadPool& pool) {
      const auto loss = [&] { return diffattn::cross_entropy(model.logits(batch, pool), batch.targets).mean; };
      const std::vector<double> lambdas = model.lambdas(batch);
      for (std::size_t layer = 0; layer < lambdas.size(); ++layer) {
        lab::Fields fields = fields_of(progress);
        fields.emplace_back("layer", std::to_string(layer));
        file.measure(run, model.parameters(), "lambda", lambdas[layer], fields);
      }
      if (!progress.last()) return;
      file.measure(run, model.parameters(), "validation_loss", loss(), fields_of(progress));
      if (model.force_lambda(0)) file.measure(run, model.parameters(), "loss_lambda_0", loss(), fields_of(progress));
    };
    for_each_language_run(options, "variants_on_text", {lab::kLanguageSizes[1]}, text, measure);
  };
  return lab::run_program(
      "Questions 5 and 6 of the lab, on text: what is lost without a part of differential attention.", argc, argv,
      [&](CLI::App& app) { options.declare(app); }, experiment);
}
