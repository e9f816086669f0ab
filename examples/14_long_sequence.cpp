// What you learn here: how to attend to one sequence that is too long for one machine. Each process has some of its
// rows, and calls the layer as one process would: that the others have the rest is said by the executor. Forward,
// backward, and then into a cache of which every process keeps a part, token by token. --compare does the same on one.
//
//   mpirun -np 4 example_14_long_sequence --rows 16384 --compare

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <diffattn/distributed/cache_parallel.hpp>
#include <diffattn/distributed/data_parallel.hpp>
#include <diffattn/distributed/mpi.hpp>
#include <diffattn/distributed/sequence_parallel.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>

#include "support/ranks_of_mpirun.hpp"

using namespace diffattn;

namespace {

using Layer = MultiheadDiffAttention<float>;

struct Options {
  Index rows = 2048, embed_dim = 256, heads = 4, kv_heads = 2, tokens = 4;
  bool compare = false;
};

/// The whole sequence, or the gradient of what comes out: any numbers, the same on every rank. In a program of yours
/// each rank makes or reads its own rows only.
Matrix<float> waves(Index rows, Index cols, double frequency) {
  Matrix<float> x(rows, cols);
  for (Index t = 0; t < rows; ++t) {
    for (Index c = 0; c < cols; ++c) {
      x(t, c) = static_cast<float>(std::sin(frequency * static_cast<double>(t + 1) * static_cast<double>(3 * c + 1)));
    }
  }
  return x;
}

/// What a layer makes of the sequence: all rows of y and dx, the gradient of W_Q, and y of the tokens that follow.
struct Results {
  Matrix<float> y, dx, dq_weight, y_of_tokens;
  double seconds = 0;
  std::uint64_t bytes_sent = 0, bytes_a_token = 0;
};

template <Communicator C>
Results attend(C& communicator, const Layer& layer, const Options& options) {
  const Index width = options.embed_dim;
  SequenceParallel ranks(communicator, options.rows);
  const SequencePlacement& placement = ranks.placement();
  const Matrix<float> x = placement.rows_of(waves(options.rows, width, 0.011)),
                      dy = placement.rows_of(waves(options.rows, width, 0.017));
  Matrix<float> y(x.rows(), width), dx(x.rows(), width);
  Layer gradient = zeros_like(layer);
  typename Layer::Tape tape;
  Workspace workspace;
  Results results;

  const auto start = std::chrono::steady_clock::now();
  layer.forward_into(y, x, CausalMask{}, tape, workspace, ranks);
  layer.backward_into(dx, dy, tape, gradient, workspace, ranks);
  results.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  results.bytes_sent = communicator.bytes_sent();
  // Each rank has the gradients of its rows for the parameters, which all ranks have: they add up.
  sum_gradients(communicator, gradient);
  results.dq_weight = gradient.q_proj.weight;
  results.y = ranks.gather(y);
  results.dx = ranks.gather(dx);

  // Decoding: each rank keeps the keys and values of its rows, and of some of the tokens behind them, which all ranks
  // have.
  KvCache<float> cache;
  layer.forward_into(y, x, cache, CausalMask{}, workspace, ranks);
  CacheParallel caches(communicator);
  caches.prefilled(placement);
  const Matrix<float> tokens = waves(options.tokens, width, 0.023);
  results.y_of_tokens.resize(options.tokens, width);
  for (Index t = 0; t < options.tokens; ++t) {
    caches.feed(1);
    const std::uint64_t before = communicator.bytes_sent();
    layer.forward_into(results.y_of_tokens.middleRows(t, 1), tokens.middleRows(t, 1), cache, workspace, caches);
    results.bytes_a_token = communicator.bytes_sent() - before;
  }
  return results;
}

/// Whether two results differ by rounding alone.
bool same(const char* name, const Matrix<float>& a, const Matrix<float>& b) {
  const double difference = static_cast<double>((a - b).norm() / b.norm());
  std::printf("%-16s differs by %.1e of its size\n", name, difference);
  return difference < 1e-5;
}

bool run(MpiCommunicator& communicator, const Options& options) {
  const Layer layer({.embed_dim = options.embed_dim,
                     .num_heads = options.heads,
                     .num_kv_heads = options.kv_heads,
                     .rotary = RotaryConfig{}});
  const Results spread = attend(communicator, layer, options);
  if (communicator.rank() != 0) return true;
  std::printf("%ld rows over %ld ranks: forward and backward in %.3f s, in which this rank sent %.1f MB\n",
              options.rows, communicator.size(), spread.seconds, 1e-6 * static_cast<double>(spread.bytes_sent));
  std::printf("decoding sends %ld bytes a token\n", static_cast<long>(spread.bytes_a_token));
  if (!options.compare) return true;
  SelfCommunicator self;
  const Results alone = attend(self, layer, options);
  std::printf("one rank alone: in %.3f s\n", alone.seconds);
  const bool forward = same("y", spread.y, alone.y), backward = same("dx", spread.dx, alone.dx),
             weights = same("gradient of W_Q", spread.dq_weight, alone.dq_weight),
             tokens = same("y of new tokens", spread.y_of_tokens, alone.y_of_tokens);
  return forward && backward && weights && tokens;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Runs a layer of differential attention on one long sequence, spread over all ranks of mpirun.");
  Options options;
  app.add_option("--rows", options.rows, "tokens of the sequence")->check(CLI::Range(1L, 1L << 30));
  app.add_option("--embed-dim", options.embed_dim)->check(CLI::Range(1L, 1L << 16));
  app.add_option("--heads", options.heads)->check(CLI::Range(1L, 1L << 10));
  app.add_option("--kv-heads", options.kv_heads)->check(CLI::Range(1L, 1L << 10));
  app.add_option("--tokens", options.tokens, "to decode one by one")->check(CLI::Range(1L, 1L << 20));
  app.add_flag("--compare", options.compare, "do it again on one rank, and compare");
  CLI11_PARSE(app, argc, argv);

  const auto with_options = [&](MpiCommunicator& communicator) { return run(communicator, options); };
  return on_ranks_of_mpirun(argc, argv, with_options);
}
