#pragma once

// The config.json of a DiffLlama checkpoint, as Hugging Face's transformers 5 reads it: every field that changes what a
// model computes is read as it reads it, or refused with what to do instead.
//
//   DiffLlamaConfig config = DiffLlamaConfig::parse(text, "config.json");
//   config.to_json()                                        what transformers reads
//
// Fields that are absent or null have the defaults of transformers' DiffLlamaConfig. num_attention_heads counts both
// maps and is twice the number of differential heads. The rotary embedding stands in rope_theta and rope_scaling or in
// rope_parameters (detail/rope_fields.hpp says which counts); its kinds are default, linear, dynamic, llama3, yarn,
// longrope and proportional.
//
// Errors   FormatError naming the file and the field: no JSON, a value of the wrong type or out of range, head counts
//          that do not divide, sizes whose product overflows, a model_type, hidden_act or rope type that is not known,
//          and what this model has not: windows, attention that is not causal, quantized weights. Anybody may have
//          written the file, so nothing is believed before it is checked.

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/hugging_face/detail/config_fields.hpp"
#include "diffattn/hugging_face/detail/rope_fields.hpp"
#include "diffattn/io/json_document.hpp"
#include "diffattn/layers/rotary.hpp"

namespace diffattn::inline v0_1 {

struct DiffLlamaConfig {
  Index vocab_size = 32000;
  Index hidden_size = 2048;
  Index intermediate_size = 8192;
  Index num_hidden_layers = 16;
  Index num_attention_heads = 32;  ///< of both maps
  Index num_key_value_heads = 32;  ///< divides num_attention_heads; may be odd
  Index head_dim = 64;
  Index max_position_embeddings = 2048;
  double rms_norm_eps = 1e-5;
  bool tie_word_embeddings = false;
  bool attention_bias = false;
  double rope_theta = 10000;
  RotaryScaling rope_scaling{};
  std::vector<Index> eos_token_ids{};  ///< those that the file has, as transformers' generate takes them
  double initializer_range = 0.02;
  double lambda_std_dev = 0.1;

  /// How many tokens a sequence may have. Linear scaling stretches the positions that the model was trained on, dynamic
  /// scaling adapts to any length, the others reach as far as the model was made for.
  Index max_tokens() const {
    using Kind = RotaryScaling::Kind;
    const RotaryScaling& s = rope_scaling;
    const auto positions = static_cast<double>(max_position_embeddings), largest = static_cast<double>(kLargest);
    if (s.kind == Kind::dynamic) return kLargest;
    if (s.kind == Kind::none || s.kind == Kind::proportional) return max_position_embeddings;
    const double reach = (s.kind == Kind::linear ? positions : s.context) * s.factor;
    return static_cast<Index>(std::clamp(reach, positions, largest));
  }

  /// From the text of a config.json; `file` names it in errors. Throws FormatError as said above.
  static DiffLlamaConfig parse(const std::string& text, const std::string& file);

  /// What transformers calls a type in which weights may be stored.
  template <typename T>
  static const char* torch_dtype() {
    return std::is_same_v<T, double>            ? "float64"
           : std::is_same_v<T, float>           ? "float32"
           : std::is_same_v<T, Eigen::bfloat16> ? "bfloat16"
                                                : "float16";
  }

  /// In the old spelling, which every version of transformers reads. `dtype` is what the weights are stored as.
  std::string to_json(const std::string& dtype = "float32") const;

