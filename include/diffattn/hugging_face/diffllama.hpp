#pragma once

// DiffLlama: the checkpoints of Hugging Face's DiffLlamaForCausalLM, read, run and written.
//
//   auto model = DiffLlama<float>::load("DiffLlama-0.3B-handcut");
//   Matrix<float> logits = model.logits(tokens);                          (tokens x vocab_size)
//   std::vector<Index> text = model.generate(prompt, {.max_new_tokens = 100});
//   auto cache = model.make_cache();  model.logits(prompt, cache);        then token by token
//   auto texts = model.generate(prompts, {.max_new_tokens = 100});        many at once; model.logits(tokens, caches)
//   model.logits_into(y, tokens, cache, workspace, executor);             into a matrix of yours, without the heap
//   save_diffllama(model, directory);                                     config.json and model.safetensors
//
// Reads    what transformers 5 reads of config.json, generation_config.json and model.safetensors or its sharded form
//          (diffllama_config.hpp, diffllama_checkpoint.hpp): F64, F32, F16 and BF16; a tied or free head; biases; any
//          number of key and value heads that divides the query heads.
// Weights  stay as the file has them, 16 bits included, and are multiplied in Scalar. They are mapped, not copied, but
//          for q, k and v (about a tenth of a model), whose heads are put into our order (diffllama_layout.hpp), and
//          for what is not aligned. The model keeps the files alive.
// Errors   FormatError naming the file and the field or tensors that do not fit (diffllama_checkpoint.hpp), before
//          anything is read. std::invalid_argument for a token id outside the vocabulary and for a sequence longer than
//          DiffLlamaConfig::max_tokens.
// Const functions may be called from several threads, each with a workspace and a cache of its own.

#include <algorithm>
#include <filesystem>
#include <initializer_list>
#include <iterator>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/hugging_face/diffllama_checkpoint.hpp"
#include "diffattn/hugging_face/diffllama_config.hpp"
#include "diffattn/hugging_face/diffllama_layout.hpp"
#include "diffattn/io/checkpoint_directory.hpp"
#include "diffattn/io/safetensors.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/cache_batch.hpp"
#include "diffattn/layers/frozen_matrix.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/models/decoder_cache.hpp"
#include "diffattn/models/generate.hpp"
#include "diffattn/models/language_model.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar>
class DiffLlama : public LanguageModel<DiffLlama<Scalar>, Scalar> {
  using Calls = LanguageModel<DiffLlama, Scalar>;
  using Calls::size_of;

 public:
  using Attention = MultiheadDiffAttention<Scalar, FrozenMatrix>;
  using Model = Decoder<Scalar, Attention>;

  /// The model in `directory`. Reads what it does not map; a model that does not load leaves nothing behind.
  static DiffLlama load(const std::filesystem::path& directory) {
    const DiffLlamaCheckpoint checkpoint(directory);
    DiffLlama model(checkpoint.config);
    model.read(checkpoint);
    return model;
  }

  const DiffLlamaConfig& config() const { return config_; }
  const Model& decoder() const { return decoder_; }

  using Calls::logits, Calls::logits_into;  // language_model.hpp describes them

  /// A cache for this model, whose storage type is free: make_cache<Eigen::bfloat16>(). Throws std::invalid_argument
  /// for options that KvCache refuses.
  template <typename Storage = Scalar>
  DecoderCache<Storage> make_cache(const KvCacheOptions& options = {}) const {
    return decoder_.template make_cache<Storage>(options);
  }

  /// The tokens that follow the prompt, or each of many prompts, as generate.hpp says: model.generate(prompt, options,
  /// …) is what generate(decoder(), prompt, options, …) gives, but for stop tokens, which are the eos_token_id of the
  /// configuration if none are given, and for texts that are no longer than the model has positions.
  template <typename Prompt, BatchOptions Options = GenerateOptions, typename... Rest>
  auto generate(const Prompt& prompt, const Options& options = {}, Rest&&... rest) const {
    return diffattn::generate(decoder_, prompt, adapted(options), rest...);
  }
  template <Executor E = Serial>
  std::vector<Index> generate(std::initializer_list<Index> prompt, const GenerateOptions& options = {},
                              E&& executor = {}) const {
    return generate(std::span(prompt), options, executor);
  }

