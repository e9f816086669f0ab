// Question 7: loss by position, of the largest language models of question 4, at four times the length that they were
// trained at.

#include "parts/language.hpp"

namespace {

using lab::Index;

/// Where a bucket of positions ends, in lengths of training.
constexpr double kEnds[] = {0.0625, 0.125, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4};

}  // namespace

int main(int argc, char** argv) {
  lab::LanguageOptions options;
  const auto experiment = [&] {
    options.shrink();
    const Index length = 4 * options.length;
    const lab::Text text(options.text, length);
    const lab::TaskBatch batch = held_out(text, length, options.validation_windows);
    const auto measure = [&](const lab::Run& run, const lab::LanguageSize& /*size*/, lab::Model& model,
                             const lab::Progress& progress, lab::MeasurementFile& file, diffattn::ThreadPool& pool) {
      if (!progress.last()) return;
      const std::vector<double> losses = lab::losses_of(model.logits(batch, pool), batch.targets);
      double all = 0;
      Index begin = 0;
      for (const double part : kEnds) {
        const auto end = static_cast<Index>(std::lround(part * static_cast<double>(options.length)));
        if (end == begin) continue;  // so short that buckets fall together
        double sum = 0;
        for (Index window = 0; window < options.validation_windows; ++window) {
          for (Index i = begin; i < end; ++i) sum += losses[static_cast<std::size_t>(window * length + i)];
        }
        all += sum;
        file.measure(run, model.parameters(), "loss",
                     sum / static_cast<double>((end - begin) * options.validation_windows),
                     {{"position", std::to_string(end)}});
        begin = end;
        if (end == options.length) {
          file.measure(run, model.parameters(), "validation_loss",
                       all / static_cast<double>(end * options.validation_windows));
        }
      }
    };
    for_each_language_run(options, "long_context", {lab::kLanguageSizes.back()}, text, measure);
  };
  return lab::run_program(
      "Question 7 of the lab: loss by position, up to four times the length of training.", argc, argv,
      [&](CLI::App& app) { options.declare(app); }, experiment);
}
