#include "parts/model_makers.hpp"
#include "parts/trained_model.hpp"
#include "parts/variants.hpp"

namespace lab {

const std::vector<std::string> kControls = {"plain",      "norm", "wide",          "wide-norm",
                                            "wide-value", "sign", "wide-sign-norm"};

std::unique_ptr<Model> make_control(const ModelSpec& spec, const std::string& variant) {
  const auto has = [&](const char* word) { return variant.find(word) != variant.npos; };
  ControlConfig config{.num_heads = spec.width / spec.head_dim, .head_dim = spec.head_dim};
  if (has("wide")) config.num_heads /= 2;
  if (has("wide") && !has("value")) config.head_dim *= 2;
  if (has("value")) config.value_heads = 2;
  config.head_norm = has("norm");
  config.head_sign = has("sign");
  return fitted_model<ControlAttention>(spec, config, transformer_parameters(spec));
}

}  // namespace lab
