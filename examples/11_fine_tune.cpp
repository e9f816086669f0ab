// What you learn here: how to go on training a checkpoint of Hugging Face's DiffLlama, and write it back as one. The
// small model that comes with the examples knows the King James Bible byte by byte; it learns to say it in today's
// words: "you" for "thee", "to" for "unto". Held-out text is what it is judged by, before and after.
// With --text it learns any other text, with --model another model whose tokens are bytes.

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
#include <exception>
#include <new>
#include <span>
#include <string>
#include <vector>

#include "support/byte_model.hpp"
#include "support/fine_tune_options.hpp"
#include "support/todays_words.hpp"

using diffattn::Index;

namespace {

using Bytes = std::span<const std::uint8_t>;
using Model = diffattn::Decoder<float, diffattn::MultiheadDiffAttention<float>>;

void train(Model& model, Bytes text, const example::FineTuneOptions& options, diffattn::ThreadPool& threads) {
  diffattn::BatchSampler<std::uint8_t> sampler(
      text, {.length = options.length, .batch_size = options.batch, .seed = options.seed});
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
    std::printf("  step %4ld of %ld   training %.4f\n", step + 1, options.steps, loss);
    std::fflush(stdout);
  }
}

/// Whether the model says held-out text better than before.
bool run(const example::FineTuneOptions& options) {
  Model model = diffattn::load_diffllama<float>(options.model);
  example::check_takes_bytes(model, options.model);
  const std::vector<std::uint8_t> text = example::text_for(options);
  const std::size_t training = text.size() - text.size() / 20;  // the last twentieth is held out
  const Bytes all = text, held_out = all.subspan(training);

  diffattn::ThreadPool threads(options.threads);
  const double before = example::loss_on(model, held_out, options.length, threads);
  std::printf("%s: %ld parameters\n  before: %.4f nats a byte of held-out text\n", options.model.c_str(),
              parameter_count(model), before);
  example::print_sample(model, options.prompt);
  train(model, all.first(training), options, threads);

  save_diffllama(model, options.out);
  const auto tuned = diffattn::DiffLlama<float>::load(options.out);  // as it will be used
  const double after = example::loss_on(tuned, held_out, options.length, threads);
  std::printf("%s: written and read back\n  after: %.4f nats a byte of held-out text, before %.4f\n",
              options.out.c_str(), after, before);
  example::print_sample(tuned.decoder(), options.prompt);
  return after < before;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Fine-tunes a DiffLlama whose tokens are bytes.");
  example::FineTuneOptions options;
  options.declare(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;  // --help is 0
  }
  try {
    if (run(options)) return EXIT_SUCCESS;
    std::fprintf(stderr, "the loss on held-out text has not fallen: try more --steps, another --learning-rate\n");
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "not enough memory: --batch or --length is too large\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return EXIT_FAILURE;
}
