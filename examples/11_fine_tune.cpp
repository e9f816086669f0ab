// What you learn here: how to go on training a checkpoint of Hugging Face's DiffLlama, and write it back as one. The
// small model that comes with the examples knows the King James Bible byte by byte; it learns to say it in today's
// words: "you" for "thee", "to" for "unto". Held-out text is what it is judged by, before and after.
//
// With --text it learns any other text, with --model another model whose tokens are bytes. With seeds fixed, every run
// on one kind of machine gives the same losses.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/hugging_face/diffllama.hpp>
#include <diffattn/hugging_face/diffllama_export.hpp>
#include <diffattn/hugging_face/diffllama_import.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/batch_sampler.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <diffattn/training/gradient_norm.hpp>
#include <diffattn/training/learning_rate.hpp>
#include <diffattn/training/token_file.hpp>
#include <exception>
#include <filesystem>
#include <map>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/printable.hpp"

using diffattn::Index;

namespace {

using Bytes = std::span<const std::uint8_t>;
using Model = diffattn::Decoder<float, diffattn::MultiheadDiffAttention<float>>;

struct Options {
  std::filesystem::path model = DIFFATTN_EXAMPLE_DATA "/diffllama-bytes";
  std::filesystem::path text;
  std::filesystem::path out = "fine-tuned";
  std::string prompt = "And it came to pass, that he said unto them, ";
  Index steps = 120;
  Index batch = 4;
  Index length = 256;
  double learning_rate = 1e-3;
  std::uint64_t seed = 1;
  int threads = 2;

  void declare(CLI::App& app) {
    const auto up_to = [](long most) { return CLI::Range(1L, most); };
    app.add_option("--model", model, "directory of a DiffLlama whose tokens are bytes")->capture_default_str();
    app.add_option("--text", text, "any file; left out, the King James Bible in today's words")
        ->check(CLI::ExistingFile);
    app.add_option("--out", out, "directory for the tuned model")->capture_default_str();
    app.add_option("--prompt", prompt, "what the model goes on from")->capture_default_str();
    app.add_option("--steps", steps, "optimizer steps")->check(up_to(1 << 30))->capture_default_str();
    app.add_option("--batch", batch, "sequences a step")->check(up_to(4096))->capture_default_str();
    app.add_option("--length", length, "bytes a sequence")->check(up_to(1 << 20))->capture_default_str();
    app.add_option("--learning-rate", learning_rate, "its peak")->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--seed", seed, "of batches")->check(CLI::NonNegativeNumber)->capture_default_str();
    app.add_option("--threads", threads, "changes the speed and nothing else")
        ->check(up_to(1024))
        ->capture_default_str();
  }
};

/// The text with its oldest words replaced.
std::vector<std::uint8_t> in_todays_words(Bytes text) {
  const std::map<std::string, std::string> words = {
      {"unto", "to"},     {"thee", "you"},  {"thou", "you"},    {"ye", "you"},    {"thy", "your"},
      {"thine", "your"},  {"hath", "has"},  {"hast", "have"},   {"doth", "does"}, {"saith", "says"},
      {"shalt", "shall"}, {"wilt", "will"}, {"spake", "spoke"}, {"upon", "on"},   {"brethren", "brothers"},
      {"nigh", "near"},   {"lo", "look"}};
  std::vector<std::uint8_t> result;
  for (std::size_t at = 0; at < text.size();) {
    std::string word, lower;
    for (std::size_t i = at; i < text.size() && std::isalpha(text[i]) != 0; ++i) {
      word += static_cast<char>(text[i]);
      lower += static_cast<char>(std::tolower(text[i]));
    }
    at += std::max<std::size_t>(word.size(), 1);
    if (word.empty()) {
      result.push_back(text[at - 1]);
      continue;
    }
    if (const auto found = words.find(lower); found != words.end()) {
      const char first = word[0];
      word = found->second;
      if (std::isupper(static_cast<unsigned char>(first)) != 0) {
        word[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(word[0])));
      }
    }
    result.insert(result.end(), word.begin(), word.end());
  }
  return result;
}

/// Nats a byte over the first windows of a text, 32 at most.
template <typename AnyModel>
double loss_on(const AnyModel& model, Bytes text, Index length, diffattn::ThreadPool& threads) {
  diffattn::BatchSampler<std::uint8_t> windows(text, {.length = length, .seed = 0});
  diffattn::Batch batch;
  diffattn::Workspace workspace;
  diffattn::Matrix<float> logits(length, 256);
  const Index count = std::min<Index>(windows.windows_per_epoch(), 32);
  double sum = 0;
  for (Index i = 0; i < count; ++i) {
    windows.next(batch);
    model.logits_into(logits, batch.inputs, workspace, threads);
    sum += diffattn::cross_entropy(logits, batch.targets).mean;
  }
  return sum / static_cast<double>(count);
}

