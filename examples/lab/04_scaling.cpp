// Question 4: byte-level language models of four sizes, two learning rates: validation loss against parameters, bytes
// read, floating-point operations and seconds of the CPU.

#include "parts/language.hpp"

namespace {

using lab::Index;

/// Operations of the training so far: those of the forward pass, counted as ModelSize::flop_per_token does, three times.
/// V2 has as many heads as the Transformer, and each of them scores its keys twice.
double flop_of(const std::string& name, const lab::Model& model, const lab::LanguageSize& size, double tokens,
               Index length) {
  const double context = 0.5 * static_cast<double>(length + 1);
  const double of_key = (name == "v2" ? 6.0 : 4.0) * static_cast<double>(size.layers * size.width);
  const double of_token = 2.0 * static_cast<double>(model.parameters()) + of_key * context;
  return 3.0 * of_token * tokens;
}

}  // namespace

int main(int argc, char** argv) {
  lab::LanguageOptions options;
  options.models = {"transformer", "differential", "v2"};
  const auto experiment = [&] {
    options.shrink();
    const lab::Text text(options.text, options.length);
    const lab::TaskBatch batch = held_out(text, options.length, options.validation_windows);
    const auto measure = [&](const lab::Run& run, const lab::LanguageSize& size, lab::Model& model,
                             const lab::Progress& progress, lab::MeasurementFile& file, diffattn::ThreadPool& pool) {
      if (progress.step == 0) return;
      lab::Fields fields = fields_of(progress);
      fields.emplace_back("flop", lab::text_of(flop_of(run.model, model, size, progress.tokens, options.length)));
      const double loss = diffattn::cross_entropy(model.logits(batch, pool), batch.targets).mean;
      file.measure(run, model.parameters(), "validation_loss", loss, fields);
      if (!progress.last()) return;
      file.measure(run, model.parameters(), "largest_gradient_norm", progress.largest_gradient_norm);
      file.measure(run, model.parameters(), "largest_rise", progress.largest_rise);
    };
    for_each_language_run(options, "scaling", lab::kLanguageSizes, text, measure);
  };
  return lab::run_program(
      "Question 4 of the lab: how loss scales with parameters, bytes, FLOP and seconds.", argc, argv,
      [&](CLI::App& app) { options.declare(app); }, experiment);
}
