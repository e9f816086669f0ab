// Ranks against threads, on one machine: what a training step and a sum of gradients take on the ranks of mpirun, each
// with one thread, or in one process with --threads. Prints medians, as lines of a table of docs/distributed.md.
//
//   diffattn_bench_distributed --threads 1; diffattn_bench_distributed --threads 2
//   mpirun -np 2 diffattn_bench_distributed

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/distributed/data_parallel.hpp"
#include "diffattn/distributed/mpi.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/training/adamw.hpp"
#include "diffattn/training/cross_entropy.hpp"
#include "diffattn/training/gradient_norm.hpp"

namespace {

using namespace diffattn;
using Model = Decoder<float, MultiheadDiffAttention<float>>;

constexpr Index kSequences = 8, kLength = 256, kVocab = 256, kRepetitions = 7;

/// The median of the slowest rank's seconds, after one call that warms up.
template <typename F>
double median_seconds(MpiCommunicator& communicator, F&& f) {
  std::vector<double> seconds;
  for (Index repetition = 0; repetition <= kRepetitions; ++repetition) {
    double together = 0;
    communicator.all_reduce(std::span<double>(&together, 1));  // all begin at once
    const auto start = std::chrono::steady_clock::now();
    f();
    double taken = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    communicator.all_reduce(std::span<double>(&taken, 1), Reduction::max);
    if (repetition > 0) seconds.push_back(taken);
  }
  std::nth_element(seconds.begin(), seconds.begin() + kRepetitions / 2, seconds.end());
  return seconds[kRepetitions / 2];
}

void report(MpiCommunicator& communicator, Index threads, const char* what, double seconds, double bytes) {
  if (communicator.rank() != 0) return;
  std::printf("| %s | %ld | %ld | %.1f ms | %.2f MB |\n", what, communicator.size(), threads, 1e3 * seconds,
              1e-6 * bytes);
  std::fflush(stdout);
}

/// Times f and counts what rank 0 sends in one call.
template <typename F>
void run(MpiCommunicator& communicator, Index threads, const char* what, F&& f) {
  const double seconds = median_seconds(communicator, f);
  const auto before = communicator.bytes_sent();
  f();
  report(communicator, threads, what, seconds, static_cast<double>(communicator.bytes_sent() - before));
}

void training_step(MpiCommunicator& communicator, Index threads) {
  ThreadPool pool(threads);
  Model model({.vocab_size = kVocab,
               .num_layers = 4,
               .hidden_dim = 688,
               .attention = {.embed_dim = 256, .num_heads = 2, .rotary = RotaryConfig{}},
               .tied_head = true});
  Model gradient = zeros_like(model);
  AdamW<float> optimizer(model);
  const Index mine = kSequences / communicator.size();
  const std::vector<Index> lengths(static_cast<std::size_t>(mine), kLength);
  std::vector<Index> tokens, targets;
  for (Index i = 0; i < mine * kLength; ++i) {
    tokens.push_back((i * 37 + communicator.rank()) % kVocab);
    targets.push_back((i * 37 + communicator.rank() + 37) % kVocab);
  }
  Matrix<float> logits(mine * kLength, kVocab);
  Workspace workspace;
  Model::Tape tape;
  run(communicator, threads, "training step, 8 · 256 tokens", [&] {
    model.logits_into(logits, tokens, lengths, tape, workspace, pool);
    const auto loss = cross_entropy_into(logits, logits, targets, kIgnoreTarget, workspace, pool);
    set_zero(gradient, pool);
    model.backward(logits, tape, gradient, workspace, pool);
    average_gradients(communicator, gradient, loss.count);
    clip_gradient_norm(gradient, 1.0, pool);
    optimizer.step(model, gradient, 1e-4, pool);
  });
  if (communicator.size() > 1) {
    run(communicator, threads, "its gradient averaged", [&] { average_gradients(communicator, gradient, 1); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Index threads = argc == 3 && std::string(argv[1]) == "--threads" ? std::atol(argv[2]) : 1;
  MPI_Init(&argc, &argv);
  try {
    MpiCommunicator communicator(MPI_COMM_WORLD);
    if (kSequences % communicator.size() != 0) throw std::invalid_argument("run it on 1, 2, 4 or 8 ranks");
    training_step(communicator, threads);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
  }
  MPI_Finalize();
}
