// What you learn here: what every head of every layer of a trained model looks at. The model is the byte-level one that
// comes with the examples; a table says how many keys a head attends to, how much of that is the difference of its two
// maps, and how much goes to the last bytes, to the first one and to spaces. Writes a picture of the sharpest head.
//
//   example_13_model_maps [directory [text]]

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <diffattn/analysis/model_maps.hpp>
#include <diffattn/analysis/statistics.hpp>
#include <diffattn/hugging_face/diffllama.hpp>
#include <exception>
#include <numeric>
#include <string>
#include <vector>

#include "support/attention_picture.hpp"

using namespace diffattn;

namespace {

/// The share that a map gives to the `count` keys up to and including the query's own, a mean over all queries.
double share_of_last(const Matrix<float>& map, Index first_query, Index count) {
  double share = 0;
  for (Index row = 0; row < map.rows(); ++row) {
    const Index query = first_query + row, first = std::max<Index>(query - count + 1, 0);
    std::vector<Index> keys(static_cast<std::size_t>(query - first + 1));
    std::iota(keys.begin(), keys.end(), first);
    share += static_cast<double>(attention_share(map, {row}, keys));
  }
  return share / static_cast<double>(map.rows());
}

bool run(const std::string& directory, const std::string& text) {
  const auto model = DiffLlama<float>::load(directory);
  std::vector<Index> tokens, spaces;
  for (const char c : text) {
    if (c == ' ') spaces.push_back(static_cast<Index>(tokens.size()));
    tokens.push_back(static_cast<unsigned char>(c));
  }
  const auto n = static_cast<Index>(tokens.size());
  const MapRows rows{n / 2, n - n / 2};  // queries that have something to look back at
  const ModelMaps<float> maps = attention_maps(model, tokens, CausalMask{}, rows);
  std::vector<Index> all_rows(static_cast<std::size_t>(rows.count));
  std::iota(all_rows.begin(), all_rows.end(), Index{0});

  std::printf("%ld bytes; means over the last %ld of them as queries\n\n", n, rows.count);
  std::printf("%5s%6s%8s |%9s%9s%12s |%10s%10s%10s%10s\n", "layer", "head", "lambda", "keys P1", "keys P2",
              "keys P1-lP2", "negative", "last 4", "first", "spaces");
  std::size_t sharpest_layer = 0, sharpest_head = 0;
  float fewest = static_cast<float>(n);
  float worst_sum = 0;
  for (std::size_t layer = 0; layer < maps.size(); ++layer) {
    for (std::size_t h = 0; h < maps[layer].size(); ++h) {
      const AttentionMaps<float>& head = maps[layer][h];
      const float keys = effective_support(head.combined).mean(), lambda = head.lambda(0);
      std::printf("%5zu%6zu%8.2f |%9.1f%9.1f%12.1f |%10.3f%+10.3f%+10.3f%+10.3f\n", layer, h,
                  static_cast<double>(lambda), static_cast<double>(effective_support(head.p1).mean()),
                  static_cast<double>(effective_support(head.p2).mean()), static_cast<double>(keys),
                  static_cast<double>(negative_mass(head.combined).mean()), share_of_last(head.combined, rows.first, 4),
                  static_cast<double>(attention_share(head.combined, all_rows, {0})),
                  static_cast<double>(attention_share(head.combined, all_rows, spaces)));
      worst_sum = std::max(worst_sum, (head.combined.rowwise().sum().array() - (1 - lambda)).abs().maxCoeff());
      if (keys < fewest) {
        fewest = keys;
        sharpest_layer = layer;
        sharpest_head = h;
      }
    }
  }
  std::printf(
      "\nkeys: exp of the entropy of |weights| / their sum. Shares are parts of 1 - lambda, which rows sum to.\n");

  // The picture shows all rows.
  const AttentionMaps<float> head = attention_maps(model, tokens)[sharpest_layer][sharpest_head];
  using example::Palette;
  const std::string path =
      example::save_picture("model_maps.png",
                            example::picture_title(static_cast<long>(sharpest_layer), static_cast<long>(sharpest_head),
                                                   static_cast<double>(head.lambda(0))),
                            {{"P1", head.p1.cast<double>(), Palette::red},
                             {"P2", head.p2.cast<double>(), Palette::blue},
                             {"P1 - lambda P2", head.combined.cast<double>(), Palette::diverging}});
  std::printf("Layer %zu, head %zu looks at the fewest: %s\n", sharpest_layer, sharpest_head, path.c_str());
  const bool same_rows = head.combined.bottomRows(rows.count) == maps[sharpest_layer][sharpest_head].combined;
  return same_rows && worst_sum < 1e-4f && fewest >= 1 && fewest < static_cast<float>(n) / 4;
}

}  // namespace

int main(int argc, char** argv) try {
  const std::string directory = argc > 1 ? argv[1] : DIFFATTN_EXAMPLE_DATA "/diffllama-bytes";
  const std::string text = argc > 2 ? argv[2]
                                    : "In the beginning God created the heaven and the earth. And the earth was "
                                      "without form, and void; and darkness was upon the face of the deep.";
  return run(directory, text) ? EXIT_SUCCESS : EXIT_FAILURE;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return EXIT_FAILURE;
}
