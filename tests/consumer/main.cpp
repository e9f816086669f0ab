// What comes with Eigen alone: the operator, and a whole model that learns and writes.

#include <diffattn/diffattn.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/models/generate.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/cross_entropy.hpp>

#include <vector>

namespace {

bool operator_works() {
  const diffattn::Matrix<float> x = diffattn::Matrix<float>::Ones(3, 4);
  const diffattn::Matrix<float> y = diffattn::diff_attention(x, x, x, x, x, 0.25f, diffattn::CausalMask{});
  return (y.array() - 0.75f).abs().maxCoeff() < 1e-5f;  // constant values come out as (1 - lambda) times them
}

/// Learns that 1 follows 0, 2 follows 1, and so on round.
bool model_learns() {
  using Attention = diffattn::MultiheadDiffAttention<float>;
  diffattn::Decoder<float, Attention> model(
      {.vocab_size = 4, .num_layers = 1, .hidden_dim = 8, .attention = {.embed_dim = 8, .num_heads = 1}});
  diffattn::AdamW<float> optimizer(model, {.learning_rate = 0.02});
  const std::vector<diffattn::Index> tokens = {0, 1, 2, 3, 0, 1}, targets = {1, 2, 3, 0, 1, 2};
  diffattn::Workspace workspace;
  diffattn::Decoder<float, Attention>::Tape tape;
  for (int step = 0; step < 100; ++step) {
    diffattn::Matrix<float> logits = model.logits(tokens, {6}, tape);
    auto gradient = zeros_like(model);
    cross_entropy_into(logits, logits, targets, diffattn::kIgnoreTarget, workspace);
    model.backward(logits, tape, gradient);
    optimizer.step(model, gradient);
  }
  return generate(model, {0, 1, 2}, {.max_new_tokens = 3}) == std::vector<diffattn::Index>{3, 0, 1};
}

}  // namespace

int main() { return operator_works() && model_learns() ? 0 : 1; }
