// dying_rank FILE: two ranks save a checkpoint and begin to save another, until rank 1 is killed. It never ends by itself.
// dying_rank --check FILE: fails unless FILE is a checkpoint that is whole.

#include <csignal>
#include <cstdio>
#include <cstring>
#include <diffattn/distributed/data_parallel.hpp>
#include <diffattn/distributed/mpi.hpp>
#include <diffattn/io/checkpoint.hpp>
#include <diffattn/layers/linear.hpp>
#include <diffattn/training/adamw.hpp>

namespace {

struct Run {
  diffattn::Linear<float> layer{256, 256};
  diffattn::AdamW<float> optimizer{layer};
};

void save_until_killed(const char* path) {
  diffattn::MpiCommunicator communicator(MPI_COMM_WORLD);
  Run run;
  for (int saved = 0;; ++saved) {
    run.layer.weight.setConstant(static_cast<float>(saved));
    if (saved == 20 && communicator.rank() == 1) std::raise(SIGKILL);
    // Without a collective call, so that rank 0 is saving when rank 1 dies.
    if (communicator.rank() == 0) save_checkpoint(run.layer, run.optimizer, path, {.windows_drawn = saved});
    if (saved < 3) communicator.broadcast(std::span<int>(&saved, 1), 0);
  }
}

int check(const char* path) {
  Run run;
  const auto state = load_checkpoint(run.layer, run.optimizer, path);
  const bool whole = (run.layer.weight.array() == static_cast<float>(state.windows_drawn)).all();
  std::printf("checkpoint %ld is %s\n", static_cast<long>(state.windows_drawn), whole ? "whole" : "mixed up");
  return whole ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--check") == 0) return check(argv[2]);
  if (argc != 2) return 2;
  MPI_Init(&argc, &argv);
  save_until_killed(argv[1]);
}
