// Prints the bits of what a layer, the training of a model and its text come to.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "one_file.hpp"

namespace {

using Model = diffattn::Decoder<float, diffattn::MultiheadDiffAttention<float>>;

/// A number that another bit anywhere in the matrix changes.
unsigned long long bits_of(const diffattn::Matrix<float>& matrix) {
  unsigned long long sum = 14695981039346656037u;
  for (diffattn::Index i = 0; i < matrix.size(); ++i) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, matrix.data() + i, sizeof bits);
    sum = (sum ^ bits) * 1099511628211u;
  }
  return sum;
}

}  // namespace

int main() {
  diffattn::Matrix<float> x(40, 32);
  for (diffattn::Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>((i * 37) % 101) / 50.0f - 1.0f;
  std::printf("operator:  %016llx\n", bits_of(diffattn::diff_attention(x, x, x, x, x, 0.5f, diffattn::CausalMask{})));
  std::printf("layer:     %016llx\n", bits_of(layer_output(x)));

  Model model({.vocab_size = 8, .num_layers = 2, .hidden_dim = 32, .attention = {.embed_dim = 16, .num_heads = 1}});
  diffattn::AdamW<float> optimizer(model, {.learning_rate = 0.02});
  const std::vector<diffattn::Index> tokens = {0, 1, 2, 3, 4, 5, 6, 7}, targets = {1, 2, 3, 4, 5, 6, 7, 0};
  diffattn::Workspace workspace;
  Model::Tape tape;
  for (int step = 0; step < 20; ++step) {
    diffattn::Matrix<float> logits = model.logits(tokens, {8}, tape);
    auto gradient = zeros_like(model);
    cross_entropy_into(logits, logits, targets, diffattn::kIgnoreTarget, workspace);
    model.backward(logits, tape, gradient);
    optimizer.step(model, gradient);
  }
  std::printf("logits:    %016llx\n", bits_of(model.logits(tokens)));
  std::printf("generated:");
  for (const diffattn::Index token : generate(model, {0, 1, 2}, {.max_new_tokens = 6})) {
    std::printf(" %lld", static_cast<long long>(token));
  }
  std::printf("\n");
}
