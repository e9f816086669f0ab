#pragma once

// save_diffllama: a Differential Transformer as a Hugging Face DiffLlama checkpoint, which load_diffllama,
// DiffLlama::load and transformers read: config.json and model.safetensors.
//
//   auto model = load_diffllama<float>("pretrained");  …trained…     save_diffllama(model, "fine-tuned");
//   Decoder<float, MultiheadDiffAttention<float>> model(…);          trained from the start
//   save_diffllama(model, directory, {.max_position_embeddings = 256});
//
// Of a model that was loaded, everything is written that was read: each tensor in the element type that it had,
// config.json with all its fields, known or not, generation_config.json and the tokenizer's files. A field changes
// only where the model or an option says otherwise. transformers needs nothing else; of what it does not read (shards,
// other tensors, a README) nothing is copied. Saving over the directory that was loaded is fine; if that was in
// shards, they are not read any more and can be deleted.
//
// Heads and rotary pairs are put into their order and the head norm's weight, which DiffLlama has not, is multiplied
// into o_proj (diffllama_layout.hpp): the same function of the tokens, to rounding. A model that was loaded has
// neither, and if it is not trained the bits are those that were read. An odd num_key_value_heads becomes twice as
// many heads when training has moved the copies of a head apart: DiffLlama has no other way to say that.
//
// The files are one thing: each carries the same diffattn_save_id, computed from all, which transformers ignores and
// loading compares. Whatever interrupts a save, kill and loss of power included, loading gives the old model or the
// new one; several may save to one directory at a time, and others load meanwhile. To change a field of config.json by
// hand, leave its diffattn_save_id as it is. Files that end in .unfinished are of processes that were killed; once a
// later save is done, they can be deleted.
//
// Errors   std::invalid_argument naming the field for what DiffLlama does not have: no rotary embedding or one that
//          turns a part of a head, a λ_init that is not that of the layer's depth, layers that differ, two different
//          norm_eps, noise heads shared by several heads; and for a value that the element type cannot hold.
//          std::runtime_error if a file cannot be written. What was in the directory is then as it was.

#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/hugging_face/detail/exported_config.hpp"
#include "diffattn/hugging_face/diffllama_config.hpp"
#include "diffattn/hugging_face/diffllama_import.hpp"
#include "diffattn/hugging_face/diffllama_layout.hpp"
#include "diffattn/hugging_face/diffllama_origin.hpp"
#include "diffattn/io/checkpoint_directory.hpp"
#include "diffattn/io/safetensors.hpp"
#include "diffattn/layers/lambda.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/models/decoder.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// Throws std::invalid_argument unless all layers have what DiffLlama has.
template <typename Scalar>
void check_exportable(const Decoder<Scalar, MultiheadDiffAttention<Scalar>>& model) {
  const auto& first = model.blocks.front().attention.config();
  if (!first.rotary) throw_invalid({"save_diffllama: DiffLlama has a rotary embedding, the model has none"});
  if (first.lambda_init) throw_invalid({"save_diffllama: DiffLlama has the lambda_init of the layer's depth"});
  if (first.norm_eps != model.config().norm_eps) {
    throw_invalid({"save_diffllama: DiffLlama has one norm_eps, attention and decoder have two"});
  }
  for (std::size_t layer = 0; layer < model.blocks.size(); ++layer) {
    const auto& attention = model.blocks[layer].attention;
    const auto& config = attention.config();
    const auto fail = [&](const char* field, const std::string& is, const std::string& must_be) {
      const std::string message = std::string("save_diffllama: ") + field + " of layer " + std::to_string(layer) +
                                  " is " + is + ", in a DiffLlama it is " + must_be;
      throw_invalid({message.c_str()});
    };
    const auto same = [&](const char* field, auto is, auto must_be) {
      if (is != must_be) fail(field, std::to_string(is), std::to_string(must_be) + ", as in the first layer");
    };
    if constexpr (requires { config.num_noise_heads; }) {
      if (config.num_noise_heads != 0 && config.num_noise_heads != config.num_heads) {
        fail("num_noise_heads", std::to_string(config.num_noise_heads),
             std::to_string(config.num_heads) + ", one for every head");
      }
    }
    same("embed_dim", config.embed_dim, first.embed_dim);
    same("num_heads", config.num_heads, first.num_heads);
    same("num_kv_heads", config.num_kv_heads, first.num_kv_heads);
    same("head_dim", config.head_dim, first.head_dim);
    same("norm_eps", config.norm_eps, first.norm_eps);
    same("bias", config.bias, first.bias);
    const double init = attention.lambda.init, usual = lambda_init(static_cast<double>(layer));
    if (std::abs(init - usual) > 1e-6) {
      fail("lambda_init", std::to_string(init), std::to_string(usual) + ", that of its depth");
    }
    if (!config.rotary) fail("rotary", "left out", "that of the first layer");
    same("rotary.base", config.rotary->base, first.rotary->base);
    if (rope_scaling_json(config.rotary->scaling) != rope_scaling_json(first.rotary->scaling)) {
      fail("rotary.scaling", rope_scaling_json(config.rotary->scaling), rope_scaling_json(first.rotary->scaling));
    }
  }
}

