#pragma once

// The rotary embedding of a config.json, as transformers 5 reads it (configuration_utils.py, modeling_rope_utils.py):
//
//   rope_scaling, unless null or {}, hides rope_parameters; the other spelling is not looked at
//   rope_theta             in that object, or else at top level, or else 10000
//   rope_type              or else its older name, type
//   original_max_position_embeddings, partial_rotary_factor      at top level, or else in that object
//
// Tested by tests/hugging_face/diffllama_config_test.cpp.

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "diffattn/core/matrix.hpp"
#include "diffattn/hugging_face/detail/config_fields.hpp"
#include "diffattn/io/json_document.hpp"
#include "diffattn/layers/rotary.hpp"

namespace diffattn::inline v0_1::detail {

struct RopeFields {
  double theta = 10000;
  RotaryScaling scaling{};
};

/// Which of the two spellings counts, or null.
inline const char* rope_spelling(const ConfigFields& fields) {
  for (const char* const key : {"rope_scaling", "rope_parameters"}) {
    const auto* const value = fields.find(key);
    if (value == nullptr) continue;
    if (value->type != JsonDocument::Type::object) fields.fail(key, "an object", *value);
    if (!fields.json().is_empty(*value)) return key;
  }
  return nullptr;
}

/// The share of a head that is turned. transformers' DiffLlama heeds it in no other kind than proportional, where
/// other shares than 1 do not fit its heads.
inline double rotary_proportion(const ConfigFields& fields, const ConfigFields& rope, Index head_dim,
                                RotaryScaling::Kind kind) {
  const ConfigFields& where = fields.find("partial_rotary_factor") != nullptr ? fields : rope;
  const double share = where.number("partial_rotary_factor", 1);
  const double width = static_cast<double>(head_dim);
  if (kind == RotaryScaling::Kind::none) return 1;
  if (kind != RotaryScaling::Kind::proportional && std::trunc(width * share) != width) {
    where.fail("partial_rotary_factor", "must be 1, got " + std::to_string(share));
  }
  if (!(share >= 0 && share <= 1)) {
    where.fail("partial_rotary_factor", "must be from 0 to 1, got " + std::to_string(share));
  }
  return share;
}

inline double original_length(const ConfigFields& fields, const ConfigFields& rope, Index max_position_embeddings) {
  constexpr const char* kKey = "original_max_position_embeddings";
  const ConfigFields& where = fields.find(kKey) != nullptr ? fields : rope;
  const double length = where.positive(kKey, static_cast<double>(max_position_embeddings));
  if (length < 1) where.fail(kKey, "must be at least 1, got " + std::to_string(length));
  return length;
}

inline void read_yarn(RotaryScaling& scaling, const ConfigFields& rope, double theta) {
  if (theta == 1) rope.fail("rope_theta", "must not be 1 for yarn");
  const auto beta = [&](const char* key, double usual) {
    return rope.number(key, usual) == 0 ? usual : rope.positive(key, usual);
  };
  scaling.beta_fast = beta("beta_fast", 32);
  scaling.beta_slow = beta("beta_slow", 1);
  scaling.truncate = rope.has("truncate") ? rope.boolean("truncate", false) : true;
  const double mscale = rope.number("mscale", 0), all_dim = rope.number("mscale_all_dim", 0);
  if (!scaling.attention_factor && mscale != 0 && all_dim != 0) {
    const auto mean = [&](double m) { return scaling.factor <= 1 ? 1 : 0.1 * m * std::log(scaling.factor) + 1; };
    scaling.attention_factor = mean(mscale) / mean(all_dim);
    if (!std::isfinite(*scaling.attention_factor)) rope.fail("mscale_all_dim", "makes the attention factor infinite");
  }
}

/// What `rope` says of itself in rope_type, or type as older files have it. Throws for one that is not known.
inline RotaryScaling::Kind rope_kind(const ConfigFields& rope) {
  using Kind = RotaryScaling::Kind;
  const char* const type_key = rope.find("rope_type") != nullptr ? "rope_type" : "type";
  const std::string type = rope.text(type_key, "default");
  constexpr std::pair<const char*, Kind> kKinds[] = {{"default", Kind::none},
                                                     {"linear", Kind::linear},
                                                     {"dynamic", Kind::dynamic},
                                                     {"llama3", Kind::llama3},
                                                     {"yarn", Kind::yarn},
                                                     {"longrope", Kind::longrope},
                                                     {"proportional", Kind::proportional}};
  const auto* const kind =
      std::find_if(std::begin(kKinds), std::end(kKinds), [&](const auto& k) { return type == k.first; });
  if (kind == std::end(kKinds)) {
    rope.fail(type_key, in_quotes(type) +
                            " is not known (known: default, linear, dynamic, llama3, yarn, longrope, proportional)");
  }
  return kind->second;
}

/// `fields`: the whole config.json.
inline RopeFields read_rope(const ConfigFields& fields, Index head_dim, Index max_position_embeddings) {
  using Kind = RotaryScaling::Kind;
  RopeFields result;
  result.theta = fields.positive("rope_theta", result.theta);
  const char* const spelling = rope_spelling(fields);
  if (spelling == nullptr) return result;

  const ConfigFields rope = fields.object(spelling);
  fields.json().for_each(*fields.find(spelling), [&](const JsonDocument::Value& child) {
    if (child.type != JsonDocument::Type::object) return;
    fields.fail(spelling, "has an object " + in_quotes(child.key) +
                              ", but the layers of DiffLlama share one rotary embedding: put its fields in " +
                              spelling);
  });
  result.theta = rope.positive("rope_theta", result.theta);
  RotaryScaling& scaling = result.scaling;
  scaling.kind = rope_kind(rope);
  scaling.proportion = rotary_proportion(fields, rope, head_dim, scaling.kind);
  if (scaling.kind == Kind::none) return result;
  if (scaling.kind == Kind::proportional) {
    scaling.factor = rope.positive("factor", 1);
    return result;
  }
  scaling.proportion = 1;
  if (scaling.kind == Kind::linear || scaling.kind == Kind::dynamic) {
    scaling.factor = rope.required_positive("factor");
    if (scaling.kind == Kind::linear) return result;
    scaling.context = static_cast<double>(max_position_embeddings);
    if (head_dim == 2) fields.fail("head_dim", "must be at least 4 for dynamic scaling, got 2");
    return result;
  }

  scaling.context = original_length(fields, rope, max_position_embeddings);
  if (scaling.kind == Kind::llama3) {
    scaling.factor = rope.required_positive("factor");
    scaling.low_freq_factor = rope.required_positive("low_freq_factor");
    scaling.high_freq_factor = rope.required_positive("high_freq_factor");
    return result;
  }
  if (scaling.kind == Kind::yarn && !rope.has("factor")) rope.fail("factor", "is missing");
  scaling.factor = rope.positive("factor", static_cast<double>(max_position_embeddings) / scaling.context);
  if (rope.find("attention_factor") != nullptr) {
    scaling.attention_factor = rope.number("attention_factor", 1);
    if (!std::isfinite(*scaling.attention_factor)) rope.fail("attention_factor", "must be finite");
  }
  if (scaling.kind == Kind::yarn) {
    read_yarn(scaling, rope, result.theta);
  } else {
    scaling.short_factors = rope.required_positives("short_factor", head_dim / 2);
    scaling.long_factors = rope.required_positives("long_factor", head_dim / 2);
    if (scaling.context == 1 && !scaling.attention_factor) {
      rope.fail("original_max_position_embeddings", "must be more than 1 for longrope");
    }
  }
  return result;
}

/// A number as JSON has it.
inline std::string json_number(double value) {
  const bool whole = std::abs(value) < 0x1p53 && std::trunc(value) == value;
  return whole ? std::to_string(static_cast<Index>(value)) : nlohmann::json(value).dump();
}

/// rope_scaling of a config.json.
inline std::string rope_scaling_json(const RotaryScaling& s) {
  using Kind = RotaryScaling::Kind;
  std::string text;
  const auto add = [&](const char* key, const std::string& value) {
    text += (text.empty() ? "" : ", ") + ("\"" + std::string(key) + "\": ") + value;
  };
  const auto add_list = [&](const char* key, const std::vector<double>& values) {
    std::string list;
    for (const double value : values) list += (list.empty() ? "" : ", ") + nlohmann::json(value).dump();
    add(key, "[" + list + "]");
  };
  const auto real = [](double value) { return nlohmann::json(value).dump(); };
  switch (s.kind) {
    case Kind::none:
      return "null";
    case Kind::linear:
      add("rope_type", "\"linear\"");
      break;
    case Kind::dynamic:
      add("rope_type", "\"dynamic\"");
      break;
    case Kind::llama3:
      add("rope_type", "\"llama3\"");
      add("low_freq_factor", real(s.low_freq_factor));
      add("high_freq_factor", real(s.high_freq_factor));
      break;
    case Kind::yarn:
      add("rope_type", "\"yarn\"");
      add("beta_fast", real(s.beta_fast));
      add("beta_slow", real(s.beta_slow));
      add("truncate", s.truncate ? "true" : "false");
      break;
    case Kind::longrope:
      add("rope_type", "\"longrope\"");
      add_list("short_factor", s.short_factors);
      add_list("long_factor", s.long_factors);
      break;
    case Kind::proportional:
      add("rope_type", "\"proportional\"");
      add("partial_rotary_factor", real(s.proportion));
  }
  add("factor", real(s.factor));
  if (s.attention_factor) add("attention_factor", real(*s.attention_factor));
  if (s.kind == Kind::llama3 || s.kind == Kind::yarn || s.kind == Kind::longrope) {
    add("original_max_position_embeddings", json_number(s.context));
  }
  return "{" + text + "}";
}

}  // namespace diffattn::inline v0_1::detail
