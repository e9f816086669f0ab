// What the models of the paper cost, from their sizes alone: parameters, work a token, and the cache of keys and
// values.

#include <diffattn/models/model_sizes.hpp>

#include <iomanip>
#include <iostream>

int main() {
  constexpr diffattn::Index kContext = 4096;
  std::cout << "The Differential Transformers of the paper; their Transformers differ by less than 0.01 %.\n\n"
            << " model  width  layers  heads  parameters  GFLOP a token  cache at " << kContext
            << " tokens\n                                               at " << kContext
            << "        float     bfloat16\n"
            << std::fixed;
  for (const diffattn::ModelSize& size : diffattn::kPaperModels) {
    const auto gigabytes = [&](diffattn::Index value_bytes) {
      return static_cast<double>(kContext * size.cache_bytes_per_token(value_bytes)) / 1e9;
    };
    std::cout << std::setw(6) << size.name << std::setw(7) << size.embed_dim << std::setw(8) << size.num_layers
              << std::setw(7) << size.num_heads << std::setw(10) << std::setprecision(3)
              << static_cast<double>(size.parameters()) / 1e9 << " B" << std::setw(13) << std::setprecision(1)
              << size.flop_per_token(kContext) / 1e9 << std::setw(11) << std::setprecision(2) << gigabytes(4) << " GB"
              << std::setw(10) << gigabytes(2) << " GB\n";
  }
}
