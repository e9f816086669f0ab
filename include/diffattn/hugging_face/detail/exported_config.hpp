#pragma once

// ExportedConfig: the config.json and generation_config.json of a model that is saved: those that it was loaded with,
// changed where the model or an option says otherwise.
//
// Tested by tests/hugging_face/diffllama_export_test.cpp.

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/hugging_face/diffllama_config.hpp"
#include "diffattn/hugging_face/diffllama_origin.hpp"
#include "diffattn/io/checkpoint_directory.hpp"
#include "diffattn/io/dtype.hpp"
#include "diffattn/io/json_document.hpp"
#include "diffattn/io/json_members.hpp"
#include "diffattn/io/safetensors_writer.hpp"

namespace diffattn::inline v0_1 {

/// What a checkpoint says beside its weights and their shapes. What is left out is as it was read or, for a model that
/// was not loaded, as said here.
struct DiffLlamaExportOptions {
  std::optional<Index> max_position_embeddings{};  ///< the longest sequence that it is made for; 2048
  std::vector<Index> eos_token_ids{};              ///< of what ends a text; none
  std::optional<Index> bos_token_id{};             ///< of what a text begins with; none
  std::optional<Index> pad_token_id{};             ///< of what fills up a batch; none
  std::optional<Dtype> dtype{};                    ///< of all weights: F64, F32, F16 or BF16; the model's own type
};

namespace detail {

class ExportedConfig {
 public:
  /// `origin` may be null. Throws std::invalid_argument for options that cannot be.
  ExportedConfig(const DiffLlamaOrigin* origin, const DiffLlamaExportOptions& options)
      : origin_(origin), options_(options) {
    if (options.dtype && (is_integer(*options.dtype) || !is_readable(*options.dtype))) {
      throw_invalid({"save_diffllama: dtype must be F64, F32, F16 or BF16, got ",
                     std::string(describe(*options.dtype).name).c_str()});
    }
    if (origin != nullptr) was_ = DiffLlamaConfig::parse(origin->config, "config.json");
    config = was_;
  }

  /// What is saved: what was read, to be changed into what the model is.
  DiffLlamaConfig config;

  /// How many key and value heads the model had where it was loaded; 0 if it was not.
  Index had_key_value_heads() const { return origin_ == nullptr ? 0 : was_.num_key_value_heads; }

  std::map<std::string, std::string> metadata() const {
    std::map<std::string, std::string> result = {{"format", "pt"}};
    if (origin_ != nullptr) result.insert(origin_->metadata.begin(), origin_->metadata.end());
    return result;
  }

  /// The element type of a tensor: what is asked for, or else what it was read as, or else `own`.
  Dtype dtype_of(const std::string& name, Dtype own) const {
    if (options_.dtype) return *options_.dtype;
    if (origin_ == nullptr) return own;
    auto found = origin_->dtypes.find(name);
    if (found == origin_->dtypes.end()) found = origin_->dtypes.find("model.embed_tokens.weight");
    return found == origin_->dtypes.end() ? own : found->second;
  }

  /// Writes all files. `own_dtype` names the element type of a model that was not loaded. Throws std::invalid_argument
  /// for a configuration that a config.json cannot say.
  void save(const std::filesystem::path& directory, SafetensorsWriter weights, const char* own_dtype) {
    finish_config();
    const std::string dtype =
        options_.dtype ? with_type_of(*options_.dtype, []<typename T>(T) { return DiffLlamaConfig::torch_dtype<T>(); })
                       : own_dtype;
    JsonMembers members = config_members(dtype);
    set_tokens(members);
    const std::string text = members.text();
    check_says_all(text);
    CompanionFiles companions;
    if (origin_ != nullptr) companions = origin_->companions;
    companions.generation_config = generation_config(companions.generation_config, members, directory);
    save_checkpoint_directory(directory, std::move(weights), text, companions);
  }

 private:
  /// What the options say of the configuration.
  void finish_config() {
    const RotaryScaling& scaling = config.rope_scaling;
    config.max_position_embeddings = was_.max_position_embeddings;
    if (scaling.kind == RotaryScaling::Kind::dynamic) {
      config.max_position_embeddings = static_cast<Index>(scaling.context);  // one field for both
    }
    config.max_position_embeddings = options_.max_position_embeddings.value_or(config.max_position_embeddings);
    config.eos_token_ids = was_.eos_token_ids;
    if (!options_.eos_token_ids.empty()) config.eos_token_ids = options_.eos_token_ids;
    const auto check_token = [&](const char* name, Index id) {
      if (id >= 0 && id < config.vocab_size) return;
      throw_invalid({"save_diffllama: ", name, " ", id, " is outside the vocabulary of ", config.vocab_size});
    };
    for (const Index id : options_.eos_token_ids) check_token("the eos_token_id", id);
    if (options_.bos_token_id) check_token("the bos_token_id", *options_.bos_token_id);
    if (options_.pad_token_id) check_token("the pad_token_id", *options_.pad_token_id);
  }