/// What a trained or loaded model makes of the prompt.
template <typename AnyModel>
void print_sample(const AnyModel& model, const std::string& prompt) {
  std::string text = prompt;
  std::vector<Index> tokens;
  for (const char c : prompt) tokens.push_back(static_cast<unsigned char>(c));
  const diffattn::GenerateOptions options{.max_new_tokens = 160, .temperature = 0.6, .top_p = 0.95, .seed = 3};
  for (const Index token : generate(model, tokens, options)) text += static_cast<char>(token);
  std::printf("  sample: %s\n\n", example::printable(text).c_str());
}

void train(Model& model, Bytes text, const Options& options, diffattn::ThreadPool& threads) {
  diffattn::BatchSampler<std::uint8_t> sampler(
      text, {.length = options.length, .batch_size = options.batch, .seed = options.seed});
  // Lower than for a new model, so that what it knows is not washed away by the first steps.
  const diffattn::LearningRate rate({.peak = options.learning_rate,
                                     .warmup_steps = options.steps / 10,
                                     .total_steps = options.steps,
                                     .final = options.learning_rate / 10});
  diffattn::AdamW<float> optimizer(model, {.beta2 = 0.99, .weight_decay = 0.01});
  Model gradient = zeros_like(model);
  Model::Tape tape;
  diffattn::Workspace workspace;
  diffattn::Batch batch;
  diffattn::Matrix<float> logits(options.batch * options.length, model.config().vocab_size);
  const auto start = std::chrono::steady_clock::now();
  for (Index step = 0; step < options.steps; ++step) {
    sampler.next(batch);
    model.logits_into(logits, batch.inputs, batch.lengths, tape, workspace, threads);
    const double loss =
        cross_entropy_into(logits, logits, batch.targets, diffattn::kIgnoreTarget, workspace, threads).mean;
    set_zero(gradient, threads);
    model.backward(logits, tape, gradient, workspace, threads);
    clip_gradient_norm(gradient, 1.0, threads);
    optimizer.step(model, gradient, rate.at(step), threads);
    if ((step + 1) % 20 != 0 && step + 1 != options.steps) continue;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("  step %4ld of %ld   training %.4f   %5.0f tokens/s   %3.0f s\n", step + 1, options.steps, loss,
                static_cast<double>((step + 1) * options.batch * options.length) / seconds, seconds);
    std::fflush(stdout);
  }
}

/// Whether the model says held-out text better than before.
bool run(const Options& options) {
  Model model = diffattn::load_diffllama<float>(options.model);
  if (model.config().vocab_size != 256) {
    throw std::runtime_error(options.model.string() + ": has " + std::to_string(model.config().vocab_size) +
                             " tokens; this example takes bytes for tokens, 256 of them");
  }
  const diffattn::TokenFile<std::uint8_t> file(options.text.empty() ? DIFFATTN_EXAMPLE_DATA "/kjv.txt" : options.text);
  const std::vector<std::uint8_t> text = options.text.empty()
                                             ? in_todays_words(file.tokens())
                                             : std::vector<std::uint8_t>(file.tokens().begin(), file.tokens().end());
  // The last twentieth is held out.
  const std::size_t training = text.size() - text.size() / 20;
  if (text.size() - training <= static_cast<std::size_t>(options.length)) {
    throw std::runtime_error(options.text.string() + ": has " + std::to_string(text.size()) + " bytes; --length " +
                             std::to_string(options.length) + " needs at least " +
                             std::to_string(20 * (options.length + 1)));
  }
  const Bytes all = text, held_out = all.subspan(training);

  diffattn::ThreadPool threads(options.threads);
  const double before = loss_on(model, held_out, options.length, threads);
  std::printf("%s: %ld parameters\n  before: %.4f nats a byte of held-out text\n", options.model.c_str(),
              parameter_count(model), before);
  print_sample(model, options.prompt);
  train(model, all.first(training), options, threads);

  save_diffllama(model, options.out);
  const auto tuned = diffattn::DiffLlama<float>::load(options.out);  // as it will be used
  const double after = loss_on(tuned, held_out, options.length, threads);
  std::printf("%s: written and read back\n  after: %.4f nats a byte of held-out text, before %.4f\n",
              options.out.c_str(), after, before);
  print_sample(tuned.decoder(), options.prompt);
  return after < before;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Fine-tunes a DiffLlama whose tokens are bytes.");
  Options options;
  options.declare(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;  // --help is 0
  }
  try {
    if (run(options)) return EXIT_SUCCESS;
    std::fprintf(stderr,
                 "the loss on held-out text has not fallen: more --steps or another --learning-rate may help\n");
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "not enough memory: --batch or --length is too large\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return EXIT_FAILURE;
}
