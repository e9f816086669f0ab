#include "parts/options.hpp"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>

#include "parts/needle.hpp"
#include "support/interruption.hpp"

namespace lab {

namespace {

CLI::Range up_to(long most) { return CLI::Range(1L, most); }

}  // namespace

void Options::declare_common(CLI::App& app) {
  app.add_option("--out", out, "folder of the CSV, and of saved models to go on from")->capture_default_str();
  app.add_option("--models", models, "which are compared")->delimiter(',')->capture_default_str();
  app.add_option("--seeds", seeds, "of parameters and data")->delimiter(',')->capture_default_str();
  app.add_option("--learning-rates", learning_rates, "peaks that are tried")
      ->delimiter(',')
      ->check(CLI::Range(1e-9, 1e30))
      ->capture_default_str();
  app.add_option("--threads", threads, "changes the speed and nothing else")->check(up_to(1024))->capture_default_str();
  app.add_option("--minutes", minutes, "budget: afterwards the program saves and ends, and goes on when called again")
      ->check(CLI::Range(0.0, 1e6));
  app.add_flag("--smoke", smoke, "everything tiny, to see that it works");
}

void Options::declare(CLI::App& app) {
  declare_common(app);
  app.add_option("--steps", steps, "optimizer steps of a model")->check(up_to(1 << 30))->capture_default_str();
  app.add_option("--layers", layers)->check(up_to(1024))->capture_default_str();
  app.add_option("--width", width, "of the models")->check(up_to(1 << 14))->capture_default_str();
  app.add_option("--head-dim", head_dim, "of one map of a head")->check(up_to(1024))->capture_default_str();
}

void NeedleOptions::declare(CLI::App& app) {
  Options::declare(app);
  app.add_option("--contexts", recall.contexts, "lengths of context in training and test")
      ->delimiter(',')
      ->check(up_to(1 << 20))
      ->capture_default_str();
  app.add_option("--grow-every", recall.grow_every,
                 "training begins with the first context alone, and the next joins every so many steps; 0: all at once")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--tokens", recall.tokens, "of a training step")->check(up_to(1 << 24))->capture_default_str();
  app.add_option("--keys", recall.keys, "needles in a context")->check(up_to(1 << 16))->capture_default_str();
  app.add_option("--asked", recall.asked, "of them")->check(up_to(1 << 16))->capture_default_str();
  app.add_option("--key-kinds", recall.key_kinds)->check(up_to(1 << 12))->capture_default_str();
  app.add_option("--value-kinds", recall.value_kinds)->check(up_to(1 << 12))->capture_default_str();
  app.add_option("--noise-kinds", recall.noise_kinds)->check(up_to(1 << 16))->capture_default_str();
  app.add_option("--carried", recall.carried, "1: one token has key and value; 0: the value stands behind its key")
      ->capture_default_str();
  app.add_option("--unseen-contexts", unseen_contexts, "lengths of context in tests alone")
      ->delimiter(',')
      ->check(up_to(1 << 20))
      ->capture_default_str();
  app.add_option("--test-sequences", test_sequences, "of each context that a model is tested on")
      ->check(up_to(1 << 24))
      ->capture_default_str();
}

int run_program(const char* about, int argc, char** argv, const std::function<void(CLI::App&)>& declare,
                const std::function<void()>& experiment) {
  CLI::App app(about);
  declare(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;  // --help is 0
  }
  try {
    example::catch_interruption();
    experiment();
    return EXIT_SUCCESS;
  } catch (const Pause& pause) {
    std::printf("%s\n", pause.what());
    return 3;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "not enough memory: --tokens, --width or --layers is too large\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return EXIT_FAILURE;
}

}  // namespace lab
