// What you learn here: what the two attention maps of a trained layer look like, what their difference makes of them,
// and what that costs beside standard attention. The layer was trained to recall the value planted behind a key among
// noise: some rows ask, and for each of them one column holds the answer. Writes a picture for each head.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <diffattn/analysis/attention_maps.hpp>
#include <diffattn/analysis/statistics.hpp>
#include <diffattn/diffattn.hpp>
#include <diffattn/io/safetensors.hpp>
#include <exception>
#include <string>
#include <vector>

#include "support/alternating_runs.hpp"
#include "support/attention_picture.hpp"
#include "support/recorded_layer.hpp"

using namespace diffattn;
using example::Palette;
using Map = Matrix<double>;

namespace {

/// A layer of the size that was recorded beside a standard one with as many parameters, twice as many heads.
void print_times(const MultiheadDiffAttentionConfig& config, Index tokens) {
  const MultiheadDiffAttention<float> differential(config);
  const MultiheadAttention<float> standard({.embed_dim = config.embed_dim,
                                            .num_heads = 2 * config.num_heads,
                                            .num_kv_heads = 2 * config.num_kv_heads,
                                            .rotary = config.rotary});
  const Matrix<float> x = Matrix<float>::Random(tokens, config.embed_dim);
  Workspace workspace;
  Matrix<float> y(tokens, config.embed_dim);
  const example::AlternatingTimes times =
      example::time_alternating_runs([&] { differential.forward_into(y, x, CausalMask{}, workspace); },
                                     [&] { standard.forward_into(y, x, CausalMask{}, workspace); });
  std::printf("  %5ld tokens%16.1f%16.1f%12.2f\n", tokens, times.first, times.second, times.ratio);
}

bool run(const Safetensors& file) {
  MultiheadDiffAttention<double> layer(example::recorded_config(file));
  load_parameters(layer, file, "weight.");
  const Index heads = layer.config().num_heads;
  const double lambda = layer.lambda_value();
  const Map x = file.matrix<double>("x");
  const auto rows = file.vector<Index>("query_rows"), answers = file.vector<Index>("answer_columns");
  const Map official[] = {file.matrix<double>("p1"), file.matrix<double>("p2")};  // recorded, all heads stacked
  const std::vector<AttentionMaps<double>> all_maps = attention_maps(layer, x);
  double error = 0, part = 1.0 / static_cast<double>(rows.size());
  std::string pictures;
  std::printf("%ld tokens; mean attention of the %ld rows that ask, lambda = %.4f\n", x.rows(), rows.size(), lambda);
  for (Index h = 0; h < heads; ++h) {
    const AttentionMaps<double>& head = all_maps[static_cast<std::size_t>(h)];
    const Map maps[] = {head.p1, head.p2, head.combined};
    for (std::size_t m = 0; m < 2; ++m) {
      error = std::max(error, (maps[m] - official[m].middleRows(h * x.rows(), x.rows())).cwiseAbs().maxCoeff());
    }
    std::printf("\n  head %ld           on the answer   on all else   negative   entropy    keys\n", h);
    const std::string name[] = {"P1", "P2", "P1 - " + std::to_string(lambda).substr(0, 4) + " P2"};
    for (std::size_t m = 0; m < 3; ++m) {
      const Map asking = maps[m](rows, Eigen::all);
      double answer = 0, all = asking.rowwise().sum().mean();
      for (Index r = 0; r < rows.size(); ++r) answer += part * attention_share(asking, {r}, {answers[r]});
      std::printf("  %-14s%+16.4f%+14.4f%11.4f%10.2f%8.1f\n", name[m].c_str(), answer, all - answer,
                  negative_mass(asking).mean(), row_entropy(asking).mean(), effective_support(asking).mean());
    }
    pictures += "\n  " + example::save_picture("attention_maps_head_" + std::to_string(h) + ".png",
                                               example::picture_title(layer.config().depth, h, lambda),
                                               {{name[0], maps[0], Palette::red},
                                                {name[1], maps[1], Palette::blue},
                                                {name[2], maps[2], Palette::diverging}});
  }
  std::printf("\nEntropy: nats, of |weights| / their sum; keys: its exp. Rows of the difference sum to 1 - lambda.\n");
  std::printf("Largest difference to the recorded maps: %.1e\n", error);

  std::printf("\nTime of a layer, causal, one thread, float; median of alternating runs, microseconds:\n");
  std::printf("%14s%16s%16s%12s\n", "", "differential", "standard", "ratio");
  for (const Index copies : {1, 8}) print_times(layer.config(), copies * x.rows());
  std::printf("\nPictures of the maps:%s\n", pictures.c_str());
  return error < 1e-12;
}

}  // namespace

int main(int argc, char** argv) try {
  const char* const path = argc > 1 ? argv[1] : DIFFATTN_EXAMPLE_DATA "/trained_recall_layer_0.safetensors";
  return run(Safetensors(path)) ? EXIT_SUCCESS : EXIT_FAILURE;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return EXIT_FAILURE;
}
