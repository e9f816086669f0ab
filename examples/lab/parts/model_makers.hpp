#pragma once

// One function for each attention layer that is compiled: `variant` is what the name of the model says of it.

#include "parts/model.hpp"

namespace lab {

/// Parameters of the Transformer of these sizes, which all others are fitted to.
Index transformer_parameters(const ModelSpec& spec);

std::unique_ptr<Model> make_transformer(const ModelSpec& spec);
std::unique_ptr<Model> make_differential(const ModelSpec& spec);
std::unique_ptr<Model> make_v2(const ModelSpec& spec);
std::unique_ptr<Model> make_ablated(const ModelSpec& spec, const std::string& variant);
std::unique_ptr<Model> make_control(const ModelSpec& spec, const std::string& variant);

/// What can stand behind "differential-" and "transformer-" in a model's name.
extern const std::vector<std::string> kAblations, kControls;

}  // namespace lab
