#pragma once

// DiffLlamaCheckpoint: a directory with a checkpoint of Hugging Face's DiffLlamaForCausalLM, opened and checked: its
// config.json, and its tensors, among which are all those of the configuration. DiffLlama::load makes a model of it.
//
//   const DiffLlamaCheckpoint checkpoint("DiffLlama-0.3B-handcut");
//   checkpoint.config.num_hidden_layers …  checkpoint.stored_name("model.norm.weight") …
//
// What transformers 5 makes of a checkpoint, this does:
//
//   names              with "model." before them, without (a base model's), or with one too many
//   tied head          the embedding, the head or both may be stored; if both are and differ, the head is free
//   eos_token_id       that of generation_config.json if there is one, or else of config.json; where this library saved
//                      the weights, those of its config.json, if it has some, hide a generation_config.json of others
//   further tensors    buffers (rotary_emb.inv_freq and the like), tensors of integer types and of other modules are
//                      left alone. A weight or bias of the decoder that config.json does not have is an error: one of
//                      the two is wrong.
//
// Errors   FormatError naming the file and the field, or the tensors that are missing, surplus or of the wrong shape or
//          type, up to 16 in one message; also if this library saved the weights with another config.json (see
//          diffllama_export.hpp). std::runtime_error if a file cannot be opened or the directory has none that can be
//          read; the message says what to do.
// Cost     opening reads config.json and the headers of the files; a tied head that is stored is read too, and the
//          embedding.

#include <any>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/hugging_face/diffllama_config.hpp"
#include "diffattn/hugging_face/diffllama_origin.hpp"
#include "diffattn/io/checkpoint_directory.hpp"
#include "diffattn/io/dtype.hpp"
#include "diffattn/io/json_document.hpp"
#include "diffattn/io/parameters.hpp"
#include "diffattn/io/safetensors_header.hpp"
#include "diffattn/io/safetensors_reader.hpp"
#include "diffattn/io/sharded_safetensors.hpp"

namespace diffattn::inline v0_1 {

class DiffLlamaCheckpoint {
 public:
  // Names of tensors.
  static constexpr const char* kEmbedding = "model.embed_tokens.weight";
  static constexpr const char* kHead = "lm_head.weight";
  /// What the names of a layer's tensors begin with: `model.layers.3.`
  static std::string layer_prefix(Index layer) { return "model.layers." + std::to_string(layer) + "."; }

  explicit DiffLlamaCheckpoint(const std::filesystem::path& directory)
      : DiffLlamaCheckpoint(directory, detail::open_checkpoint_directory(directory)) {}

  /// What the file calls a tensor: its name in transformers, or that of a base model, without "model.", or one with two
  /// of them. The embedding of a tied model may be stored as its head alone. The name itself if nothing is stored.
  std::string stored_name(const std::string& name) const {
    std::string stored = own_name(name);
    if (stored.empty() && name == kEmbedding && config.tie_word_embeddings) stored = own_name(kHead);
    return stored.empty() ? name : stored;
  }

  DiffLlamaConfig config;
  ShardedSafetensors tensors;
  std::any origin;  ///< what the directory says beside, for DecoderConfig::origin

 private:
  static constexpr std::string_view kPrefix = "model.";

  DiffLlamaCheckpoint(const std::filesystem::path& directory, detail::CheckpointFiles files)
      : config(read_config(directory, files)), tensors(std::move(files.tensors)) {
    check_tensors();
    if (config.tie_word_embeddings) untie_if_different();
    std::map<std::string, Dtype> dtypes;
    for_each_tensor(config, [&](const std::string& name, const std::vector<Index>&) {
      dtypes[name] = tensors.info(stored_name(name)).dtype;
    });
    origin = detail::read_origin(directory, files, tensors, std::move(dtypes));
  }

  static DiffLlamaConfig read_config(const std::filesystem::path& directory, const detail::CheckpointFiles& files) {
    const std::string path = (directory / "generation_config.json").string();
    DiffLlamaConfig config = DiffLlamaConfig::parse(files.config, (directory / "config.json").string());
    // Where we saved stop tokens, a generation_config.json without our mark is of a model that was there before.
    const bool has_own = !files.save_id.empty() && !files.is_generation_saved && !config.eos_token_ids.empty();
    if (!has_own && !files.generation_config.empty()) {
      const detail::JsonDocument json(files.generation_config, path);
      const detail::ConfigFields fields(json, json.root(), path);
      config.eos_token_ids = fields.token_ids("eos_token_id");
    }
    return config;
  }

  /// The name that is stored of the three that a tensor may have, or none.
  std::string own_name(const std::string& name) const {
    std::string found;
    const bool prefixed = std::string_view(name).substr(0, kPrefix.size()) == kPrefix;
    for (const std::string& known :
         {name, std::string(kPrefix) + name, prefixed ? name.substr(kPrefix.size()) : name}) {
      if (known == found || !tensors.contains(known)) continue;
      if (!found.empty()) {
        throw FormatError(tensors.path() + ": has both " + detail::in_quotes(found) + " and " +
                          detail::in_quotes(known) + ", which are names of one tensor");
      }
      found = known;
    }
    return found;
  }

