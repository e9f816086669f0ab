// The cache of keys and values, by hand: a prompt in chunks, two continuations that share it, and a step back.

#include <diffattn/hugging_face/diffllama.hpp>

#include <cmath>
#include <iostream>
#include <span>
#include <string>
#include <vector>

namespace {

using diffattn::Index;
using diffattn::Matrix;

std::vector<Index> encode(const std::string& text) {  // a token of this model is a byte
  std::vector<Index> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

std::string decode(const std::vector<Index>& tokens) {
  std::string text;
  for (const Index token : tokens) text += static_cast<char>(token);
  return text;
}

}  // namespace

int main() {
  const auto model = diffattn::DiffLlama<float>::load(DIFFATTN_EXAMPLE_DATA "/diffllama-bytes");
  const std::vector<Index> prompt = encode("And the children of Israel went up out of the land of Egypt, ");
  const Matrix<float> whole = model.logits(prompt);

  // A prompt in chunks: scratch is bounded by the chunk, and the numbers are those of the whole prompt.
  auto cache = model.make_cache({.max_tokens = 256});
  constexpr std::size_t kChunk = 16;
  Matrix<float> logits;
  for (std::size_t at = 0; at < prompt.size(); at += kChunk) {
    logits = model.logits(std::span(prompt).subspan(at, std::min(kChunk, prompt.size() - at)), cache);
  }
  const float difference = (logits.bottomRows(1) - whole.bottomRows(1)).cwiseAbs().maxCoeff();
  std::cout << prompt.size() << " tokens in chunks of " << kChunk << ", cache of " << cache.memory_bytes() / 1024
            << " KB; last logits differ by " << difference << " from those of the whole prompt\n\n";

  // Two continuations of one prompt. A fork shares what is there; neither sees what the other adds.
  auto other = cache.fork();
  std::cout << "…and " << decode(model.generate(encode("and "), {.max_new_tokens = 40}, cache)) << "\n…for "
            << decode(model.generate(encode("for "), {.max_new_tokens = 40}, other)) << "\n\n";

  // A step back: the same continuation again, from a cache that was cut to the prompt.
  const auto prompt_size = static_cast<Index>(prompt.size());
  other.truncate(prompt_size);
  std::cout << "…and " << decode(model.generate(encode("and "), {.max_new_tokens = 40}, other)) << "\n\n";

  // 16 bits are enough for keys and values: half the memory, the same text or nearly.
  auto narrow = model.make_cache<Eigen::bfloat16>();
  model.logits(prompt, narrow);
  cache.truncate(prompt_size);
  std::cout << "…and " << decode(model.generate(encode("and "), {.max_new_tokens = 40}, narrow)) << " (bfloat16, "
            << narrow.memory_bytes() / 1024 << " KB)\n";

  // What does not fit is refused before anything happens.
  try {
    model.logits(std::vector<Index>(250, 32), cache);
    return 1;
  } catch (const std::invalid_argument& error) {
    std::cout << error.what() << '\n';
  }
  return cache.position() == prompt_size && difference < 1e-3f ? 0 : 1;
}