  /// No count in a file may be larger: products of two of them fit an Index, with room.
  static constexpr Index kLargest = detail::kLargestCount;
};

namespace detail {

/// Refuses what transformers would compute with and this library cannot.
inline void check_supported(const ConfigFields& fields, Index max_position_embeddings) {
  using Type = JsonDocument::Type;
  if (const std::string act = fields.text("hidden_act", "silu"); act != "silu" && act != "swish") {
    fields.fail("hidden_act", in_quotes(act) + " is not supported, must be \"silu\" (or \"swish\", which is the same)");
  }
  for (const char* const key : {"quantization_config", "compression_config"}) {
    if (fields.find(key) == nullptr) continue;
    fields.fail(key, "is not supported: save the model dequantized (model.dequantize() in transformers), as bfloat16");
  }
  for (const char* const key : {"sliding_window", "attention_chunk_size"}) {
    if (fields.number(key, static_cast<double>(max_position_embeddings)) <
        static_cast<double>(max_position_embeddings)) {
      fields.fail(key, "is not supported: DiffLlama attends to all tokens; remove it if the model was trained so");
    }
  }
  if (fields.has("is_causal") && !fields.boolean("is_causal", false)) {
    fields.fail("is_causal", "must be true: attention to later tokens is not supported");
  }
  if (fields.number("num_kv_shared_layers", 0) != 0) fields.fail("num_kv_shared_layers", "must be 0");
  if (const auto* const types = fields.find("layer_types")) {
    if (types->type != Type::list) fields.fail("layer_types", "a list", *types);
    fields.json().for_each(*types, [&](const JsonDocument::Value& type) {
      if (type.text != "full_attention") fields.fail("layer_types", "all \"full_attention\"", type);
    });
  }
  if (const std::string weights = fields.text("transformers_weights", "model.safetensors");
      weights != "model.safetensors") {
    fields.fail("transformers_weights",
                in_quotes(weights) + " is not supported: call the file model.safetensors and remove this field");
  }
}

/// A config.json without model_type is DiffLlama's if it says so in architectures.
inline void check_model_type(const ConfigFields& fields) {
  if (fields.find("model_type") == nullptr) {
    bool named = false;
    if (const auto* const names = fields.find("architectures")) {
      fields.json().for_each(*names, [&](const JsonDocument::Value& name) {
        named = named || std::string_view(name.text).substr(0, 9) == "DiffLlama";
      });
    }
    if (!named) fields.fail("model_type", "is missing, must be \"diffllama\"");
  } else if (const std::string type = fields.text("model_type", ""); type != "diffllama") {
    fields.fail("model_type", in_quotes(type) + " is not known, must be \"diffllama\"");
  }
}

/// What stands by itself: sizes, switches and numbers.
inline void read_sizes(DiffLlamaConfig& config, const ConfigFields& fields) {
  config.vocab_size = fields.count("vocab_size", config.vocab_size);
  config.hidden_size = fields.count("hidden_size", config.hidden_size);
  config.intermediate_size = fields.count("intermediate_size", config.intermediate_size);
  config.num_hidden_layers = fields.count("num_hidden_layers", config.num_hidden_layers);
  config.num_attention_heads = fields.count("num_attention_heads", config.num_attention_heads);
  config.num_key_value_heads = fields.count("num_key_value_heads", config.num_attention_heads);
  config.max_position_embeddings = fields.count("max_position_embeddings", config.max_position_embeddings);
  config.rms_norm_eps = fields.number("rms_norm_eps", config.rms_norm_eps);
  config.tie_word_embeddings = fields.boolean("tie_word_embeddings", config.tie_word_embeddings);
  config.attention_bias = fields.boolean("attention_bias", config.attention_bias);
  config.initializer_range = fields.number("initializer_range", config.initializer_range);
  config.lambda_std_dev = fields.number("lambda_std_dev", config.lambda_std_dev);
}

/// The heads and their width; every weight matrix must have a size that an Index holds.
inline void read_heads(DiffLlamaConfig& config, const ConfigFields& fields) {
  const Index heads = config.num_attention_heads, kv_heads = config.num_key_value_heads;
  if (heads % 2 != 0) fields.fail("num_attention_heads", "must be even, got " + std::to_string(heads));
  if (heads % kv_heads != 0) {
    fields.fail("num_key_value_heads",
                "= " + std::to_string(kv_heads) + " must divide num_attention_heads = " + std::to_string(heads));
  }
  if (fields.find("head_dim") == nullptr && config.hidden_size < heads) {
    fields.fail("num_attention_heads", "= " + std::to_string(heads) + " must be at most hidden_size = " +
                                           std::to_string(config.hidden_size) + ", as no head_dim is given");
  }
  config.head_dim = fields.count("head_dim", config.hidden_size / heads);
  if (config.head_dim % 2 != 0) fields.fail("head_dim", "must be even, got " + std::to_string(config.head_dim));
  const double rows = static_cast<double>(heads) * static_cast<double>(config.head_dim);
  if (rows * static_cast<double>(config.hidden_size) > 0x1p59) {
    fields.fail("num_attention_heads", "x head_dim x hidden_size is too large: " + std::to_string(heads) + " x " +
                                           std::to_string(config.head_dim) + " x " +
                                           std::to_string(config.hidden_size));
  }
}

}  // namespace detail

inline DiffLlamaConfig DiffLlamaConfig::parse(const std::string& text, const std::string& file) {
  const detail::JsonDocument json(text, file);
  if (json.root().type != detail::JsonDocument::Type::object) {
    throw FormatError(file + ": is not valid JSON: an object is expected");
  }
  const detail::ConfigFields fields(json, json.root(), file);
  detail::check_model_type(fields);

  DiffLlamaConfig config;
  detail::read_sizes(config, fields);
  detail::read_heads(config, fields);
  if (!(config.rms_norm_eps >= 0) || !std::isfinite(config.rms_norm_eps)) {
    fields.fail("rms_norm_eps", "must not be negative, got " + std::to_string(config.rms_norm_eps));
  }
  detail::check_supported(fields, config.max_position_embeddings);
  detail::RopeFields rope = detail::read_rope(fields, config.head_dim, config.max_position_embeddings);
  config.rope_theta = rope.theta;
  config.rope_scaling = std::move(rope.scaling);
  config.eos_token_ids = fields.token_ids("eos_token_id");
  return config;
}

inline std::string DiffLlamaConfig::to_json(const std::string& dtype) const {
  std::string text = "{\n  \"architectures\": [\"DiffLlamaForCausalLM\"],\n  \"model_type\": \"diffllama\"";
  const auto add = [&](const char* key, const std::string& value) {
    text += ",\n  \"" + std::string(key) + "\": " + value;
  };
  const auto count = [&](const char* key, Index value) { add(key, std::to_string(value)); };
  const auto number = [&](const char* key, double value) { add(key, nlohmann::json(value).dump()); };
  const auto boolean = [&](const char* key, bool value) { add(key, value ? "true" : "false"); };
  count("vocab_size", vocab_size);
  count("hidden_size", hidden_size);
  count("intermediate_size", intermediate_size);
  count("num_hidden_layers", num_hidden_layers);
  count("num_attention_heads", num_attention_heads);
  count("num_key_value_heads", num_key_value_heads);
  count("head_dim", head_dim);
  add("hidden_act", "\"silu\"");
  count("max_position_embeddings", max_position_embeddings);
  number("initializer_range", initializer_range);
  number("rms_norm_eps", rms_norm_eps);
  boolean("use_cache", true);
  boolean("tie_word_embeddings", tie_word_embeddings);
  number("rope_theta", rope_theta);
  add("rope_scaling", detail::rope_scaling_json(rope_scaling));
  boolean("attention_bias", attention_bias);
  number("attention_dropout", 0);
  number("lambda_std_dev", lambda_std_dev);
  add("torch_dtype", detail::in_quotes(dtype));
  add("bos_token_id", "null");
  std::string eos;
  for (const Index id : eos_token_ids) eos += (eos.empty() ? "" : ", ") + std::to_string(id);
  add("eos_token_id", eos_token_ids.empty() ? "null" : eos_token_ids.size() == 1 ? eos : "[" + eos + "]");
  add("pad_token_id", "null");
  return text + "\n}\n";
}

}  // namespace diffattn::inline v0_1
