#pragma once

// The config.json of a DiffLlama checkpoint, as Hugging Face's transformers writes it, in the old spelling of the
// rotary embedding (rope_theta, rope_scaling) and the new one (rope_parameters).
//
//   DiffLlamaConfig config = DiffLlamaConfig::parse(text, "config.json");
//   config.to_json()                                        what transformers reads
//
// Fields that are absent or null have the defaults of transformers' DiffLlamaConfig. num_attention_heads counts both
// maps and is twice the number of differential heads.
//
// Errors   FormatError naming the file and the field: no JSON, a value of the wrong type or out of range, head counts
// that
//          do not divide, a model_type, hidden_act or rope type that is not known. Anybody may have written the file,
//          so nothing is believed before it is checked.

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/io/detail/json.hpp"
#include "diffattn/io/detail/safetensors_header.hpp"
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
  std::vector<Index> eos_token_ids{2};  ///< none if the file says null
  double initializer_range = 0.02;
  double lambda_std_dev = 0.1;

  /// How many tokens a sequence may have. Linear scaling stretches the positions that the model was trained on, dynamic
  /// scaling adapts to any length.
  Index max_tokens() const {
    if (rope_scaling.kind == RotaryScaling::Kind::dynamic) return kLargest;
    if (rope_scaling.kind != RotaryScaling::Kind::linear) return max_position_embeddings;
    return static_cast<Index>(static_cast<double>(max_position_embeddings) * rope_scaling.factor);
  }

  /// `file` names the text in errors.
  static DiffLlamaConfig parse(const std::string& text, const std::string& file);

  /// In the old spelling, which every version of transformers reads. `dtype` is what the weights are stored as.
  std::string to_json(const std::string& dtype = "float32") const;

  /// No count in a file may be larger: products of two of them fit an Index, with room.
  static constexpr Index kLargest = Index{1} << 28;

 private:
  std::string rope_scaling_json() const;
};

namespace detail {

/// Reads the fields of one JSON object, each checked as it is read.
class ConfigFields {
 public:
  ConfigFields(const nlohmann::json& object, std::string file, std::string prefix = "")
      : object_(object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  [[noreturn, gnu::cold, gnu::noinline]] void fail(const char* key, const std::string& why) const {
    throw FormatError(file_ + ": " + prefix_ + key + " " + why);
  }
  [[noreturn, gnu::cold, gnu::noinline]] void fail(const char* key, const char* expected,
                                                   const nlohmann::json& value) const {
    std::string shown = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    if (shown.size() > 80) shown = shown.substr(0, 80) + "…";
    fail(key, std::string("must be ") + expected + ", got " + shown);
  }

  /// The value, or null if it is absent or null.
  const nlohmann::json* find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  Index count(const char* key, Index otherwise) const {
    const nlohmann::json* const value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_number_integer() || *value < 1 || *value > DiffLlamaConfig::kLargest) {
      fail(key, "a whole number from 1 to 2^28", *value);
    }
    return value->get<Index>();
  }
  double number(const char* key, double otherwise) const {
    const nlohmann::json* const value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_number()) fail(key, "a number", *value);
    return value->get<double>();
  }
  double positive(const char* key, double otherwise) const {
    const double value = number(key, otherwise);
    if (!(value > 0) || !std::isfinite(value)) fail(key, "must be a positive number, got " + std::to_string(value));
    return value;
  }
  double at_least(const char* key, double least) const {
    if (find(key) == nullptr) fail(key, "is missing");
    const double value = number(key, least);
    if (!(value >= least) || !std::isfinite(value)) {
      fail(key, "must be a number, at least " + std::to_string(least) + ", got " + std::to_string(value));
    }
    return value;
  }
  bool boolean(const char* key, bool otherwise) const {
    const nlohmann::json* const value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) fail(key, "true or false", *value);
    return value->get<bool>();
  }
  std::string text(const char* key, const char* otherwise) const {
    const nlohmann::json* const value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_string()) fail(key, "a string", *value);
    return value->get<std::string>();
  }

 private:
  const nlohmann::json& object_;
  std::string file_, prefix_;
};

