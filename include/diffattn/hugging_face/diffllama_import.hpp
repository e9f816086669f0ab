#pragma once

// load_diffllama: a checkpoint of Hugging Face's DiffLlamaForCausalLM as a Decoder that can be trained. To run a model
// only, DiffLlama::load (diffllama.hpp) copies no weights and keeps 16-bit ones as they are.
//
//   auto model = load_diffllama<float>("DiffLlama-0.3B-handcut");    train it (AdamW, …)
//   save_diffllama(model, "fine-tuned");                             diffllama_export.hpp
//
// Weights  converted to Scalar, in memory of their own: the files may change or go. The layout is the official one,
//          with Hugging Face's rotary pairs (i, i + d/2) and no norm weight, as DiffLlama has none.
// Heads    of an odd num_key_value_heads every key and value head stands twice (diffllama_layout.hpp), and training
//          moves the two apart.
// Origin   what else the directory says (other fields of config.json, token ids, element types, generation_config.json,
//          the tokenizer) stays with the model, in config().origin, and is written back with it.
// Errors   as DiffLlamaCheckpoint says: FormatError, std::runtime_error.
// Cost     reads all weights once; a Decoder's initial values are drawn before.

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "diffattn/core/matrix.hpp"
#include "diffattn/hugging_face/diffllama_checkpoint.hpp"
#include "diffattn/hugging_face/diffllama_config.hpp"
#include "diffattn/hugging_face/diffllama_layout.hpp"
#include "diffattn/io/safetensors_reader.hpp"
#include "diffattn/layers/arithmetic.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/models/decoder.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

inline DiffLlamaHeads heads_of(const DiffLlamaConfig& config) {
  return {config.num_attention_heads, config.num_key_value_heads};
}

/// What a Decoder with this attention must be to be a checkpoint's model.
template <typename Attention>
DecoderConfig<Attention> decoder_config_of(const DiffLlamaCheckpoint& checkpoint,
                                           Arithmetic arithmetic = Arithmetic::scalar) {
  const DiffLlamaConfig& config = checkpoint.config;
  // Every layer has a table of its own: at most 4M angles.
  const Index most = std::max<Index>(1, (Index{1} << 22) / config.head_dim);
  typename Attention::Config attention{.embed_dim = config.hidden_size, .num_heads = config.num_attention_heads / 2};
  attention.num_kv_heads = heads_of(config).groups();
  attention.head_dim = config.head_dim;
  attention.rotary = RotaryConfig{.base = config.rope_theta,
                                  .pairing = RotaryPairing::half,
                                  .table_positions = std::min({config.max_tokens(), Index{4096}, most}),
                                  .scaling = config.rope_scaling};
  attention.norm_eps = config.rms_norm_eps;
  attention.norm_weight = false;
  attention.bias = config.attention_bias;
  return {.vocab_size = config.vocab_size,
          .num_layers = config.num_hidden_layers,
          .hidden_dim = config.intermediate_size,
          .attention = attention,
          .tied_head = config.tie_word_embeddings,
          .norm_eps = config.rms_norm_eps,
          .arithmetic = arithmetic,
          .origin = checkpoint.origin};
}

/// What transformers calls a parameter of a Decoder.
inline std::string diffllama_name(std::string_view name) {
  std::string known = (name.starts_with("lm_head.") ? "" : "model.") + std::string(name);
  if (const std::size_t out = known.find(".out_proj."); out != known.npos) known.replace(out, 10, ".o_proj.");
  return known;
}

}  // namespace detail

/// The model in `directory`, to be trained. A model that does not load leaves nothing behind.
template <typename Scalar>
Decoder<Scalar, MultiheadDiffAttention<Scalar>> load_diffllama(const std::filesystem::path& directory) {
  const DiffLlamaCheckpoint checkpoint(directory);
  const detail::DiffLlamaHeads heads = detail::heads_of(checkpoint.config);
  const std::vector<Index> queries = heads.queries(), keys = heads.keys();
  using Model = Decoder<Scalar, MultiheadDiffAttention<Scalar>>;
  Model model(detail::decoder_config_of<MultiheadDiffAttention<Scalar>>(checkpoint));
  visit_parameters(model, [&](std::string_view own_name, auto& parameter) {
    const std::string name = checkpoint.stored_name(detail::diffllama_name(own_name));
    const Safetensors& file = checkpoint.tensors.file_of(name);
    const auto in_order_of = [&](const std::vector<Index>& order) {
      if constexpr (std::remove_reference_t<decltype(parameter)>::IsVectorAtCompileTime) {
        detail::gather_heads(parameter, file.vector<Scalar>(name), order, checkpoint.config.head_dim);
      } else {
        detail::gather_heads(parameter, file.matrix<Scalar>(name), order, checkpoint.config.head_dim);
      }
    };
    if (own_name.find(".q_proj.") != own_name.npos) return in_order_of(queries);
    if (own_name.find(".k_proj.") != own_name.npos) return in_order_of(keys);
    if (own_name.find(".v_proj.") != own_name.npos) return in_order_of(keys);
    file.read(name, parameter.data());
  });
  return model;
}

}  // namespace diffattn::inline v0_1
