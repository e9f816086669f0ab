// Text from a checkpoint of Hugging Face's DiffLlama, token by token.
//
//   example_05_generate [directory [prompt]]
//
// Without a directory it reads the small model that comes with the examples: trained on the King James Bible, a token
// is a byte, so that encoding and decoding are what `Bytes` does. For another model put its tokenizer in the place of
// `Bytes` (SentencePiece, Hugging Face's tokenizers, llama.cpp's): all that is asked of it is encode and decode.

#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/hugging_face/diffllama.hpp>

#include <chrono>
#include <iostream>
#include <string>
#include <vector>

namespace {

using diffattn::Index;

/// The tokenizer of a byte-level model.
struct Bytes {
  static std::vector<Index> encode(const std::string& text) {
    std::vector<Index> tokens;
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    return tokens;
  }
  static std::string decode(Index token) { return {static_cast<char>(token)}; }
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

int main(int argc, char** argv) try {
  const std::string directory = argc > 1 ? argv[1] : DIFFATTN_EXAMPLE_DATA "/diffllama-bytes";
  const std::string prompt = argc > 2 ? argv[2] : "In the beginning God created the heaven and the earth. And ";

  auto start = std::chrono::steady_clock::now();
  const auto model = diffattn::DiffLlama<float>::load(directory);
  const diffattn::DiffLlamaConfig& config = model.config();
  std::cout << directory << ": " << config.num_hidden_layers << " layers, " << config.num_attention_heads / 2
            << " differential heads, " << config.vocab_size << " tokens, loaded in " << seconds_since(start)
            << " s\n\n";

  diffattn::ThreadPool threads;
  const std::vector<Index> tokens = Bytes::encode(prompt);
  for (const double temperature : {0.0, 0.7}) {
    std::cout << (temperature == 0 ? "Greedy: " : "\nDrawn at a temperature of 0.7: ") << prompt << std::flush;
    auto first = start = std::chrono::steady_clock::now();
    diffattn::GenerateOptions options{.max_new_tokens = 160, .temperature = temperature, .top_p = 0.95, .seed = 1};
    options.on_token = [&, seen = false](Index token) mutable {
      if (!seen) first = std::chrono::steady_clock::now();
      seen = true;
      std::cout << Bytes::decode(token) << std::flush;
      return true;  // false would end it here
    };
    auto cache = model.make_cache();
    const std::vector<Index> written = model.generate(tokens, options, cache, threads);
    const double prefill = std::chrono::duration<double>(first - start).count(), decode = seconds_since(first);
    std::cout << "\n  prompt: " << static_cast<double>(tokens.size()) / prefill
              << " tokens/s, text: " << static_cast<double>(written.size() - 1) / decode << " tokens/s\n";
    if (written.size() < 2) return 1;
  }

  // Many prompts at once: every step feeds a token of each, and reads the weights once for all of them.
  const std::vector<std::vector<Index>> prompts = {Bytes::encode("And God said, "), Bytes::encode("The LORD is my "),
                                                   Bytes::encode("Blessed are the "), Bytes::encode("Now ")};
  start = std::chrono::steady_clock::now();
  const auto texts = model.generate(prompts, {.max_new_tokens = 60}, threads);
  std::cout << "\nFour prompts at once:\n";
  std::size_t count = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    for (const auto* tokens_of : {&prompts[i], &texts[i]}) {
      for (const Index token : *tokens_of) std::cout << Bytes::decode(token);
    }
    std::cout << "…\n";
    count += texts[i].size();
  }
  std::cout << "  " << static_cast<double>(count) / seconds_since(start) << " tokens/s\n";
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
