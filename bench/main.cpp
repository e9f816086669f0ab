// All benchmarks in one program, so that what is compared is measured in one run. Unless told otherwise, repetitions
// are interleaved at random; medians are printed, and a file of results holds every repetition.

#include <benchmark/benchmark.h>

#include <vector>

int main(int argc, char** argv) {
  std::vector<char*> arguments(argv, argv + argc);
  char interleave[] = "--benchmark_enable_random_interleaving=true";
  char repeat[] = "--benchmark_repetitions=7";
  char medians[] = "--benchmark_display_aggregates_only=true";
  char time[] = "--benchmark_min_time=0.05";
  arguments.insert(arguments.begin() + 1, {interleave, repeat, medians, time});  // the caller's come later and win
  int count = static_cast<int>(arguments.size());
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
