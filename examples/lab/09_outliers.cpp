// Question 9: the largest scores and activations of the largest language models of question 4, and what is left of them
// when scores are rounded to few bits.

#include <functional>

#include "parts/language.hpp"

namespace {

using lab::Index;

/// The sequences of a batch, one by one.
std::vector<std::vector<Index>> sequences_of(const lab::TaskBatch& batch) {
  std::vector<std::vector<Index>> all;
  auto at = batch.inputs.begin();
  for (const Index length : batch.lengths) {
    all.emplace_back(at, at + length);
    at += length;
  }
  return all;
}

/// The ranks of the paper's table 5: the largest, …, the hundredth, and the median.
void measure_ranks(const lab::Run& run, const lab::Model& model, const char* name, std::vector<float> values,
                   lab::MeasurementFile& file) {
  const auto write = [&](const std::string& rank, std::size_t place) {
    if (place >= values.size()) return;
    const auto nth = values.begin() + static_cast<std::ptrdiff_t>(place);
    std::nth_element(values.begin(), nth, values.end(), std::greater<>());
    file.measure(run, model.parameters(), name, static_cast<double>(*nth), {{"rank", rank}});
  };
  for (const std::size_t rank : {1, 2, 3, 10, 100}) write(std::to_string(rank), rank - 1);
  write("median", values.size() / 2);
}

}  // namespace

int main(int argc, char** argv) {
  lab::LanguageOptions options;
  options.validation_windows = 32;
  const auto experiment = [&] {
    options.shrink();
    const lab::Text text(options.text, options.length);
    const lab::TaskBatch batch = held_out(text, options.length, options.validation_windows);
    const std::vector<std::vector<Index>> sequences = sequences_of(batch);
    const auto measure = [&](const lab::Run& run, const lab::LanguageSize& /*size*/, lab::Model& model,
                             const lab::Progress& progress, lab::MeasurementFile& file, diffattn::ThreadPool&) {
      if (!progress.last()) return;
      for (const int bits : {0, 8, 6, 4}) {
        lab::InnerValues seen;
        double loss = 0, right = 0;
        Index row = 0;
        for (const std::vector<Index>& tokens : sequences) {
          const lab::Matrix<float> logits = model.rounded(tokens, bits, bits == 0 ? &seen : nullptr);
          const std::vector<Index> targets(batch.targets.begin() + row, batch.targets.begin() + row + logits.rows());
          for (const double one : lab::losses_of(logits, targets)) loss += one;
          for (Index i = 0; i < logits.rows(); ++i) {
            Index said = 0;
            logits.row(i).maxCoeff(&said);
            right += said == targets[static_cast<std::size_t>(i)] ? 1 : 0;
          }
          row += logits.rows();
        }
        const auto rows = static_cast<double>(row);
        const lab::Fields fields = {{"bits", std::to_string(bits)}};
        file.measure(run, model.parameters(), "rounded_loss", loss / rows, fields);
        file.measure(run, model.parameters(), "rounded_accuracy", right / rows, fields);
        if (bits != 0) continue;
        file.measure(run, model.parameters(), "validation_loss", loss / rows);
        measure_ranks(run, model, "score", std::move(seen.scores), file);
        measure_ranks(run, model, "hidden", std::move(seen.hidden), file);
      }
    };
    for_each_language_run(options, "outliers", {lab::kLanguageSizes.back()}, text, measure);
  };
  return lab::run_program(
      "Question 9 of the lab: outliers, and scores rounded to 8, 6 and 4 bits.", argc, argv,
      [&](CLI::App& app) { options.declare(app); }, experiment);
}
