// Question 2 on text: how the attention of the largest language models of question 4 is spread, before training and
// behind it, and how much of it the first byte, the byte itself and its neighbours get. A differential map has signs:
// shares are those of |A| / Σ|A|.

#include <diffattn/analysis/statistics.hpp>
#include <map>

#include "parts/language.hpp"

namespace {

using lab::Index;
using lab::Matrix;

constexpr Index kWindows = 8;     // of held-out text
constexpr Index kNeighbours = 4;  // bytes before the one that asks
constexpr Index kFirstRow = 32;   // rows before it have few keys to choose from

/// Sums over heads and rows.
struct Sums {
  double first = 0, self = 0, neighbours = 0, entropy = 0, support = 0, count = 0;

  void add(const Matrix<float>& map) {
    if (map.rows() <= kFirstRow) return;
    const Matrix<float> rows = map.bottomRows(map.rows() - kFirstRow).cwiseAbs();
    const auto entropies = diffattn::row_entropy(rows);
    const auto supports = diffattn::effective_support(rows);
    for (Index row = 0; row < rows.rows(); ++row) {
      const Index self_key = kFirstRow + row;
      const auto whole = static_cast<double>(rows.row(row).sum());
      first += static_cast<double>(rows(row, 0)) / whole;
      self += static_cast<double>(rows(row, self_key)) / whole;
      neighbours += static_cast<double>(rows.row(row).segment(self_key - kNeighbours, kNeighbours).sum()) / whole;
      entropy += static_cast<double>(entropies(row));
      support += static_cast<double>(supports(row));
      count += 1;
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  lab::LanguageOptions options;
  const auto experiment = [&] {
    options.shrink();
    const Index length = options.smoke ? 2 * kFirstRow : options.length;
    const lab::Text text(options.text, length);
    const lab::TaskBatch windows = held_out(text, length, kWindows);
    const lab::TaskBatch validation = held_out(text, options.length, options.validation_windows);
    const auto measure = [&](const lab::Run& run, const lab::LanguageSize& size, lab::Model& model,
                             const lab::Progress& progress, lab::MeasurementFile& file, diffattn::ThreadPool& pool) {
      if (progress.step != 0 && !progress.last()) return;
      std::vector<std::map<std::string, Sums>> layers(static_cast<std::size_t>(size.layers));
      for (auto begin = windows.inputs.begin(); begin != windows.inputs.end(); begin += length) {
        const auto maps = model.maps({begin, begin + length});
        for (std::size_t layer = 0; layer < layers.size(); ++layer) {
          for (const auto& head : maps[layer]) {
            layers[layer]["p1"].add(head.p1);
            layers[layer]["p2"].add(head.p2);
            layers[layer]["combined"].add(head.combined);
          }
        }
      }
      for (std::size_t layer = 0; layer < layers.size(); ++layer) {
        for (const auto& [map, sums] : layers[layer]) {
          if (sums.count == 0) continue;
          lab::Fields fields = fields_of(progress);
          fields.emplace_back("layer", std::to_string(layer));
          fields.emplace_back("map", map);
          file.measure(run, model.parameters(), "share_of_first", sums.first / sums.count, fields);
          file.measure(run, model.parameters(), "share_of_self", sums.self / sums.count, fields);
          file.measure(run, model.parameters(), "share_of_neighbours", sums.neighbours / sums.count, fields);
          file.measure(run, model.parameters(), "entropy", sums.entropy / sums.count, fields);
          file.measure(run, model.parameters(), "effective_support", sums.support / sums.count, fields);
        }
      }
      if (!progress.last()) return;
      const double loss = diffattn::cross_entropy(model.logits(validation, pool), validation.targets).mean;
      file.measure(run, model.parameters(), "validation_loss", loss, fields_of(progress));
    };
    for_each_language_run(options, "attention_on_text", {lab::kLanguageSizes.back()}, text, measure);
  };
  return lab::run_program(
      "Question 2 of the lab, on text: where the attention of language models goes.", argc, argv,
      [&](CLI::App& app) { options.declare(app); }, experiment);
}
