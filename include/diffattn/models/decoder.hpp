#pragma once

// Decoder: a whole language model, from token ids to logits, as the paper builds it (section 2.2) and Llama:
//
//   x = embedding[tokens];   per layer  x += Attention(RMSNorm(x)),  x += SwiGLU(RMSNorm(x));
//   logits = RMSNorm(x) W_headᵀ,   W_head the embedding itself if the head is tied
//
// Attention is a layer type: MultiheadDiffAttention<Scalar> (the Differential Transformer), MultiheadDiffAttentionV2
// <Scalar>, MultiheadAttention<Scalar> (the Transformer). Nothing else differs between the three.
//
// Parameters (visit_parameters): embed_tokens.weight, layers.N.{input_layernorm, self_attn, post_attention_layernorm,
// mlp}.…, norm.weight and, if the head is free, lm_head.weight: Hugging Face's names without "model."; the attention's
// own names are those of its layer.
//
// Tokens   any contiguous integers: a std::vector, std::span, Eigen vector or {1, 2, 3}.
// Errors   std::invalid_argument for a configuration that cannot be and for a token id outside the vocabulary, before
//          any work. Const functions may be called from several threads, each with a workspace of its own.
// Memory   (tokens x (embed_dim and hidden_dim)) scratch from the workspace; after a first call no heap.

#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/frozen_matrix.hpp"
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rms_norm.hpp"
#include "diffattn/models/decoder_block.hpp"
#include "diffattn/models/decoder_cache.hpp"
#include "diffattn/models/decoder_tape.hpp"
#include "diffattn/models/feed_forward.hpp"

namespace diffattn::inline v0_1 {

template <typename Attention>
struct DecoderConfig {
  Index vocab_size = 0;
  Index num_layers = 0;
  Index hidden_dim = 0;                    ///< inner width of the feed-forward layers
  typename Attention::Config attention{};  ///< of every layer; depth and seed are set for each
  bool tied_head = false;                  ///< the logits are products with the embedding
  double norm_eps = 1e-5;                  ///< of the norms before attention, before feed-forward, before the head
  std::uint64_t seed = 0;                  ///< of the initial parameters
};

template <typename Scalar, typename Attention>
class Decoder {
 public:
  using Config = DecoderConfig<Attention>;
  using Block = DecoderBlock<Scalar, Attention>;
  using Weight = typename Attention::WeightMatrix;

  /// Initial parameters: embedding N(0, 0.02²), linear layers as nn.Linear, norms 1, attention as its layer says.
  explicit Decoder(const Config& config)
      : config_(checked(config)),
        embedding(config_.vocab_size, config_.attention.embed_dim),
        norm(config_.attention.embed_dim, config_.norm_eps) {
    Initializer random(config_.seed);
    if constexpr (!kFrozen) random.normal(embedding, 0.02);
    blocks.reserve(static_cast<std::size_t>(config_.num_layers));
    for (Index layer = 0; layer < config_.num_layers; ++layer) {
      blocks.emplace_back(attention_config(layer), config_.hidden_dim, config_.norm_eps);
      blocks.back().feed_forward.initialize(random);
    }
    if (!config_.tied_head) {
      head.emplace(config_.attention.embed_dim, config_.vocab_size);
      head->initialize(random);
    }
  }

  const Config& config() const { return config_; }
  Index num_layers() const { return config_.num_layers; }

  /// (tokens x vocab_size): row i scores what follows token i.
  template <typename Tokens>
  Matrix<Scalar> logits(const Tokens& tokens) const {
    Workspace workspace;
    Matrix<Scalar> result(static_cast<Index>(std::size(tokens)), config_.vocab_size);
    logits_into(result, tokens, workspace);
    return result;
  }
  Matrix<Scalar> logits(std::initializer_list<Index> tokens) const { return logits(std::span(tokens)); }