/// The rotary embedding in either spelling; `config` has its other fields already.
inline void read_rope(DiffLlamaConfig& config, const ConfigFields& fields, const std::string& file) {
  using Kind = RotaryScaling::Kind;
  config.rope_theta = fields.positive("rope_theta", config.rope_theta);
  const char* const spelling = fields.find("rope_parameters") != nullptr ? "rope_parameters" : "rope_scaling";
  const nlohmann::json* const rope = fields.find(spelling);
  if (rope == nullptr) return;
  if (!rope->is_object()) fields.fail(spelling, "an object", *rope);

  const ConfigFields parameters(*rope, file, std::string(spelling) + ".");
  config.rope_theta = parameters.positive("rope_theta", config.rope_theta);
  const char* const type_key = parameters.find("rope_type") != nullptr ? "rope_type" : "type";
  const std::string type = parameters.text(type_key, "default");
  RotaryScaling& scaling = config.rope_scaling;
  if (type == "default") return;
  if (type == "linear") {
    scaling.kind = Kind::linear;
    scaling.factor = parameters.at_least("factor", 1);
  } else if (type == "dynamic") {
    scaling.kind = Kind::dynamic;
    scaling.factor = parameters.at_least("factor", 1);
    scaling.context = static_cast<double>(config.max_position_embeddings);
    if (config.head_dim == 2) fields.fail("head_dim", "must be at least 4 for dynamic scaling, got 2");
  } else if (type == "llama3") {
    scaling.kind = Kind::llama3;
    scaling.factor = parameters.at_least("factor", 1);
    scaling.context = parameters.at_least("original_max_position_embeddings", 1);
    scaling.low_freq_factor = parameters.at_least("low_freq_factor", 0);
    scaling.high_freq_factor = parameters.at_least("high_freq_factor", 0);
    if (!(scaling.low_freq_factor > 0)) parameters.fail("low_freq_factor", "must be positive, got 0");
    if (!(scaling.high_freq_factor > scaling.low_freq_factor)) {
      parameters.fail("high_freq_factor", "must be more than low_freq_factor");
    }
  } else {
    parameters.fail(type_key, in_quotes(type) + " is not known (known: default, linear, dynamic, llama3)");
  }
}

}  // namespace detail

inline DiffLlamaConfig DiffLlamaConfig::parse(const std::string& text, const std::string& file) {
  const std::string complaint = file + ": is not valid JSON: ";
  const detail::JsonTree tree(text, complaint);
  const nlohmann::json& json = tree.root();
  if (!json.is_object()) throw FormatError(complaint + "an object is expected");

  const detail::ConfigFields fields(json, file);
  if (fields.find("model_type") == nullptr) fields.fail("model_type", "is missing, must be \"diffllama\"");
  if (const std::string type = fields.text("model_type", ""); type != "diffllama") {
    fields.fail("model_type", detail::in_quotes(type) + " is not known, must be \"diffllama\"");
  }
  if (const std::string act = fields.text("hidden_act", "silu"); act != "silu" && act != "swish") {
    fields.fail("hidden_act", detail::in_quotes(act) + " is not known, must be \"silu\"");
  }

  DiffLlamaConfig config;
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

  const Index heads = config.num_attention_heads, kv_heads = config.num_key_value_heads;
  if (heads % 2 != 0) fields.fail("num_attention_heads", "must be even, got " + std::to_string(heads));
  if (heads % kv_heads != 0) {
    fields.fail("num_key_value_heads",
                "= " + std::to_string(kv_heads) + " must divide num_attention_heads = " + std::to_string(heads));
  }
  if (fields.find("head_dim") == nullptr && config.hidden_size % heads != 0) {
    fields.fail("num_attention_heads", "= " + std::to_string(heads) + " must divide hidden_size = " +
                                           std::to_string(config.hidden_size) + ", as no head_dim is given");
  }
  config.head_dim = fields.count("head_dim", std::max<Index>(1, config.hidden_size / heads));
  if (config.head_dim % 2 != 0) fields.fail("head_dim", "must be even, got " + std::to_string(config.head_dim));
  if (!(config.rms_norm_eps >= 0) || !std::isfinite(config.rms_norm_eps)) {
    fields.fail("rms_norm_eps", "must not be negative, got " + std::to_string(config.rms_norm_eps));
  }
  if (fields.number("partial_rotary_factor", 1) != 1) fields.fail("partial_rotary_factor", "must be 1");
  detail::read_rope(config, fields, file);

  if (const auto eos = json.find("eos_token_id"); eos != json.end()) {
    config.eos_token_ids.clear();
    const auto add = [&](const nlohmann::json& id) {
      if (!id.is_number_integer() || id < 0 || id > kLargest) fields.fail("eos_token_id", "token ids", *eos);
      config.eos_token_ids.push_back(id.get<Index>());
    };
    if (eos->is_array()) {
      for (const nlohmann::json& id : *eos) add(id);
    } else if (!eos->is_null()) {
      add(*eos);
    }
  }
  return config;
}

