#include <diffattn/layers/multihead_attention.hpp>

#include "parts/model_makers.hpp"
#include "parts/trained_model.hpp"

namespace lab {

namespace {

using Attention = diffattn::MultiheadAttention<float>;

Index heads_of(const ModelSpec& spec) { return spec.width / spec.head_dim; }

Index hidden_of(const ModelSpec& spec) {
  return spec.hidden_dim != 0 ? spec.hidden_dim : (8 * spec.width / 3 + 2) / 4 * 4;
}

}  // namespace

Index transformer_parameters(const ModelSpec& spec) {
  const Index of_layer = 4 * spec.width * spec.width + 3 * spec.width * hidden_of(spec) + 2 * spec.width;
  return spec.layers * of_layer + spec.width + spec.vocab_size * spec.width;
}

std::unique_ptr<Model> make_transformer(const ModelSpec& spec) {
  ModelSpec sized = spec;
  sized.hidden_dim = hidden_of(spec);
  return fitted_model<Attention>(sized, {.num_heads = heads_of(spec), .head_dim = spec.head_dim}, 0);
}

}  // namespace lab
