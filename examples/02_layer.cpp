// What you learn here: the multi-head differential attention layer. How to configure it (grouped queries, rotary
// position embedding), what its parameters are called, and how several sequences go through one call.

#include <cstdio>
#include <cstdlib>
#include <diffattn/diffattn.hpp>
#include <string>

using diffattn::Index;

int main() {
  // num_heads counts differential heads: 4 of them stand for 8 standard ones. Every 2 share keys and values.
  const diffattn::MultiheadDiffAttention<float> layer({.embed_dim = 256,
                                                       .num_heads = 4,
                                                       .num_kv_heads = 2,
                                                       .depth = 3,
                                                       .rotary = diffattn::RotaryConfig{.base = 10000},
                                                       .seed = 42});

  std::printf("A freshly initialised differential attention layer, lambda = %.4f (its depth says %.4f)\n\n",
              double(layer.lambda_value()), diffattn::lambda_init(3));
  std::printf("  parameter            shape\n");
  diffattn::visit_parameters(layer, [](std::string_view name, const auto& parameter) {
    std::printf("  %-18s %4ld x %ld\n", std::string(name).c_str(), parameter.rows(), parameter.cols());
  });

  // The baseline of the same width: twice the heads, each with one softmax.
  const diffattn::MultiheadAttention<float> standard(
      {.embed_dim = 256, .num_heads = 8, .num_kv_heads = 4, .rotary = diffattn::RotaryConfig{}});
  const Index differential_count = diffattn::parameter_count(layer), standard_count = parameter_count(standard);
  std::printf("\nParameters: %ld; standard attention with 8 heads: %ld. The %ld more are lambda and the head norm.\n",
              differential_count, standard_count, differential_count - standard_count);

  // One token per row. The mask is causal unless you say otherwise.
  std::srand(7);  // Eigen's Random() draws from rand()
  const diffattn::Matrix<float> x = diffattn::Matrix<float>::Random(30, 256);
  const auto y = layer.forward(x);
  std::printf("\nforward: %ld x %ld -> %ld x %ld\n", x.rows(), x.cols(), y.rows(), y.cols());

  // Three sequences of 12, 1 and 17 tokens stacked in the rows: none sees another.
  const Index lengths[] = {12, 1, 17};
  const auto stacked = layer.forward(x, diffattn::CausalMask{}, lengths);
  double largest = 0;
  for (Index first = 0, i = 0; i < 3; first += lengths[i++]) {
    const auto alone = layer.forward(x.middleRows(first, lengths[i]));
    largest = std::max(largest, double((stacked.middleRows(first, lengths[i]) - alone).cwiseAbs().maxCoeff()));
  }
  std::printf("three sequences in one call against one by one, largest difference: %.1e\n", largest);

  // Causal: what comes later does not change what came before.
  auto changed = x;
  changed.bottomRows(10).setRandom();
  const double leak = (layer.forward(changed).topRows(20) - y.topRows(20)).cwiseAbs().maxCoeff();
  std::printf("first 20 outputs after the last 10 tokens changed, largest difference: %.1e\n", leak);

  // A loop that runs often keeps its scratch memory and its output.
  diffattn::Workspace workspace;
  diffattn::Matrix<float> into(x.rows(), 256);
  layer.forward_into(into, x, diffattn::CausalMask{}, workspace);
  const std::size_t held = workspace.capacity();
  layer.forward_into(into, x, diffattn::CausalMask{}, workspace);
  const bool same = into == y && workspace.capacity() == held;
  std::printf("forward_into with a workspace: the same bits, %zu KiB of scratch, none added by the second call: %s\n",
              held / 1024, same ? "yes" : "NO");
  return largest <= 1e-6 && leak <= 1e-6 && same ? EXIT_SUCCESS : EXIT_FAILURE;
}
