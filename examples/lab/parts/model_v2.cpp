#include <diffattn/layers/multihead_diff_attention_v2.hpp>

#include "parts/model_makers.hpp"
#include "parts/trained_model.hpp"

namespace lab {

/// As many differential heads as the Transformer has heads, on half as many key heads: its projections are then as large
/// together as the Transformer's.
std::unique_ptr<Model> make_v2(const ModelSpec& spec) {
  using Attention = diffattn::MultiheadDiffAttentionV2<float>;
  const Index heads = spec.width / spec.head_dim;
  return fitted_model<Attention>(spec, {.num_heads = heads, .num_kv_heads = heads / 2, .head_dim = spec.head_dim},
                                 transformer_parameters(spec));
}

}  // namespace lab
