// What you learn here: how to train a model on several processes, on one machine or many. Each has the whole model and
// its part of every batch; after backward one call makes the mean gradient of all. The losses are those of one process,
// to rounding: --compare trains again on one, and looks. The model is example 07's Differential Transformer.
//
//   mpirun -np 4 example_15_data_parallel --steps 100 --out trained

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <diffattn/distributed/data_parallel.hpp>
#include <diffattn/distributed/mpi.hpp>
#include <diffattn/io/checkpoint.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/training/batch_sampler.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <diffattn/training/gradient_norm.hpp>
#include <diffattn/training/token_file.hpp>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "support/ranks_of_mpirun.hpp"

using diffattn::Index;
using Model = diffattn::Decoder<float, diffattn::MultiheadDiffAttention<float>>;

namespace {

struct Options {
  std::filesystem::path text = DIFFATTN_EXAMPLE_DATA "/kjv.txt";
  std::filesystem::path out = "trained";
  Index steps = 20;
  Index batch = 8;
  Index length = 128;
  bool resume = false;
  bool compare = false;
};

/// Trains on the ranks of `communicator` and returns the loss of every step: on all ranks the same numbers. Saves after
/// the last step, if `checkpoint` names a file.
template <diffattn::Communicator C>
std::vector<double> train(C& communicator, const Options& options, std::span<const std::uint8_t> text,
                          const std::filesystem::path& checkpoint) {
  Model model({.vocab_size = 256,
               .num_layers = 2,
               .hidden_dim = 172,
               .attention = {.embed_dim = 64, .num_heads = 1, .rotary = diffattn::RotaryConfig{}},
               .tied_head = true,
               .seed = 1});
  diffattn::AdamW<float> optimizer(model, {.learning_rate = 4e-3, .beta2 = 0.99, .weight_decay = 0.1});
  diffattn::BatchSampler<std::uint8_t> sampler(text, {.length = options.length,
                                                      .batch_size = options.batch,
                                                      .seed = 1,
                                                      .rank = communicator.rank(),
                                                      .num_ranks = communicator.size()});
  if (options.resume) {
    // Only rank 0 needs the file: the others get from it what it has read.
    Index numbers[2] = {};
    diffattn::on_rank_0(communicator, "resume", [&] {
      numbers[0] = load_checkpoint(model, optimizer, checkpoint).windows_drawn;
      numbers[1] = optimizer.steps;
    });
    communicator.broadcast(std::span<Index>(numbers), 0);
    sampler.drawn = numbers[0];
    optimizer.steps = numbers[1];
    broadcast_parameters(communicator, optimizer);
  }
  broadcast_parameters(communicator, model);

  Model gradient = zeros_like(model);
  diffattn::Workspace workspace;
  Model::Tape tape;
  diffattn::Batch batch;
  diffattn::Matrix<float> logits;
  std::vector<double> losses;
  while (optimizer.steps < options.steps) {
    diffattn::CrossEntropyLoss loss;
    // What this rank does by itself. An exception of one, such as a lack of memory, is then one of all.
    diffattn::check_on_all(communicator, "training step", [&] {
      sampler.next(batch);
      logits.resize(static_cast<Index>(batch.inputs.size()), model.config().vocab_size);
      model.logits_into(logits, batch.inputs, batch.lengths, tape, workspace, diffattn::Serial{});
      loss = cross_entropy_into(logits, logits, batch.targets, diffattn::kIgnoreTarget, workspace);
      set_zero(gradient);
      model.backward(logits, tape, gradient, workspace, diffattn::Serial{});
    });
    average_gradients(communicator, gradient, loss.count);
    clip_gradient_norm(gradient, 1.0);
    optimizer.step(model, gradient);
    losses.push_back(weighted_mean(communicator, loss.mean, static_cast<double>(loss.count)));
  }
  if (!checkpoint.empty()) {
    diffattn::on_rank_0(communicator, "save",
                        [&] { save_checkpoint(model, optimizer, checkpoint, {.windows_drawn = sampler.drawn}); });
  }
  return losses;
}

/// Whether one rank alone has the same losses, to rounding.
bool same_as_one_rank(const Options& options, std::span<const std::uint8_t> text, const std::vector<double>& losses) {
  diffattn::SelfCommunicator self;
  const std::vector<double> alone = train(self, options, text, {});
  double largest = alone.size() == losses.size() ? 0 : 1;
  for (std::size_t i = 0; i < losses.size() && i < alone.size(); ++i) {
    largest = std::max(largest, std::abs(losses[i] - alone[i]) / alone[i]);
  }
  std::printf("one rank alone: a loss that differs by %.1e at most\n", largest);
  return largest < 1e-4;
}

bool run(diffattn::MpiCommunicator& communicator, const Options& options) {
  const bool reports = communicator.rank() == 0;
  const diffattn::TokenFile<std::uint8_t> file(options.text);
  const std::filesystem::path checkpoint = options.out / "data_parallel.safetensors";
  diffattn::on_rank_0(communicator, "make the folder", [&] { std::filesystem::create_directories(options.out); });
  const std::vector<double> losses = train(communicator, options, file.tokens(), checkpoint);
  if (!reports) return true;
  for (std::size_t i = 0; i < losses.size(); ++i) {
    if (i % 5 == 0 || i + 1 == losses.size()) {
      std::printf("step %3ld  loss %.4f nats a byte\n", options.steps - static_cast<long>(losses.size() - i) + 1,
                  losses[i]);
    }
  }
  std::printf("%ld ranks, each of which sent %.1f MB; saved as %s\n", communicator.size(),
              1e-6 * static_cast<double>(communicator.bytes_sent()), checkpoint.c_str());
  return !options.compare || same_as_one_rank(options, file.tokens(), losses);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains a Differential Transformer on a text file, byte by byte, on all ranks of mpirun.");
  Options options;
  app.add_option("--text", options.text, "any file; its bytes are the tokens")->check(CLI::ExistingFile);
  app.add_option("--out", options.out, "folder for the checkpoint")->capture_default_str();
  app.add_option("--steps", options.steps)->check(CLI::Range(1L, 1L << 30))->capture_default_str();
  app.add_option("--batch", options.batch, "sequences a step, of all ranks")->check(CLI::Range(1L, 4096L));
  app.add_option("--length", options.length, "bytes a sequence")->check(CLI::Range(1L, 1L << 20));
  app.add_flag("--resume", options.resume, "go on from the checkpoint in --out, on any number of ranks");
  app.add_flag("--compare", options.compare, "train again on one rank, and compare the losses");
  CLI11_PARSE(app, argc, argv);

  const auto with_options = [&](diffattn::MpiCommunicator& communicator) { return run(communicator, options); };
  return on_ranks_of_mpirun(argc, argv, with_options);
}
