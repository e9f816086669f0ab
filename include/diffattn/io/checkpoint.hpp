#pragma once

// Everything that a training run needs to go on as if it had not stopped, bit for bit, in one safetensors file:
//
//   tensors    model.<name> · optimizer.first_moment.<name> · optimizer.second_moment.<name>
//   metadata   format ("diffattn training 1") · optimizer_steps · windows_drawn · random_state, and notes of your own
//
//   save_checkpoint(model, optimizer, "run.safetensors", {.windows_drawn = sampler.drawn});
//   sampler.drawn = load_checkpoint(model, optimizer, "run.safetensors").windows_drawn;
//
// Configurations (model, optimizer, sampler) and the tokens are the program's: it constructs them as before.
//
// Errors   FormatError if the file is no such checkpoint or holds another model: every tensor that is wrong in one
//          message. std::runtime_error if it cannot be opened or written. Whatever is thrown, std::bad_alloc included,
//          model and optimizer are as they were, and so is the file: a process that is killed while it saves leaves the
//          last good checkpoint, and beside it a file that ends in .unfinished and can be deleted.
// Cost     saving holds one copy of all tensors.

#include <charconv>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/io/safetensors.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/training/adamw.hpp"

namespace diffattn::inline v0_1 {

/// Where a run stands, beside its model and its optimizer.
struct TrainingState {
  Index windows_drawn = 0;                        ///< BatchSampler::drawn
  std::uint64_t random_state = 0;                 ///< SplitMix64::state, of whatever else draws random numbers
  std::map<std::string, std::string> notes = {};  ///< stored with the rest; the keys above are taken
};

namespace detail {

inline constexpr const char* kCheckpointFormat = "diffattn training 1";

template <typename Integer>
Integer checkpoint_number(const Safetensors& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  Integer number{};
  if (found != file.metadata().end()) {
    const std::string& text = found->second;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error == std::errc{} && end == text.data() + text.size() && number >= 0) return number;
  }
  throw FormatError(file.path() + ": its metadata must hold a number as " + in_quotes(key));
}

/// Both as one object, so that a checkpoint is checked as a whole before anything is changed.
template <typename Model, typename Optimizer>
struct ModelAndOptimizer {
  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("model", self.model, visitor);
    visit_part("optimizer", self.optimizer, visitor);
  }

  Model& model;
  Optimizer& optimizer;
};
template <typename Model, typename Optimizer>
ModelAndOptimizer(Model&, Optimizer&) -> ModelAndOptimizer<Model, Optimizer>;

}  // namespace detail

/// Writes model, optimizer and `state` to `path`, as a whole or not at all.
template <typename Model, typename Scalar>
void save_checkpoint(const Model& model, const AdamW<Scalar>& optimizer, const std::filesystem::path& path,
                     const TrainingState& state = {}) {
  std::map<std::string, std::string> metadata = {{"format", detail::kCheckpointFormat},
                                                 {"optimizer_steps", std::to_string(optimizer.steps)},
                                                 {"windows_drawn", std::to_string(state.windows_drawn)},
                                                 {"random_state", std::to_string(state.random_state)}};
  metadata.insert(state.notes.begin(), state.notes.end());
  save_parameters(detail::ModelAndOptimizer{model, optimizer}, path, "", std::move(metadata));
}

/// Reads what save_checkpoint wrote into a model and an optimizer of the same configurations, and returns the rest.
template <typename Model, typename Scalar>
TrainingState load_checkpoint(Model& model, AdamW<Scalar>& optimizer, const std::filesystem::path& path) {
  const Safetensors file(path);
  const auto format = file.metadata().find("format");
  if (format == file.metadata().end() || format->second != detail::kCheckpointFormat) {
    throw FormatError(path.string() + ": is no training checkpoint: its metadata must hold format = " +
                      detail::in_quotes(detail::kCheckpointFormat));
  }
  TrainingState state{.windows_drawn = detail::checkpoint_number<Index>(file, "windows_drawn"),
                      .random_state = detail::checkpoint_number<std::uint64_t>(file, "random_state"),
                      .notes = file.metadata()};
  const auto steps = detail::checkpoint_number<Index>(file, "optimizer_steps");
  for (const char* key : {"format", "optimizer_steps", "windows_drawn", "random_state"}) state.notes.erase(key);

  detail::ModelAndOptimizer both{model, optimizer};
  load_parameters(both, file);
  optimizer.steps = steps;
  return state;
}

}  // namespace diffattn::inline v0_1