/// The configuration of a model; what the model does not say is that of `config`.
template <typename Scalar>
DiffLlamaConfig exported_sizes(const Decoder<Scalar, MultiheadDiffAttention<Scalar>>& model, DiffLlamaConfig config) {
  const auto& decoder = model.config();
  const auto& attention = model.blocks.front().attention.config();
  config.vocab_size = decoder.vocab_size;
  config.hidden_size = attention.embed_dim;
  config.intermediate_size = decoder.hidden_dim;
  config.num_hidden_layers = decoder.num_layers;
  config.num_attention_heads = 2 * attention.num_heads;
  config.num_key_value_heads = 2 * attention.num_kv_heads;
  config.head_dim = attention.head_dim;
  config.rms_norm_eps = decoder.norm_eps;
  config.tie_word_embeddings = decoder.tied_head;
  config.attention_bias = attention.bias;
  config.rope_theta = attention.rotary->base;
  config.rope_scaling = attention.rotary->scaling;
  return config;
}

/// The even heads of a projection, each of which has its copy behind it; nothing if a copy differs.
template <typename M>
std::optional<M> without_copies(const M& heads, Index d) {
  M single(heads.rows() / 2, heads.cols());
  for (Index row = 0; row < heads.rows(); row += 2 * d) {
    single.middleRows(row / 2, d) = heads.middleRows(row, d);
    // As bits: a NaN is its own copy, and 0 is not that of -0.
    const auto size = static_cast<std::size_t>(d * heads.cols()) * sizeof(typename M::Scalar);
    if (std::memcmp(&heads(row, 0), &heads(row + d, 0), size) != 0) return std::nullopt;
  }
  return single;
}

/// The tensors of a model's attention, in Hugging Face's layout and with their names. With `single_keys`, of an odd
/// number of key and value heads; false if that cannot be.
template <typename Scalar, typename Add>
bool for_each_attention_tensor(const Decoder<Scalar, MultiheadDiffAttention<Scalar>>& model, bool single_keys,
                               Add&& add) {
  bool possible = true;
  for (std::size_t layer = 0; layer < model.blocks.size() && possible; ++layer) {
    const std::string prefix = DiffLlamaCheckpoint::layer_prefix(static_cast<Index>(layer)) + "self_attn.";
    const DiffLlamaAttention<Scalar> theirs(model.blocks[layer].attention);
    const Index d = model.blocks[layer].attention.config().head_dim;
    visit_parameters(theirs, [&](std::string_view name, const auto& parameter) {
      if (!single_keys || (!name.starts_with("k_proj.") && !name.starts_with("v_proj."))) {
        add(prefix + std::string(name), parameter);
      } else if (const auto single = without_copies(parameter, d)) {
        add(prefix + std::string(name), *single);
      } else {
        possible = false;
      }
    });
  }
  return possible;
}

/// Adds a tensor as elements of type `dtype`. Throws std::invalid_argument for a value that they cannot hold.
template <typename Values>
void add_as(Dtype dtype, SafetensorsWriter& writer, const std::string& name, const Values& values) {
  with_type_of(dtype, [&]<typename T>(T) {
    if constexpr (std::is_same_v<T, typename Values::Scalar>) {
      writer.add(name, values);
    } else if constexpr (!std::is_integral_v<T>) {
      const auto stored = values.template cast<T>().eval();
      for (Index i = 0; i < values.size(); ++i) {
        const auto value = static_cast<double>(values.data()[i]);
        if (std::isfinite(value) && !std::isfinite(static_cast<double>(stored.data()[i]))) {
          throw_invalid({"save_diffllama: ", name.c_str(), " holds ", std::to_string(value).c_str(), ", which ",
                         DiffLlamaConfig::torch_dtype<T>(),
                         " cannot: ask for another dtype, Dtype::BF16 for instance"});
        }
      }
      writer.add(name, stored);
    }
  });
}

}  // namespace detail

/// Writes `model` into `directory`, which is made if it is not there. Holds a copy of the weights while it writes.
template <typename Scalar>
void save_diffllama(const Decoder<Scalar, MultiheadDiffAttention<Scalar>>& model,
                    const std::filesystem::path& directory, const DiffLlamaExportOptions& options = {}) {
  detail::check_exportable(model);
  const detail::DiffLlamaOrigin* const origin = detail::origin_of(model.config().origin);
  detail::ExportedConfig exported(origin, options);
  exported.config = detail::exported_sizes(model, exported.config);
  const auto tensors = [&](bool single_keys) -> std::optional<SafetensorsWriter> {
    SafetensorsWriter writer(exported.metadata());
    const auto add = [&](const std::string& name, const auto& parameter) {
      detail::add_as(exported.dtype_of(name, detail::dtype_of<Scalar>()), writer, name, parameter);
    };
    visit_parameters(model, [&](std::string_view name, const auto& parameter) {
      if (name.find(".self_attn.") == name.npos) add(detail::diffllama_name(name), parameter);
    });
    if (!detail::for_each_attention_tensor(model, single_keys, add)) return std::nullopt;
    return writer;
  };
  std::optional<SafetensorsWriter> writer;
  const Index groups = exported.config.num_key_value_heads / 2;
  if (exported.had_key_value_heads() == groups && groups % 2 == 1) writer = tensors(true);
  if (writer) {
    exported.config.num_key_value_heads = groups;
  } else {
    writer = tensors(false);
  }
  exported.save(directory, *std::move(writer), DiffLlamaConfig::torch_dtype<Scalar>());
}

}  // namespace diffattn::inline v0_1
