#include "parts/model.hpp"

#include <algorithm>
#include <stdexcept>

#include "parts/model_makers.hpp"

namespace lab {

namespace {

/// "a, b or c": every name that make_model knows.
std::string all_names() {
  std::string names;
  for (const std::string& name : kModelNames) names += name + ", ";
  for (const std::string& name : kAblations) names += "differential-" + name + ", ";
  for (const std::string& name : kControls) names += "transformer-" + name + ", ";
  return names.substr(0, names.size() - 2);
}

/// What stands behind `prefix` if it is one of `variants`; else nothing.
std::string variant_of(const std::string& name, const std::string& prefix, const std::vector<std::string>& variants) {
  if (name.compare(0, prefix.size(), prefix) != 0) return {};
  const std::string rest = name.substr(prefix.size());
  return std::find(variants.begin(), variants.end(), rest) == variants.end() ? std::string() : rest;
}

}  // namespace

std::unique_ptr<Model> make_model(const ModelSpec& spec) {
  if (spec.head_dim < 2 || spec.width % (4 * spec.head_dim) != 0) {
    throw std::runtime_error("--width " + std::to_string(spec.width) + ": must be a multiple of " +
                             std::to_string(4 * spec.head_dim) + ", four heads of --head-dim " +
                             std::to_string(spec.head_dim));
  }
  if (spec.name == "transformer") return make_transformer(spec);
  if (spec.name == "differential" || spec.name == "grouped") return make_differential(spec);
  if (spec.name == "v2") return make_v2(spec);
  const std::string ablation = variant_of(spec.name, "differential-", kAblations);
  if (!ablation.empty()) return make_ablated(spec, ablation);
  const std::string control = variant_of(spec.name, "transformer-", kControls);
  if (!control.empty()) return make_control(spec, control);
  throw std::runtime_error("there is no model \"" + spec.name + "\"; there are " + all_names());
}

}  // namespace lab
