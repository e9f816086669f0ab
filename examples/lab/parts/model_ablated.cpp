#include <stdexcept>

#include "parts/model_makers.hpp"
#include "parts/trained_model.hpp"
#include "parts/variants.hpp"

namespace lab {

const std::vector<std::string> kAblations = {"fixed", "raw",     "init-0.5", "init-0.8",
                                             "all",   "no-norm", "no-scale", "no-norm-no-scale"};

std::unique_ptr<Model> make_ablated(const ModelSpec& spec, const std::string& variant) {
  AblatedConfig config{.num_heads = spec.width / (2 * spec.head_dim), .head_dim = spec.head_dim};
  if (variant == "fixed") config.lambda_form = LambdaForm::fixed;
  if (variant == "raw") config.lambda_form = LambdaForm::raw;
  if (variant == "init-0.5") config.lambda_init = 0.5;
  if (variant == "init-0.8") config.lambda_init = 0.8;
  if (variant == "no-norm" || variant == "no-norm-no-scale") config.head_norm = false;
  if (variant == "no-scale" || variant == "no-norm-no-scale") config.head_scale = false;
  return fitted_model<AblatedDiffAttention>(spec, config, transformer_parameters(spec));
}

}  // namespace lab
