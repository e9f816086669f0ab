// Ours beside transformers_diffllama.py, which makes the checkpoints: tokens/s of prefill and decode, one thread, fastest
// of three rounds in turns, and how many of the greedy tokens are those that transformers wrote.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "diffattn/hugging_face/diffllama.hpp"

namespace {

using namespace diffattn;

std::vector<Index> read_tokens(const std::filesystem::path& path) {
  std::ifstream in(path);
  return {std::istream_iterator<Index>(in), {}};
}

/// A model, the tokens of transformers in the same element type, and what it took.
struct Runner {
  const char* name;
  DiffLlama<float> model;
  std::vector<Index> expected;
  double prefill = 1e30, decode = 1e30;
  std::vector<Index> tokens{};

  void run(const std::vector<Index>& prompt, std::size_t decoded) {
    auto cache = model.make_cache();
    Matrix<float> logits(1, model.config().vocab_size);
    Workspace workspace;
    tokens.clear();
    std::vector<Index> next = prompt;
    for (std::size_t i = 0; i <= decoded; ++i) {
      const auto start = std::chrono::steady_clock::now();
      const Index chunk = static_cast<Index>(next.size());
      model.decoder().last_logits_into(logits, next, cache, CausalMask{}, chunk, workspace);
      double& fastest = i == 0 ? prefill : decode;
      fastest = std::min(fastest, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
      Index best = 0;
      logits.row(0).maxCoeff(&best);
      tokens.push_back(best);
      next = {best};
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: diffllama FOLDER, which transformers_diffllama.py has made\n");
    return 2;
  }
  const std::filesystem::path folder = argv[1];
  const std::vector<Index> prompt = read_tokens(folder / "prompt.txt");
  const auto bfloat16 = read_tokens(folder / "tokens_bfloat16.txt");
  Runner runners[] = {
      {"float32", DiffLlama<float>::load(folder / "float32"), read_tokens(folder / "tokens_float32.txt")},
      {"bfloat16, multiplied in float", DiffLlama<float>::load(folder / "bfloat16"), bfloat16},
      {"bfloat16", DiffLlama<float>::load(folder / "bfloat16", {.arithmetic = Arithmetic::bfloat16}), bfloat16}};
  for (int round = 0; round < 3; ++round) {
    for (Runner& runner : runners) runner.run(prompt, 12);
  }
  for (const Runner& runner : runners) {
    const auto differ =
        std::mismatch(runner.tokens.begin(), runner.tokens.end(), runner.expected.begin(), runner.expected.end());
    std::printf(
        "%s: prefill of %zu %.1f tokens/s, decode %.2f tokens/s; the first %td of %zu tokens are transformers'\n",
        runner.name, prompt.size(), static_cast<double>(prompt.size()) / runner.prefill, 1 / runner.decode,
        differ.first - runner.tokens.begin(), runner.expected.size());
  }
}
