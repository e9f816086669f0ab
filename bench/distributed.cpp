// Ranks against threads, on one machine: a training step whose gradients are averaged, and a long causal sequence.
// Prints lines of the table in docs/distributed.md: medians of wall time, and of what the busiest and the idlest rank
// take of a processor, which other programs on the machine do not disturb (MPI waits by looking, so that with it
// waiting counts as well). Each rank has a median of its own: the busiest of every repetition is the one that was
// disturbed, and would make ranks look uneven that are not. Below it the pairs of a query and a key that ranks compute,
// and their memory.
//
//   diffattn_bench_distributed --threads 2            one rank with 2 threads
//   diffattn_bench_distributed --thread-ranks 2       2 ranks, which are threads
//   mpirun -np 2 diffattn_bench_distributed           2 ranks, which are processes

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>
#include <vector>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/distributed/data_parallel.hpp"
#include "diffattn/distributed/mpi.hpp"
#include "diffattn/distributed/sequence_parallel.hpp"
#include "diffattn/distributed/thread_communicator.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/training/adamw.hpp"
#include "diffattn/training/cross_entropy.hpp"
#include "diffattn/training/gradient_norm.hpp"

namespace {

using namespace diffattn;
using Model = Decoder<float, MultiheadDiffAttention<float>>;

constexpr Index kSequences = 8, kLength = 256, kVocab = 256, kRepetitions = 7;

/// Of the processor, by this thread.
double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// What every rank has as `mine`.
template <Communicator C, typename T>
std::vector<T> of_ranks(C& communicator, const T& mine) {
  std::vector<T> all(static_cast<std::size_t>(communicator.size()));
  communicator.all_gather(std::span<const T>(&mine, 1), std::span<T>(all));
  return all;
}

/// Times f, after one call that warms up, and prints what rank 0 sends in one call.
template <Communicator C, typename F>
void run(C& communicator, const std::string& how, const char* what, F&& f) {
  std::vector<double> wall, processor;
  std::uint64_t sent = 0;
  for (Index repetition = 0; repetition <= kRepetitions; ++repetition) {
    double together = 0;
    communicator.all_reduce(std::span<double>(&together, 1));  // all begin at once
    const auto start = std::chrono::steady_clock::now();
    const double thread_start = thread_seconds();
    const std::uint64_t sent_before = communicator.bytes_sent();
    f();
    sent = communicator.bytes_sent() - sent_before;
    const double taken = thread_seconds() - thread_start;
    double longest = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    communicator.all_reduce(std::span<double>(&longest, 1), Reduction::max);
    if (repetition == 0) continue;
    wall.push_back(longest);
    processor.push_back(taken);
  }
  const std::vector<double> all = of_ranks(communicator, median(processor));
  if (communicator.rank() != 0) return;
  const auto [idlest, busiest] = std::minmax_element(all.begin(), all.end());
  std::printf("| %s | %s | %.1f ms | %.1f ms | %.1f ms | %.2f MB |\n", what, how.c_str(), 1e3 * median(wall),
              1e3 * *busiest, 1e3 * *idlest, 1e-6 * static_cast<double>(sent));
  std::fflush(stdout);
}

/// A causal sequence of 16,384 rows, two differential heads.
template <Communicator C>
void prefill(C& communicator, const std::string& how, Index threads) {
  constexpr Index kRows = 16384, kDim = 64;
  constexpr Heads kHeads{.num_heads = 2};
  ThreadPool pool(threads);
  SequenceParallel ranks(communicator, kRows, pool);
  const Index mine = ranks.placement().mine(), width = 2 * kHeads.num_heads * kDim;
  const Matrix<float> q = Matrix<float>::Random(mine, width), k = Matrix<float>::Random(mine, width),
                      v = Matrix<float>::Random(mine, width);
  Matrix<float> out(mine, width);
  Workspace workspace;
  run(communicator, how, "16,384 rows, causal",
      [&] { multihead_diff_attention_into(out, q, k, v, 0.3f, kHeads, CausalMask{}, {}, workspace, ranks); });
  const auto taken = static_cast<double>(4 * out.size()) * sizeof(float) + static_cast<double>(workspace.capacity());
  const std::vector<Index> pairs = of_ranks(communicator, ranks.placement().visible_pairs(CausalMask{}));
  const std::vector<double> bytes = of_ranks(communicator, taken);
  if (communicator.rank() != 0) return;
  std::printf("\nby rank, pairs of a query and a key, and memory of operands and workspace:");
  for (std::size_t rank = 0; rank < pairs.size(); ++rank) {
    std::printf(" %ld, %.1f MB;", static_cast<long>(pairs[rank]), 1e-6 * bytes[rank]);
  }
  std::printf("\n");
}

template <Communicator C>
void training_step(C& communicator, const std::string& how, Index threads) {
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
  run(communicator, how, "training step, 8 · 256 tokens", [&] {
    model.logits_into(logits, tokens, lengths, tape, workspace, pool);
    const auto loss = cross_entropy_into(logits, logits, targets, kIgnoreTarget, workspace, pool);
    set_zero(gradient, pool);
    model.backward(logits, tape, gradient, workspace, pool);
    average_gradients(communicator, gradient, loss.count);
    clip_gradient_norm(gradient, 1.0, pool);
    optimizer.step(model, gradient, 1e-4, pool);
  });
  run(communicator, how, "its gradient averaged", [&] { average_gradients(communicator, gradient, 1); });
}

template <Communicator C>
void all(C& communicator, const std::string& how, Index threads) {
  if (kSequences % communicator.size() != 0) throw std::invalid_argument("run it on 1, 2, 4 or 8 ranks");
  if (communicator.rank() == 0) {
    std::printf("| what | how | wall | busiest rank | idlest rank | sent by rank 0 |\n|---|---|---:|---:|---:|---:|\n");
  }
  training_step(communicator, how, threads);
  prefill(communicator, how, threads);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string option = argc == 3 ? argv[1] : "";
  const Index count = argc == 3 ? std::atol(argv[2]) : 1;
  if (option == "--threads") {
    SelfCommunicator self;
    all(self, std::to_string(count) + " threads", count);
    return 0;
  }
  if (option == "--thread-ranks") {
    run_ranks(count,
              [&](ThreadCommunicator& ranks) { all(ranks, std::to_string(count) + " ranks that are threads", 1); });
    return 0;
  }
  MPI_Init(&argc, &argv);
  try {
    MpiCommunicator ranks(MPI_COMM_WORLD);
    all(ranks, std::to_string(ranks.size()) + " ranks of MPI", 1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
  }
  MPI_Finalize();
}
