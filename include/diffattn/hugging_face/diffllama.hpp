#pragma once

// DiffLlama: the checkpoints of Hugging Face's DiffLlamaForCausalLM, read, run and written.
//
//   auto model = DiffLlama<float>::load("DiffLlama-0.3B-handcut");
//   auto fast = DiffLlama<float>::load(directory, {.arithmetic = Arithmetic::bfloat16});         (arithmetic.hpp)
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
// Weights  stay as the file has them, 16 bits included, and are multiplied in Scalar, or those of bfloat16 in bfloat16.
//          They are mapped, not copied, but for q, k and v (about a tenth of a model), whose heads are put into our
//          order (diffllama_layout.hpp), and for what is not aligned; where a CPU multiplies bfloat16, and is asked to,
//          those of the layers are kept packed besides, unless DiffLlamaOptions say no. The model keeps the files alive.
// Errors   FormatError naming the file and the field or tensors that do not fit (diffllama_checkpoint.hpp), before
//          anything is read. std::invalid_argument for an arithmetic that the weights are not for, a token id outside
//          the vocabulary and for a sequence longer than DiffLlamaConfig::max_tokens.
// Const functions may be called from several threads, each with a workspace and a cache of its own.

#include <algorithm>
#include <filesystem>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <span>
#include <stdexcept>
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
#include "diffattn/hugging_face/diffllama_export.hpp"
#include "diffattn/hugging_face/diffllama_import.hpp"
#include "diffattn/hugging_face/diffllama_layout.hpp"
#include "diffattn/io/safetensors.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/arithmetic.hpp"
#include "diffattn/layers/cache_batch.hpp"
#include "diffattn/layers/frozen_matrix.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/models/decoder_cache.hpp"
#include "diffattn/models/generate.hpp"
#include "diffattn/models/language_model.hpp"

namespace diffattn::inline v0_1 {

/// How a DiffLlama is run.
struct DiffLlamaOptions {
  Arithmetic arithmetic = Arithmetic::scalar;  ///< Arithmetic::bfloat16: weights of BF16 alone, with Scalar = float
  bool packed_weights = true;  ///< with Arithmetic::bfloat16: keep those of the layers packed, too (2 bytes a number)
};

template <typename Scalar>
class DiffLlama : public LanguageModel<DiffLlama<Scalar>, Scalar> {
  using Calls = LanguageModel<DiffLlama, Scalar>;
  using Calls::size_of;

 public:
  using Attention = MultiheadDiffAttention<Scalar, FrozenMatrix>;
  using Model = Decoder<Scalar, Attention>;

  /// The model in `directory`. Reads what it does not map; a model that does not load leaves nothing behind. Throws
  /// std::invalid_argument naming the tensor if Arithmetic::bfloat16 is asked of weights of another type.
  static DiffLlama load(const std::filesystem::path& directory, const DiffLlamaOptions& options = {}) {
    const DiffLlamaCheckpoint checkpoint(directory);
    DiffLlama model(checkpoint, options);
    if (options.arithmetic == Arithmetic::bfloat16) model.check_bfloat16(checkpoint);
    model.read(checkpoint);
    if (options.arithmetic == Arithmetic::bfloat16 && options.packed_weights) {
      for (auto& block : model.decoder_.blocks) pack_weights(block);
    }
    return model;
  }

  /// What config.json says.
  const DiffLlamaConfig& config() const { return config_; }
  /// The model itself, whose weights are those of the file.
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

  /// Writes what was read, in the element types that it had, as save_diffllama does for a Decoder
  /// (diffllama_export.hpp), whose options and errors it has. Holds a copy of the weights while it writes.
  void save(const std::filesystem::path& directory, const DiffLlamaExportOptions& options = {}) const {
    detail::ExportedConfig exported(detail::origin_of(decoder_.config().origin), options);
    exported.config = config_;
    SafetensorsWriter writer(exported.metadata());
    for_each_parameter(*this, [&](const std::string& name, const auto& parameter, const std::vector<Index>* heads) {
      const auto add = [&](const auto& values) {
        detail::add_as(exported.dtype_of(name, Dtype::F32), writer, name, in_order(values, heads));
      };
      if constexpr (std::is_same_v<std::remove_cvref_t<decltype(parameter)>, FrozenMatrix>) {
        parameter.visit([&]<typename T>(const StridedView<const T>& view) {
          add(Eigen::Map<const Matrix<T>>(view.data, view.rows, view.cols));
        });
      } else {
        add(parameter);
      }
    });
    exported.save(directory, std::move(writer), "float32");
  }

 private:
  DiffLlama(const DiffLlamaCheckpoint& checkpoint, const DiffLlamaOptions& options)
      : config_(checkpoint.config), decoder_(detail::decoder_config_of<Attention>(checkpoint, options.arithmetic)) {}

  /// Calls f(name in a checkpoint, parameter, heads) for every parameter: a FrozenMatrix or a Vector. heads says which
  /// head of the checkpoint each of ours is; null where the order is the same.
  template <typename Self, typename F>
  static void for_each_parameter(Self& self, F&& f) {
    const std::vector<Index> queries = detail::heads_of(self.config_).queries(),
                             keys = detail::heads_of(self.config_).keys();
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

  /// Throws std::invalid_argument unless all weights are multiplied in bfloat16.
  void check_bfloat16(const DiffLlamaCheckpoint& checkpoint) const {
    if constexpr (!std::is_same_v<Scalar, float>) {
      detail::check_arithmetic<Scalar, Eigen::bfloat16>(kName, Arithmetic::bfloat16);
    }
    for_each_parameter(*this, [&](const std::string& known_name, const auto& parameter, const std::vector<Index>*) {
      const std::string name = checkpoint.stored_name(known_name);
      const Dtype dtype = checkpoint.tensors.info(name).dtype;
      if (!std::is_same_v<std::remove_cvref_t<decltype(parameter)>, FrozenMatrix> || dtype == Dtype::BF16) return;
      throw std::invalid_argument(checkpoint.tensors.path() +
                                  ": Arithmetic::bfloat16 multiplies weights of BF16, but " + detail::in_quotes(name) +
                                  " is " + std::string(detail::describe(dtype).name) +
                                  ": save the model as bfloat16 (save_diffllama(model, directory, {.dtype = "
                                  "Dtype::BF16})), or leave arithmetic at Arithmetic::scalar");
    });
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

  /// The values with their heads in the order of the checkpoint.
  template <typename Values>
  typename Values::PlainObject in_order(const Values& values, const std::vector<Index>* heads) const {
    if (heads == nullptr) return values;
    const auto back = detail::first_of_each(*heads, 1 + *std::max_element(heads->begin(), heads->end()));
    typename Values::PlainObject ordered(static_cast<Index>(back.size()) * config_.head_dim, values.cols());
    detail::gather_heads(ordered, values, back, config_.head_dim);
    return ordered;
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
};

/// DiffLlama::save, under the name that it has for a Decoder.
template <typename Scalar>
void save_diffllama(const DiffLlama<Scalar>& model, const std::filesystem::path& directory,
                    const DiffLlamaExportOptions& options = {}) {
  model.save(directory, options);
}

}  // namespace diffattn::inline v0_1
