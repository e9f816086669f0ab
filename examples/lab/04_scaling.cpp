// Question 4: byte-level language models of four sizes, two learning rates: validation loss against parameters, bytes
// read, floating-point operations and seconds. The models are kept for questions 7, 9 and 10.

#include <CLI/CLI.hpp>
#include <cstdio>

#include "parts/budget.hpp"
#include "parts/language.hpp"
#include "parts/options.hpp"

namespace {

using namespace lab;

void scale(LanguageConfig config) {
  if (config.smoke) config.shrink();
  const Text text(config.text, config.length);
  MeasurementFile file(config.out, "scaling", config.fields());
  const Budget budget(config.minutes);
  diffattn::ThreadPool pool(1);
  const auto all = static_cast<Index>(config.seeds.size() * kLanguageSizes.size() * config.rates.size() *
                                      config.compared.size());
  Index done = 0;
  // A seed at a time, so that what is there after an interruption is of all sizes.
  for (const std::uint64_t seed : config.seeds) {
    for (const LanguageSize& size : kLanguageSizes) {
      for (const double rate : config.rates) {
        for (const std::string& model : config.compared) {
          const Run run = language_run(model, size, rate, seed);
          if (!file.has(run)) {
            budget.check(done, all);
            const double loss = train_language_model(run, size, rate, config, text, file, pool);
            file.finish(run);
            std::printf("%ld of %ld: %s, validation loss %.4f, %.1f minutes\n", done + 1, all, run.identity().c_str(),
                        loss, budget.elapsed());
            std::fflush(stdout);
          }
          ++done;
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Question 4 of the lab: how loss scales with parameters, bytes, FLOP and seconds.");
  lab::LanguageConfig config;
  config.declare(app);
  return lab::run_program(app, argc, argv, [&] { scale(config); });
}
