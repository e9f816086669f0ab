#pragma once

// Writes a Differential Transformer as a Hugging Face DiffLlama checkpoint, which DiffLlama::load and transformers
// read: config.json and model.safetensors.
//
//   Decoder<float, MultiheadDiffAttention<float>> model(…);    trained
//   save_diffllama(model, directory, {.max_position_embeddings = 256});
//
// Heads and rotary pairs are put into their order and the head norm's weight is multiplied into o_proj
// (diffllama_layout.hpp): the same function of the tokens, to rounding.
//
// The two files are one thing: each carries the same diffattn_save_id, computed from both, which transformers ignores
// and loading compares. Whatever interrupts a save, kill and loss of power included, DiffLlama::load gives the old
// model or the new one; several may save to one directory at a time, and others load meanwhile. To change a field of
// config.json by hand, leave its diffattn_save_id as it is. Files that end in .unfinished are of processes that were
// killed; once a later save is done, they can be deleted.
//
// Errors   std::invalid_argument for what DiffLlama does not have: no rotary embedding or one that turns a part of a
//          head, a λ_init of one's own, two different norm_eps. std::runtime_error if a file cannot be written: what
//          was in the directory is as it was.

#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/hugging_face/diffllama_config.hpp"
#include "diffattn/hugging_face/diffllama_layout.hpp"
#include "diffattn/io/checkpoint_directory.hpp"
#include "diffattn/io/safetensors.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/models/decoder.hpp"

namespace diffattn::inline v0_1 {

/// What a checkpoint says beside the shapes of its model.
struct DiffLlamaExportOptions {
  Index max_position_embeddings = 2048;  ///< the longest sequence that it is made for
  std::vector<Index> eos_token_ids{};    ///< of what ends a text
};

namespace detail {

/// The config.json of a model. Throws std::invalid_argument for what DiffLlama does not have.
template <typename Scalar>
DiffLlamaConfig diffllama_config_of(const Decoder<Scalar, MultiheadDiffAttention<Scalar>>& model,
                                    const DiffLlamaExportOptions& options) {
  const auto& decoder = model.config();
  const auto& attention = model.blocks.front().attention.config();
  if (!attention.rotary) throw_invalid({"save_diffllama: DiffLlama has a rotary embedding, the model has none"});
  if (attention.lambda_init) throw_invalid({"save_diffllama: DiffLlama has the lambda_init of the layer's depth"});
  if (attention.norm_eps != decoder.norm_eps) {
    throw_invalid({"save_diffllama: DiffLlama has one norm_eps, attention and decoder have two"});
  }
  DiffLlamaConfig config;
  config.vocab_size = decoder.vocab_size;
  config.hidden_size = attention.embed_dim;
  config.intermediate_size = decoder.hidden_dim;
  config.num_hidden_layers = decoder.num_layers;
  config.num_attention_heads = 2 * attention.num_heads;
  config.num_key_value_heads = 2 * attention.num_kv_heads;
  config.head_dim = attention.head_dim;
  config.max_position_embeddings = options.max_position_embeddings;
  config.rms_norm_eps = decoder.norm_eps;
  config.tie_word_embeddings = decoder.tied_head;
  config.attention_bias = attention.bias;
  config.rope_theta = attention.rotary->base;
  config.rope_scaling = attention.rotary->scaling;
  config.eos_token_ids = options.eos_token_ids;
  return config;
}

}  // namespace detail

/// Writes config.json and model.safetensors of `model` into `directory`, which is made if it is not there. Holds a copy
/// of the weights while it writes.
template <typename Scalar>
void save_diffllama(const Decoder<Scalar, MultiheadDiffAttention<Scalar>>& model,
                    const std::filesystem::path& directory, const DiffLlamaExportOptions& options = {}) {
  const DiffLlamaConfig config = detail::diffllama_config_of(model, options);
  SafetensorsWriter writer(std::map<std::string, std::string>{{"format", "pt"}});
  visit_parameters(model, [&](std::string_view name, const auto& parameter) {
    if (name.find("self_attn.") != name.npos) return;  // in their layout, below
    const bool is_head = name.starts_with("lm_head.");
    writer.add((is_head ? "" : "model.") + std::string(name), parameter);
  });
  for (std::size_t layer = 0; layer < model.blocks.size(); ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".self_attn.";
    const DiffLlamaAttention<Scalar> theirs(model.blocks[layer].attention);
    visit_parameters(theirs, [&](std::string_view name, const auto& parameter) {
      writer.add(prefix + std::string(name), parameter);
    });
  }
  detail::save_checkpoint_directory(directory, std::move(writer),
                                    config.to_json(DiffLlamaConfig::torch_dtype<Scalar>()));
}

}  // namespace diffattn::inline v0_1