inline std::string DiffLlamaConfig::to_json(const std::string& dtype) const {
  detail::JsonObjectText json;
  json.add_json("architectures", "[\"DiffLlamaForCausalLM\"]");
  json.add("model_type", "diffllama");
  json.add("vocab_size", vocab_size);
  json.add("hidden_size", hidden_size);
  json.add("intermediate_size", intermediate_size);
  json.add("num_hidden_layers", num_hidden_layers);
  json.add("num_attention_heads", num_attention_heads);
  json.add("num_key_value_heads", num_key_value_heads);
  json.add("head_dim", head_dim);
  json.add("hidden_act", "silu");
  json.add("max_position_embeddings", max_position_embeddings);
  json.add("initializer_range", initializer_range);
  json.add("rms_norm_eps", rms_norm_eps);
  json.add("use_cache", true);
  json.add("tie_word_embeddings", tie_word_embeddings);
  json.add("rope_theta", rope_theta);
  json.add_json("rope_scaling", rope_scaling_json());
  json.add("attention_bias", attention_bias);
  json.add("attention_dropout", 0.0);
  json.add("lambda_std_dev", lambda_std_dev);
  json.add("torch_dtype", dtype);
  json.add("bos_token_id", nullptr);
  if (eos_token_ids.size() == 1) {
    json.add("eos_token_id", eos_token_ids.front());
  } else {
    std::string ids;
    for (const Index id : eos_token_ids) ids += (ids.empty() ? "[" : ", ") + std::to_string(id);
    json.add_json("eos_token_id", ids.empty() ? "null" : ids + "]");
  }
  json.add("pad_token_id", nullptr);
  return json.text() + "\n";
}

inline std::string DiffLlamaConfig::rope_scaling_json() const {
  using Kind = RotaryScaling::Kind;
  const RotaryScaling& s = rope_scaling;
  detail::JsonObjectText json(2);
  switch (s.kind) {
    case Kind::linear:
      json.add("rope_type", "linear");
      json.add("factor", s.factor);
      break;
    case Kind::dynamic:
      json.add("rope_type", "dynamic");
      json.add("factor", s.factor);
      break;
    case Kind::llama3:
      json.add("rope_type", "llama3");
      json.add("factor", s.factor);
      json.add("low_freq_factor", s.low_freq_factor);
      json.add("high_freq_factor", s.high_freq_factor);
      json.add("original_max_position_embeddings", static_cast<Index>(s.context));
      break;
    default:
      return "null";
  }
  return json.text();
}

}  // namespace diffattn::inline v0_1
