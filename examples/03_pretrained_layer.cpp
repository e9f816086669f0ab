// What you learn here: how to load a layer that was trained in PyTorch (official layout, safetensors) and how close its
// output comes to the official one. Each file in examples/data holds the weights of one layer together with an input x
// and the output y, recorded in float64, that the official implementation's arithmetic gives for it.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <diffattn/diffattn.hpp>
#include <diffattn/io/safetensors.hpp>
#include <exception>
#include <string>
#include <vector>

#include "support/recorded_layer.hpp"

using diffattn::Index;

namespace {

/// Runs the layer in the given precision and reports the error relative to the largest recorded output value.
template <typename Scalar>
bool compare(const diffattn::Safetensors& file, const char* precision, double limit) {
  diffattn::MultiheadDiffAttention<Scalar> layer(example::recorded_config(file));
  diffattn::load_parameters(layer, file, "weight.");  // names every missing or surplus tensor if they do not fit

  const diffattn::Matrix<Scalar> x = file.matrix<Scalar>("x");
  const diffattn::Matrix<double> ours = layer.forward(x).template cast<double>();
  const diffattn::Matrix<double> theirs = file.matrix<double>("y");
  const double error = (ours - theirs).cwiseAbs().maxCoeff(), largest = theirs.cwiseAbs().maxCoeff();

  std::printf("\n  %s lambda = %.6f, x %ld x %ld -> y %ld x %ld\n", precision, double(layer.lambda_value()), x.rows(),
              x.cols(), ours.rows(), ours.cols());
  const Index last = ours.rows() - 1;
  for (const auto& [whose, y] : {std::pair{"ours    ", &ours}, std::pair{"official", &theirs}}) {
    std::printf("    last token, %s ", whose);
    for (Index column = 0; column < 4; ++column) std::printf(" %+.15f", (*y)(last, column));
    std::printf(" ...\n");
  }
  const bool good = error <= limit * largest;
  std::printf("    largest error over all %ld values: %.1e, relative to the largest value %.1e (limit %.0e): %s\n",
              ours.size(), error, error / largest, limit, good ? "good" : "TOO LARGE");
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> paths(argv + 1, argv + argc);
  if (paths.empty()) {
    for (const char* layer : {"0", "1"}) {
      paths.push_back(std::string(DIFFATTN_EXAMPLE_DATA "/trained_recall_layer_") + layer + ".safetensors");
    }
  }
  try {
    bool good = true;
    for (const std::string& path : paths) {
      const diffattn::Safetensors file(path);
      std::printf("%s\n", path.substr(path.find_last_of('/') + 1).c_str());
      const auto config = example::recorded_config(file);
      std::printf("  %ld wide, %ld differential heads, %ld key/value heads, layer %ld, lambda_init = %.4f\n",
                  config.embed_dim, config.num_heads, config.num_kv_heads, config.depth,
                  diffattn::lambda_init(double(config.depth)));
      good = compare<float>(file, "float: ", 1e-5) && good;
      good = compare<double>(file, "double:", 1e-12) && good;
      std::printf("\n");
    }
    return good ? EXIT_SUCCESS : EXIT_FAILURE;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return EXIT_FAILURE;
  }
}
