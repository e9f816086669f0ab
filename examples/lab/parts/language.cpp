#include "parts/language.hpp"

#include <CLI/CLI.hpp>

namespace lab {

void LanguageOptions::declare(CLI::App& app) {
  const auto up_to = [](long most) { return CLI::Range(1L, most); };
  declare_common(app);
  app.add_option("--text", text, "any file; its bytes are the tokens")->check(CLI::ExistingFile)->capture_default_str();
  app.add_option("--length", length, "bytes a sequence")->check(up_to(1 << 16))->capture_default_str();
  app.add_option("--batch", batch, "sequences a step")->check(up_to(4096))->capture_default_str();
  app.add_option("--steps", steps, "of the smallest model; the largest takes twice as many")
      ->check(up_to(1 << 29))
      ->capture_default_str();
  app.add_option("--head-dim", head_dim, "of one map of a head")->check(up_to(1024))->capture_default_str();
}

}  // namespace lab