  /// The same for the tokens that follow those in `cache`, which they join.
  template <typename Tokens, typename Storage>
  Matrix<Scalar> logits(const Tokens& tokens, DecoderCache<Storage>& cache) const {
    const Index n = static_cast<Index>(std::size(tokens));
    Workspace workspace;
    const auto frame = workspace.frame();
    MatrixMap<Scalar> x(workspace.take<Scalar>(n * embedding.cols()), n, embedding.cols());
    Matrix<Scalar> result(n, config_.vocab_size);
    detail::CacheTransaction transaction(cache);
    hidden_into(x, tokens, cache, workspace);
    head_into(result, x, workspace);
    transaction.keep();
    return result;
  }
  template <typename Storage>
  Matrix<Scalar> logits(std::initializer_list<Index> tokens, DecoderCache<Storage>& cache) const {
    return logits(std::span(tokens), cache);
  }

  /// The same into a matrix of yours, with scratch from `workspace` and work spread over `executor`.
  template <typename Y, typename Tokens, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, Workspace& workspace, E&& executor = {}) const {
    const Index n = static_cast<Index>(std::size(tokens));
    detail::check_shape(kName, "logits", y, n, config_.vocab_size);
    const auto frame = workspace.frame();
    MatrixMap<Scalar> x(workspace.take<Scalar>(n * embedding.cols()), n, embedding.cols());
    hidden_into(x, tokens, workspace, executor);
    head_into(y, x, workspace, executor);
  }

  /// x (tokens x embed_dim): the embeddings of the tokens, all of which are checked before.
  template <typename Tokens>
  void embed_into(MatrixMap<Scalar>& x, const Tokens& tokens) const {
    check_tokens(tokens);
    const auto* const ids = std::data(tokens);
    for (Index i = 0; i < x.rows(); ++i) {
      const auto id = static_cast<Index>(ids[i]);
      if constexpr (kFrozen) {
        embedding.copy_row(id, &x(i, 0));
      } else {
        x.row(i) = embedding.row(id).template cast<Scalar>();
      }
    }
  }

  /// x (tokens x embed_dim): what the head is multiplied with, after the last norm.
  template <typename Tokens, Executor E = Serial>
  void hidden_into(MatrixMap<Scalar>& x, const Tokens& tokens, Workspace& workspace, E&& executor = {}) const {
    embed_into(x, tokens);
    for (const Block& block : blocks) block.forward_in_place(x, CausalMask{}, workspace, executor);
    norm.forward_rows(x.data(), x.data(), x.rows(), executor);
  }