  JsonMembers config_members(const std::string& dtype) const {
    const JsonMembers now(JsonDocument(config.to_json(dtype), "config.json"));
    if (origin_ == nullptr) return now;
    const JsonMembers before(JsonDocument(was_.to_json(dtype), "config.json"));
    JsonMembers members(JsonDocument(origin_->config, "config.json"));
    const auto changed = [&](const std::string& key) { return *before.find(key) != *now.find(key); };
    // The lengths of a scaled rotary embedding may follow from this one.
    const bool scaled = config.rope_scaling.kind != RotaryScaling::Kind::none;
    const bool rope =
        changed("rope_theta") || changed("rope_scaling") || (scaled && changed("max_position_embeddings"));
    if (rope) {
      for (const char* const key : {"rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor",
                                    "original_max_position_embeddings"}) {
        members.remove(key);
      }
    }
    now.for_each([&](const std::string& key, const std::string& text) {
      if (changed(key) || (rope && key.starts_with("rope_"))) members.set(key, text);
    });
    if (options_.dtype) {
      // Both spellings, the older of which all versions of transformers read.
      if (members.find("dtype") == nullptr || members.find("torch_dtype") != nullptr) {
        members.set("torch_dtype", JsonDocument::in_json(dtype));
      }
      if (members.find("dtype") != nullptr) members.set("dtype", JsonDocument::in_json(dtype));
    }
    return members;
  }

  /// The token ids that the options name.
  void set_tokens(JsonMembers& members) const {
    std::string ids;
    for (const Index id : options_.eos_token_ids) ids += (ids.empty() ? "" : ", ") + std::to_string(id);
    if (!ids.empty()) members.set("eos_token_id", options_.eos_token_ids.size() == 1 ? ids : "[" + ids + "]");
    if (options_.bos_token_id) members.set("bos_token_id", std::to_string(*options_.bos_token_id));
    if (options_.pad_token_id) members.set("pad_token_id", std::to_string(*options_.pad_token_id));
  }

  /// The text of the generation_config.json to be written; empty for none. Where a model was before that had one, it
  /// must not stay.
  std::string generation_config(const std::string& read, const JsonMembers& config_json,
                                const std::filesystem::path& directory) const {
    std::error_code error;
    JsonMembers members;
    if (!read.empty()) {
      members = JsonMembers(JsonDocument(read, "generation_config.json"));
    } else if (std::filesystem::exists(directory / "generation_config.json", error)) {
      members.set("_from_model_config", "true");  // as transformers writes it for a model without one
      for (const char* const key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
        if (const std::string* const text = config_json.find(key)) members.set(key, *text);
      }
    } else {
      return "";
    }
    set_tokens(members);
    return members.text();
  }

  /// Throws std::invalid_argument unless the text of a config.json is read as the configuration that it is for.
  void check_says_all(const std::string& text) const {
    try {
      const DiffLlamaConfig read = DiffLlamaConfig::parse(text, "config.json");
      const JsonMembers is(JsonDocument(read.to_json(), "")), must_be(JsonDocument(config.to_json(), ""));
      must_be.for_each([&](const std::string& key, const std::string& value) {
        if (*is.find(key) == value) return;
        throw_invalid({"save_diffllama: a config.json cannot say that ", key.c_str(), " is ", value.c_str()});
      });
      const RotaryScaling &has = read.rope_scaling, &needs = config.rope_scaling;
      if (needs.kind == RotaryScaling::Kind::dynamic && has.context != needs.context) {
        throw_invalid({"save_diffllama: max_position_embeddings ", read.max_position_embeddings,
                       " is also the context of dynamic scaling, which is ", json_number(needs.context).c_str()});
      }
    } catch (const FormatError& error) {
      throw_invalid({"save_diffllama: this model has no config.json: ", error.what()});
    }
  }

  const DiffLlamaOrigin* origin_;
  const DiffLlamaExportOptions& options_;
  DiffLlamaConfig was_;
};

}  // namespace detail
}  // namespace diffattn::inline v0_1
