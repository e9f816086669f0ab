#pragma once

// DiffLlamaCheckpoint: a directory with a checkpoint of Hugging Face's DiffLlamaForCausalLM, opened and checked: its
// config.json, and its tensors, which are those of the configuration, no more and no less. DiffLlama::load makes a
// model of it.
//
//   const DiffLlamaCheckpoint checkpoint("DiffLlama-0.3B-handcut");
//   checkpoint.config.num_hidden_layers …  checkpoint.tensors.info("model.norm.weight") …
//
// A tied head that is stored all the same must equal the embedding bit for bit; which of the two is meant otherwise, a
// checkpoint does not say: FormatError.
//
// Errors   FormatError naming the file and the field, or the tensors that are missing, surplus or of the wrong shape or
//          type, up to 16 in one message; also if the weights were saved by this library with another config.json (see
//          diffllama_export.hpp). std::runtime_error if a file cannot be opened.
// Cost     opening reads config.json and the headers of the files; a tied head that is stored is read too, and the
//          embedding.

#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/io/detail/checkpoint_directory.hpp"
#include "diffattn/io/detail/dtype.hpp"
#include "diffattn/io/detail/safetensors_header.hpp"
#include "diffattn/io/parameters.hpp"
#include "diffattn/io/safetensors_reader.hpp"
#include "diffattn/io/sharded_safetensors.hpp"
#include "diffattn/models/diffllama_config.hpp"

namespace diffattn::inline v0_1 {

class DiffLlamaCheckpoint {
 public:
  // Names of tensors.
  static constexpr const char* kEmbedding = "model.embed_tokens.weight";
  static constexpr const char* kHead = "lm_head.weight";
  static std::string layer_prefix(Index layer) { return "model.layers." + std::to_string(layer) + "."; }

  explicit DiffLlamaCheckpoint(const std::filesystem::path& directory)
      : DiffLlamaCheckpoint(detail::open_checkpoint_directory(directory)) {}

  DiffLlamaConfig config;
  ShardedSafetensors tensors;

 private:
  explicit DiffLlamaCheckpoint(detail::CheckpointFiles files)
      : config(DiffLlamaConfig::parse(files.config, files.config_path.string())), tensors(std::move(files.tensors)) {
    check_tensors();
    check_tied_head();
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

  /// Throws FormatError unless the tensors are those of the configuration, no more and no less.
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
    std::map<std::string, bool> expected;
    const auto expect = [&](const std::string& name, const std::vector<Index>& shape) {
      expected[name] = true;
      const std::string problem = detail::mismatch(tensors, name, shape);
      if (!problem.empty()) add(problem);
    };
    for_each_tensor(config, expect);
    if (config.tie_word_embeddings && tensors.contains(kHead)) expect(kHead, {config.vocab_size, config.hidden_size});
    for (const auto& [name, file] : tensors.tensors()) {
      if (expected.count(name) == 0) add("surplus: " + detail::in_quotes(name));
    }
    if (count > kMostProblems) problems += "\n  and " + std::to_string(count - kMostProblems) + " more";
    if (count != 0) throw FormatError(tensors.path() + ": does not hold the tensors of its config.json" + problems);
  }

  /// Throws FormatError if a tied head is stored and is not the embedding, bit for bit.
  void check_tied_head() const {
    if (!config.tie_word_embeddings || !tensors.contains(kHead)) return;
    const bool same =
        tensors.info(kHead).dtype == tensors.info(kEmbedding).dtype &&
        detail::with_type_of(tensors.info(kHead).dtype, [&]<typename T>(T) {
          const auto head = stored_values<T>(kHead), embedding = stored_values<T>(kEmbedding);
          const Index size = config.vocab_size * config.hidden_size;
          return std::memcmp(head.get(), embedding.get(), static_cast<std::size_t>(size) * sizeof(T)) == 0;
        });
    if (same) return;
    throw FormatError(tensors.path() + ": tie_word_embeddings is true, but " + detail::in_quotes(kHead) +
                      " is stored and differs from " + detail::in_quotes(kEmbedding));
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