  /// Calls f(name, shape) for every tensor of a checkpoint.
  template <typename F>
  static void for_each_tensor(const DiffLlamaConfig& c, F&& add) {
    const auto f = [&](const std::string& name, std::vector<Index> shape) { add(name, shape); };
    const Index hidden = c.hidden_size, q = c.num_attention_heads * c.head_dim, kv = c.num_key_value_heads * c.head_dim;
    f(kEmbedding, {c.vocab_size, hidden});
    for (Index layer = 0; layer < c.num_hidden_layers; ++layer) {
      const std::string prefix = layer_prefix(layer), attention = prefix + "self_attn.", mlp = prefix + "mlp.";
      f(prefix + "input_layernorm.weight", {hidden});
      for (const auto& [name, out, in] : {std::tuple<const char*, Index, Index>{"q_proj", q, hidden},
                                          {"k_proj", kv, hidden},
                                          {"v_proj", kv, hidden},
                                          {"o_proj", hidden, q}}) {
        f(attention + name + ".weight", {out, in});
        if (c.attention_bias) f(attention + name + ".bias", {out});
      }
      for (const char* const name : {"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}) {
        f(attention + name, {c.head_dim});
      }
      f(prefix + "post_attention_layernorm.weight", {hidden});
      f(mlp + "gate_proj.weight", {c.intermediate_size, hidden});
      f(mlp + "up_proj.weight", {c.intermediate_size, hidden});
      f(mlp + "down_proj.weight", {hidden, c.intermediate_size});
    }
    f("model.norm.weight", {hidden});
    if (!c.tie_word_embeddings) f(kHead, {c.vocab_size, hidden});
  }

  /// Throws FormatError unless all tensors of the configuration are there and no other parameter of a decoder.
  void check_tensors() const {
    constexpr int kMostProblems = 16;
    std::string problems;
    int count = 0;
    const auto add = [&](const std::string& problem) {
      if (count++ < kMostProblems) problems += "\n  " + problem;
    };
    if (static_cast<std::size_t>(config.num_hidden_layers) > tensors.tensors().size()) {
      throw FormatError(tensors.path() + ": has " + std::to_string(tensors.tensors().size()) +
                        " tensors, too few for num_hidden_layers = " + std::to_string(config.num_hidden_layers));
    }
    std::set<std::string> expected;
    const auto expect = [&](const std::string& name, const std::vector<Index>& shape) {
      const std::string stored = stored_name(name);
      expected.insert(stored);
      const std::string problem = detail::mismatch(tensors, stored, shape);
      if (!problem.empty()) add(problem);
    };
    for_each_tensor(config, expect);
    if (config.tie_word_embeddings && !own_name(kHead).empty()) {
      expect(kHead, {config.vocab_size, config.hidden_size});
    }
    for (const auto& [name, file] : tensors.tensors()) {
      if (expected.count(name) == 0 && is_parameter(name)) add("surplus: " + detail::in_quotes(name));
    }
    if (count > kMostProblems) problems += "\n  and " + std::to_string(count - kMostProblems) + " more";
    if (count == 0) return;
    throw FormatError(tensors.path() + ": does not hold the tensors of its config.json" + problems + advice());
  }

  /// Whether a tensor is named and typed as a parameter of a decoder.
  bool is_parameter(const std::string& name) const {
    const Dtype dtype = tensors.info(name).dtype;
    if (detail::is_integer(dtype) || !detail::is_readable(dtype)) return false;
    const std::string_view text(name);
    const bool ours = text.starts_with(kPrefix) || text.starts_with("layers.") || text.starts_with("lm_head.");
    const std::string_view last = text.substr(text.rfind('.') + 1);
    return ours && (last == "weight" || last == "bias" || last.starts_with("lambda_"));
  }

  /// What may be meant, if a name can be recognised.
  std::string advice() const {
    const std::string norm = "model.norm.weight", query = "self_attn.q_proj.weight";
    for (const auto& [name, file] : tensors.tensors()) {
      const std::string_view text(name);
      if (text.ends_with("." + norm) && !text.starts_with(kPrefix)) {
        return "\nThe names begin with " + detail::in_quotes(name.substr(0, name.size() - norm.size())) +
               ": save the model itself, not what it is wrapped in";
      }
      if (text.find(".lora_") != text.npos) return "\nAn adapter must be merged into its model first";
      if (text.ends_with(query.substr(0, query.size() - 6) + "qweight")) {
        return "\nThe weights are quantized: save the model dequantized, as bfloat16";
      }
    }
    const bool no_head = !config.tie_word_embeddings && own_name(kHead).empty();
    return no_head && !own_name(kEmbedding).empty()
               ? "\nA model without a head was saved: save it with its head (…ForCausalLM), or set "
                 "tie_word_embeddings to true if the embedding is its head"
               : "";
  }

  /// A tied head that is stored beside an embedding with other values is a head of its own.
  void untie_if_different() {
    const std::string head = own_name(kHead), embedding = own_name(kEmbedding);
    if (head.empty() || embedding.empty()) return;
    const bool same = tensors.info(head).dtype == tensors.info(embedding).dtype &&
                      detail::with_type_of(tensors.info(head).dtype, [&]<typename T>(T) {
                        const auto a = stored_values<T>(head), b = stored_values<T>(embedding);
                        const Index size = config.vocab_size * config.hidden_size;
                        return std::memcmp(a.get(), b.get(), static_cast<std::size_t>(size) * sizeof(T)) == 0;
                      });
    if (!same) config.tie_word_embeddings = false;
  }

  /// The values of a tensor of type T: in the file or, if they are not aligned there, copied.
  template <typename T>
  std::shared_ptr<const T> stored_values(const std::string& name) const {
    const Safetensors& file = tensors.file_of(name);
    if (std::shared_ptr<const T> mapped = file.mapped<T>(name)) return mapped;
    const auto copy = std::make_shared<const Vector<T>>(file.vector<T>(name));
    return std::shared_ptr<const T>(copy, copy->data());
  }
};

}  // namespace diffattn::inline v0_1
