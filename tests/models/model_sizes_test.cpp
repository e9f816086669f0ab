#include <diffattn/models/model_sizes.hpp>

#include "support/catch.hpp"

using diffattn::Index;
using diffattn::ModelSize;

TEST_CASE("The paper's models have the sizes that they are called by", "[models][model_sizes]") {
  const double billions[] = {0.83, 1.4, 2.8, 6.8, 13.1, 3.5};  // the 3B counts neither embedding nor head
  int i = 0;
  for (const ModelSize& size : diffattn::kPaperModels) {
    INFO(size.name);
    CHECK(std::abs(static_cast<double>(size.parameters()) / 1e9 / billions[i++] - 1) < 0.011);
    CHECK(size.embed_dim == 2 * size.num_heads * size.head_dim());
    CHECK(std::abs(static_cast<double>(size.hidden_dim) - 8.0 / 3 * static_cast<double>(size.embed_dim)) <= 0.5);
  }
}

TEST_CASE("What is counted from sizes is what a model has", "[models][model_sizes]") {
  const ModelSize size{"small", 24, 3, 2, 64, 101};
  const diffattn::Decoder<float, diffattn::MultiheadDiffAttention<float>> model(
      diffattn::differential_config<float>(size));
  CHECK(size.parameters() == parameter_count(model));
  const diffattn::Decoder<float, diffattn::MultiheadAttention<float>> baseline(diffattn::standard_config<float>(size));
  CHECK(size.parameters() - parameter_count(baseline) == 3 * 6 * size.head_dim());
  Index matrices = 0;
  visit_parameters(model, [&](std::string_view, const auto& parameter) {
    if (parameter.cols() > 1) matrices += parameter.size();
  });
  CHECK(size.matrix_parameters() == matrices);
  CHECK(size.flop_per_token(10) == 2.0 * static_cast<double>(matrices) + 3 * 4 * 24 * 10);
  CHECK(size.cache_bytes_per_token(2) == 3 * 2 * 24 * 2);
}
