#include <diffattn/layers/multihead_diff_attention.hpp>

#include "parts/model_makers.hpp"
#include "parts/trained_model.hpp"

namespace lab {

/// "grouped": twice the signal heads, of which four share one map for noise. They have half as many key heads.
std::unique_ptr<Model> make_differential(const ModelSpec& spec) {
  using Attention = diffattn::MultiheadDiffAttention<float>;
  const Index heads = spec.width / (2 * spec.head_dim);
  Attention::Config config{.num_heads = heads, .head_dim = spec.head_dim};
  if (spec.name == "grouped") {
    config = {
        .num_heads = 2 * heads, .num_kv_heads = heads / 2, .head_dim = spec.head_dim, .num_noise_heads = heads / 2};
  }
  return fitted_model<Attention>(spec, config, transformer_parameters(spec));
}

}  // namespace lab
