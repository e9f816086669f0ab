// What you learn here: how to train a model in C++. A small Differential Transformer and a Transformer of as many
// parameters learn a text byte by byte, from the same batches; everything but the attention layer is the same template.
// Writes checkpoints to go on from (--resume), the losses as CSV and as a picture, and the Differential Transformer in
// the form that Hugging Face and example 05 load. With seeds fixed, every run gives the same losses.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <diffattn/diffattn.hpp>
#include <diffattn/hugging_face/diffllama_export.hpp>
#include <diffattn/models/generate.hpp>
#include <diffattn/training/token_file.hpp>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "support/interruption.hpp"
#include "support/loss_curve.hpp"
#include "support/printable.hpp"
#include "support/training_files.hpp"
#include "support/training_options.hpp"
#include "support/training_run.hpp"

using diffattn::Index;
using Differential = diffattn::MultiheadDiffAttention<float>;
using Standard = diffattn::MultiheadAttention<float>;

namespace {

/// The same for both: a differential head counts as two of the Transformer's.
template <typename Attention>
diffattn::DecoderConfig<Attention> model_config(const example::TrainingOptions& options, Index num_heads) {
  return {.vocab_size = 256,
          .num_layers = options.layers,
          .hidden_dim = options.hidden_dim,
          .attention = {.embed_dim = options.embed_dim, .num_heads = num_heads, .rotary = diffattn::RotaryConfig{}},
          .tied_head = true,
          .seed = options.seed};
}

template <typename Attention>
void print_sample(const diffattn::Decoder<float, Attention>& model, const example::TrainingOptions& options) {
  std::string text = options.prompt;
  std::vector<Index> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  const Index room = std::max<Index>(options.length - static_cast<Index>(tokens.size()), 1);
  for (const Index token : generate(model, tokens, {.max_new_tokens = room, .temperature = 0.7, .seed = 1})) {
    text += static_cast<char>(token);
  }
  std::printf("  sample: %s\n\n", example::printable(text).c_str());
}

void run(const example::TrainingOptions& options) {
  const diffattn::TokenFile<std::uint8_t> file(options.text);
  const example::Bytes bytes = file.tokens();
  example::check_text(options, bytes.size());
  example::check_sizes(options);
  example::check_folder(options, {"differential", "transformer"});
  const std::size_t training = bytes.size() - example::validation_bytes(bytes.size());

  example::TrainingRun<Differential> differential("differential", model_config<Differential>(options, options.heads()),
                                                  options, bytes.first(training), bytes.subspan(training));
  example::TrainingRun<Standard> standard("transformer", model_config<Standard>(options, 2 * options.heads()), options,
                                          bytes.first(training), bytes.subspan(training));
  example::catch_interruption();
  differential.run();
  print_sample(differential.model, options);
  standard.run();
  print_sample(standard.model, options);

  save_diffllama(differential.model, options.out / "diffllama", {.max_position_embeddings = options.length});
  example::save_csv(options.out / "loss.csv", {differential.curve, standard.curve});
  example::save_svg(options.out / "loss.svg", options.title(), {differential.curve, standard.curve});
  std::printf("losses: %s and .csv\nmodel: %s\n", (options.out / "loss.svg").c_str(),
              (options.out / "diffllama").c_str());
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains a Differential Transformer and a Transformer on a text file, byte by byte.");
  example::TrainingOptions options;
  options.declare(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;  // --help is 0
  }
  try {
    run(options);
    return EXIT_SUCCESS;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "not enough memory: --batch, --length, --embed-dim, --hidden-dim or --layers is too large\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return EXIT_FAILURE;
}