  /// logits(tokens, mask) into y (tokens x vocab_size).
  template <typename Y, typename Tokens, AttentionMask Mask, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, const Mask& mask, Workspace& workspace,
                   E&& executor = {}) const {
    check_length(size_of(tokens));
    decoder_.logits_into(y, tokens, mask, workspace, executor);
  }
  /// logits(tokens, cache, mask) into y.
  template <typename Y, typename Tokens, typename Storage, AttentionMask Mask, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, DecoderCache<Storage>& cache, const Mask& mask,
                   Workspace& workspace, E&& executor = {}) const {
    check_length(cache.position() + size_of(tokens));
    decoder_.logits_into(y, tokens, cache, mask, workspace, executor);
  }
  /// logits(tokens, caches, mask) into y.
  template <typename Y, typename Tokens, CacheBatch<DecoderCache> Caches, AttentionMask Mask, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, Caches&& caches, const Mask& mask,
                   Workspace& workspace, E&& executor = {}) const {
    detail::check_sequences(kName, static_cast<Index>(std::size(caches)), [&](const char* where, Index i) {
      const auto* const cache = std::data(caches)[i];
      if (cache != nullptr) check_length(cache->position() + 1, where);  // the decoder refuses null
    });
    decoder_.logits_into(y, tokens, caches, mask, workspace, executor);
  }

  /// Writes config.json and model.safetensors, in the element types that were read, as one thing: whatever interrupts
  /// it, load() gives the old model or the new one. The directory is made if it is not there. Holds a copy of the
  /// weights while it writes.
  void save(const std::filesystem::path& directory) const {
    SafetensorsWriter writer(std::map<std::string, std::string>{{"format", "pt"}});
    for_each_parameter(*this, [&](const std::string& name, const auto& parameter, const std::vector<Index>* heads) {
      add_to(writer, name, parameter, heads);
    });
    const std::string dtype = decoder_.embedding.visit(
        []<typename T>(const StridedView<const T>&) { return DiffLlamaConfig::torch_dtype<T>(); });
    detail::save_checkpoint_directory(directory, std::move(writer), config_.to_json(dtype));
  }

 private:
  explicit DiffLlama(const DiffLlamaConfig& config) : config_(config), decoder_(decoder_config(config)) {}

  static typename Model::Config decoder_config(const DiffLlamaConfig& config) {
    typename Attention::Config attention{.embed_dim = config.hidden_size, .num_heads = config.num_attention_heads / 2};
    attention.num_kv_heads = heads_of(config).groups();
    attention.rotary = RotaryConfig{.base = config.rope_theta,
                                    .pairing = RotaryPairing::half,
                                    .table_positions = table_positions(config),
                                    .scaling = config.rope_scaling};
    attention.norm_eps = config.rms_norm_eps;
    attention.bias = config.attention_bias;
    attention.norm_weight = false;
    attention.head_dim = config.head_dim;
    return {.vocab_size = config.vocab_size,
            .num_layers = config.num_hidden_layers,
            .hidden_dim = config.intermediate_size,
            .attention = attention,
            .tied_head = config.tie_word_embeddings,
            .norm_eps = config.rms_norm_eps};
  }

  /// Every layer has a table of its own: at most 4M angles.
  static Index table_positions(const DiffLlamaConfig& config) {
    return std::min({config.max_tokens(), Index{4096}, std::max<Index>(1, (Index{1} << 22) / config.head_dim)});
  }

  static detail::DiffLlamaHeads heads_of(const DiffLlamaConfig& config) {
    return {config.num_attention_heads, config.num_key_value_heads};
  }

  /// Calls f(name in a checkpoint, parameter, heads) for every parameter: a FrozenMatrix or a Vector. heads says which
  /// head of the checkpoint each of ours is; null where the order is the same.
  template <typename Self, typename F>
  static void for_each_parameter(Self& self, F&& f) {
    const std::vector<Index> queries = heads_of(self.config_).queries(), keys = heads_of(self.config_).keys();
    auto& decoder = self.decoder_;
    f(DiffLlamaCheckpoint::kEmbedding, decoder.embedding, nullptr);
    for (std::size_t layer = 0; layer < decoder.blocks.size(); ++layer) {
      auto& block = decoder.blocks[layer];
      const std::string prefix = DiffLlamaCheckpoint::layer_prefix(static_cast<Index>(layer)),
                        attention = prefix + "self_attn.";
      const auto projection = [&](const std::string& name, auto& linear, const std::vector<Index>* heads) {
        f(name + ".weight", linear.weight, heads);
        if (linear.bias.size() != 0) f(name + ".bias", linear.bias, heads);
      };
      f(prefix + "input_layernorm.weight", block.attention_norm.weight, nullptr);
      projection(attention + "q_proj", block.attention.q_proj, &queries);
      projection(attention + "k_proj", block.attention.k_proj, &keys);
      projection(attention + "v_proj", block.attention.v_proj, &keys);
      projection(attention + "o_proj", block.attention.out_proj, nullptr);
      f(attention + "lambda_q1", block.attention.lambda.q1, nullptr);
      f(attention + "lambda_k1", block.attention.lambda.k1, nullptr);
      f(attention + "lambda_q2", block.attention.lambda.q2, nullptr);
      f(attention + "lambda_k2", block.attention.lambda.k2, nullptr);
      f(prefix + "post_attention_layernorm.weight", block.feed_forward_norm.weight, nullptr);
      projection(prefix + "mlp.gate_proj", block.feed_forward.gate_proj, nullptr);
      projection(prefix + "mlp.up_proj", block.feed_forward.up_proj, nullptr);
      projection(prefix + "mlp.down_proj", block.feed_forward.down_proj, nullptr);
    }
    f("model.norm.weight", decoder.norm.weight, nullptr);
    if (decoder.head) f(DiffLlamaCheckpoint::kHead, decoder.head->weight, nullptr);
  }

  void read(const DiffLlamaCheckpoint& checkpoint) {
    for_each_parameter(*this, [&](const std::string& known_name, auto& parameter, const std::vector<Index>* heads) {
      const std::string name = checkpoint.stored_name(known_name);
      const Safetensors& file = checkpoint.tensors.file_of(name);
      if constexpr (std::is_same_v<std::remove_reference_t<decltype(parameter)>, FrozenMatrix>) {
        detail::with_type_of(file.info(name).dtype, [&]<typename T>(T) {
          // What is wider than the arithmetic would only be narrowed again and again.
          using Kept = std::conditional_t<(sizeof(T) > sizeof(Scalar)) || std::is_integral_v<T>, Scalar, T>;
          parameter = weight<Kept>(file, name, heads);
        });
      } else {
        const Vector<Scalar> values = file.vector<Scalar>(name);
        if (heads == nullptr) {
          parameter = values;
        } else {
          detail::gather_heads(parameter, values, *heads, config_.head_dim);
        }
        vector_types_[known_name] = file.info(name).dtype;
      }
    });
  }

  template <typename T>
  FrozenMatrix weight(const Safetensors& file, const std::string& name, const std::vector<Index>* heads) const {
    const Index rows = file.info(name).shape[0], cols = file.info(name).shape[1];
    std::shared_ptr<const T> mapped = file.mapped<T>(name);
    if (heads == nullptr && mapped != nullptr) return FrozenMatrix(std::move(mapped), rows, cols);
    if (heads == nullptr) return FrozenMatrix(file.matrix<T>(name));
    Matrix<T> ordered(static_cast<Index>(heads->size()) * config_.head_dim, cols);
    if (mapped != nullptr) {
      detail::gather_heads(ordered, Eigen::Map<const Matrix<T>>(mapped.get(), rows, cols), *heads, config_.head_dim);
    } else {
      detail::gather_heads(ordered, file.matrix<T>(name), *heads, config_.head_dim);
    }
    return FrozenMatrix(std::move(ordered));
  }

  void add_to(SafetensorsWriter& writer, const std::string& name, const FrozenMatrix& weight,
              const std::vector<Index>* heads) const {
    weight.visit([&]<typename T>(const StridedView<const T>& view) {
      add_in_order(writer, name, Eigen::Map<const Matrix<T>>(view.data, view.rows, view.cols), heads);
    });
  }
  void add_to(SafetensorsWriter& writer, const std::string& name, const Vector<Scalar>& vector,
              const std::vector<Index>* heads) const {
    const auto type = vector_types_.find(name);
    detail::with_type_of(type == vector_types_.end() ? Dtype::F32 : type->second, [&]<typename T>(T) {
      add_in_order(writer, name, Vector<T>(vector.template cast<T>()), heads);
    });
  }

  /// Adds a tensor with its heads in the order of the checkpoint.
  template <typename Values>
  void add_in_order(SafetensorsWriter& writer, const std::string& name, const Values& values,
                    const std::vector<Index>* heads) const {
    if (heads == nullptr) return writer.add(name, values);
    const auto back = detail::first_of_each(*heads, 1 + *std::max_element(heads->begin(), heads->end()));
    typename Values::PlainObject ordered(static_cast<Index>(back.size()) * config_.head_dim, values.cols());
    detail::gather_heads(ordered, values, back, config_.head_dim);
    writer.add(name, ordered);
  }

  void check_length(Index tokens, const char* where = kName) const {
    if (tokens > config_.max_tokens()) {
      detail::throw_invalid({where, ": a sequence of ", tokens, " tokens is longer than the ", config_.max_tokens(),
                             " positions that the model has"});
    }
  }

  /// The options with what this model adds to them; a copy of each, if there are many.
  auto adapted(GenerateOptions options) const {
    if (options.stop_tokens.empty()) options.stop_tokens = config_.eos_token_ids;
    options.max_length = std::min(options.max_length.value_or(config_.max_tokens()), config_.max_tokens());
    return options;
  }
  template <typename Range>
  std::vector<GenerateOptions> adapted(const Range& each) const {
    std::vector<GenerateOptions> result;
    std::transform(std::data(each), std::data(each) + std::size(each), std::back_inserter(result),
                   [&](const GenerateOptions& options) { return adapted(options); });
    return result;
  }

  static constexpr const char* kName = "DiffLlama";

  DiffLlamaConfig config_;
  Model decoder_;
  std::map<std::string, Dtype> vector_types_;  // as they were stored
};

/// The model in `directory`, as DiffLlama::save writes it: the same function as for a Decoder (diffllama_export.hpp).
template <typename Scalar>
void save_diffllama(const DiffLlama<Scalar>& model, const std::filesystem::path& directory) {
  model.save(directory);
}

}  // namespace diffattn::inline v0_1