  /// The same for the tokens that follow those in `cache`, which is as before if anything throws.
  template <typename Tokens, typename Storage, Executor E = Serial>
  void hidden_into(MatrixMap<Scalar>& x, const Tokens& tokens, DecoderCache<Storage>& cache, Workspace& workspace,
                   E&& executor = {}) const {
    check_cache(cache, x.rows());
    embed_into(x, tokens);
    detail::CacheTransaction transaction(cache);
    for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
      blocks[layer].forward_in_place(x, cache.layers[layer], workspace, executor);
    }
    norm.forward_rows(x.data(), x.data(), x.rows(), executor);
    transaction.keep();
  }

  /// y (n x vocab_size) = x (n x embed_dim) W_headᵀ.
  template <typename Y, typename X, Executor E = Serial>
  void head_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Workspace& workspace,
                 E&& executor = {}) const {
    detail::check_shape(kName, "x", x, x.rows(), embedding.cols());
    detail::check_shape(kName, "logits", y, x.rows(), embedding.rows());
    if (head) return head->forward_into(y, x, workspace, executor);
    linear_into<Scalar>(y, x, embedding, workspace, executor);
  }

  /// Throws std::invalid_argument unless all tokens are in the vocabulary.
  template <typename Tokens>
  void check_tokens(const Tokens& tokens) const {
    const auto* const ids = std::data(tokens);
    for (Index i = 0; i < static_cast<Index>(std::size(tokens)); ++i) {
      const auto id = static_cast<Index>(ids[i]);
      if (id < 0 || id >= config_.vocab_size) {
        detail::throw_invalid({kName, ": token ", i, " is ", id, ", outside the vocabulary of ", config_.vocab_size});
      }
    }
  }

  /// Throws std::invalid_argument unless the cache is one for this model and has room for the tokens.
  template <typename Storage>
  void check_cache(const DecoderCache<Storage>& cache, Index tokens) const {
    if (cache.layers.size() != blocks.size()) {
      detail::throw_invalid({kName, ": the cache must have ", config_.num_layers, " layers, got ",
                             static_cast<Index>(cache.layers.size())});
    }
    const Index most = cache.options().max_tokens;
    if (most != 0 && tokens > most - cache.position()) {
      detail::throw_invalid({kName, ": the cache holds at most ", most, " tokens and has ", cache.position(),
                             ", cannot append ", tokens});
    }
  }

  using Tape = DecoderTape<Scalar, Attention>;

  /// The logits of sequences stacked in `tokens`, `lengths` long, none of which sees another; what backward needs of
  /// this pass goes into `tape`.
  template <typename Tokens>
  Matrix<Scalar> logits(const Tokens& tokens, std::span<const Index> lengths, Tape& tape) const {
    Workspace workspace;
    Matrix<Scalar> result(static_cast<Index>(std::size(tokens)), config_.vocab_size);
    logits_into(result, tokens, lengths, tape, workspace);
    return result;
  }

  template <typename Y, typename Tokens, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, std::span<const Index> lengths, Tape& tape,
                   Workspace& workspace, E&& executor = {}) const {
    detail::logits_on_tape(*this, y, tokens, lengths, tape, workspace, executor);
  }

  /// Adds to the parameters of `grad`, a decoder of the same configuration, their gradients: from dlogits, the gradient
  /// of the logits, and the tape of the forward pass. Throws, before any work,
  /// std::invalid_argument for a tape that is not this decoder's, ShapeError for a dlogits or grad of another shape.
  /// After anything else that is thrown (std::bad_alloc, by an executor), model and tape are as before, but `grad`
  /// holds some of the gradients: set it to zero and begin the step again.
  void backward(const Matrix<Scalar>& dlogits, Tape& tape, Decoder& grad) const {
    Workspace workspace;
    backward(dlogits, tape, grad, workspace);
  }

  template <typename DY, Executor E = Serial>
  void backward(const Eigen::MatrixBase<DY>& dlogits, Tape& tape, Decoder& grad, Workspace& workspace,
                E&& executor = {}) const {
    detail::decoder_backward(*this, dlogits, tape, grad, workspace, executor);
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visitor("embed_tokens.weight", self.embedding);
    for (std::size_t layer = 0; layer < self.blocks.size(); ++layer) {
      visit_part("layers." + std::to_string(layer), self.blocks[layer], visitor);
    }
    visit_part("norm", self.norm, visitor);
    if (self.head) visit_part("lm_head", *self.head, visitor);
  }

 private:
  static constexpr const char* kName = detail::kDecoder;
  static constexpr bool kFrozen = std::is_same_v<Weight, FrozenMatrix>;

  static Config checked(Config config) {
    detail::check_positive(kName, "vocab_size", config.vocab_size);
    detail::check_positive(kName, "num_layers", config.num_layers);
    detail::check_positive(kName, "hidden_dim", config.hidden_dim);
    detail::check_positive(kName, "attention.embed_dim", config.attention.embed_dim);
    detail::checked_product(kName, "vocab_size·embed_dim", {config.vocab_size, config.attention.embed_dim});
    detail::checked_product(kName, "num_layers·hidden_dim·embed_dim",
                            {config.num_layers, config.hidden_dim, config.attention.embed_dim});
    return config;
  }

  typename Attention::Config attention_config(Index layer) const {
    typename Attention::Config config = config_.attention;
    if constexpr (requires { config.depth; }) config.depth = layer;
    config.seed = config_.seed + 1 + static_cast<std::uint64_t>(layer);
    return config;
  }

  Config config_;

 public:
  Weight embedding;  ///< vocab_size x embed_dim
  std::vector<Block> blocks;
  RmsNorm<Scalar> norm;                        ///< before the head
  std::optional<Linear<Scalar, Weight>> head;  ///< vocab_size x embed_dim; empty if tied
};

}  // namespace diffattn::inline v0_1
