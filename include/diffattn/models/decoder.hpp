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

#include <algorithm>
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
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/frozen_matrix.hpp"
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rms_norm.hpp"
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

/// One layer of a Decoder: x += attention(attention_norm(x)); x += feed_forward(feed_forward_norm(x)).
template <typename Scalar, typename Attention>
struct DecoderBlock {
  using Weight = typename Attention::WeightMatrix;

  DecoderBlock(const typename Attention::Config& config, Index hidden_dim, double norm_eps)
      : attention_norm(config.embed_dim, norm_eps),
        attention(config),
        feed_forward_norm(config.embed_dim, norm_eps),
        feed_forward(config.embed_dim, hidden_dim) {}

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    detail::visit_part("input_layernorm", self.attention_norm, visitor);
    detail::visit_part("self_attn", self.attention, visitor);
    detail::visit_part("post_attention_layernorm", self.feed_forward_norm, visitor);
    detail::visit_part("mlp", self.feed_forward, visitor);
  }

  using Tape = DecoderBlockTape<Scalar, Attention>;

  /// y (n x embed_dim) = block(x), keeping what backward needs beside x.
  template <Executor E>
  void forward_into(Matrix<Scalar>& y, const Matrix<Scalar>& x, std::span<const Index> lengths, Tape& tape,
                    Workspace& workspace, E& executor) const {
    const auto frame = workspace.frame();
    detail::MatrixMap<Scalar> normed(workspace.take<Scalar>(x.size()), x.rows(), x.cols());
    tape.attended.resize(x.rows(), x.cols());
    attention_norm.forward_rows(normed.data(), x.data(), x.rows(), executor);
    attention.forward_into(tape.attended, normed, CausalMask{}, lengths, tape.attention, workspace, executor);
    tape.attended += x;
    feed_forward_norm.forward_rows(normed.data(), tape.attended.data(), x.rows(), executor);
    feed_forward.forward_into(y, normed, tape.feed_forward, workspace, executor);
    y += tape.attended;
  }

  /// Turns dy, the gradient of y, into that of x, in place.
  template <Executor E>
  void backward_in_place(detail::MatrixMap<Scalar>& dy, const Matrix<Scalar>& x, const Tape& tape, DecoderBlock& grad,
                         Workspace& workspace, E& executor) const {
    const auto frame = workspace.frame();
    detail::MatrixMap<Scalar> dnormed(workspace.take<Scalar>(x.size()), x.rows(), x.cols());
    const auto through_norm = [&](const RmsNorm<Scalar>& norm, const Matrix<Scalar>& before, RmsNorm<Scalar>& to) {
      norm.backward_rows(dy.data(), dnormed.data(), before.data(), x.rows(), to, Scalar(1), detail::Store::add,
                         workspace, executor);
    };
    feed_forward.backward_into(dnormed, dy, tape.feed_forward, grad.feed_forward, workspace, executor);
    through_norm(feed_forward_norm, tape.attended, grad.feed_forward_norm);
    attention.backward_into(dnormed, dy, tape.attention, grad.attention, workspace, executor);
    through_norm(attention_norm, x, grad.attention_norm);
  }

  RmsNorm<Scalar> attention_norm;
  Attention attention;
  RmsNorm<Scalar> feed_forward_norm;
  FeedForward<Scalar, Weight> feed_forward;
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
    detail::MatrixMap<Scalar> x(workspace.take<Scalar>(n * embedding.cols()), n, embedding.cols());
    Matrix<Scalar> result(n, config_.vocab_size);
    hidden_into(x, tokens, cache, workspace);
    head_into(result, x, workspace);
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
    detail::MatrixMap<Scalar> x(workspace.take<Scalar>(n * embedding.cols()), n, embedding.cols());
    hidden_into(x, tokens, workspace, executor);
    head_into(y, x, workspace, executor);
  }

  /// x (tokens x embed_dim): what the head is multiplied with, after the last norm.
  template <typename Tokens, Executor E = Serial>
  void hidden_into(detail::MatrixMap<Scalar>& x, const Tokens& tokens, Workspace& workspace, E&& executor = {}) const {
    embed_into(x, tokens);
    run_blocks(x, workspace, executor, [&](const Block& block, std::size_t /*layer*/, auto& y, const auto& normed) {
      block.attention.forward_into(y, normed, CausalMask{}, workspace, executor);
    });
  }

  /// The same for the tokens that follow those in `cache`.
  template <typename Tokens, typename Storage, Executor E = Serial>
  void hidden_into(detail::MatrixMap<Scalar>& x, const Tokens& tokens, DecoderCache<Storage>& cache,
                   Workspace& workspace, E&& executor = {}) const {
    check_cache(cache, x.rows());
    embed_into(x, tokens);
    const Index before = cache.position();
    try {
      run_blocks(x, workspace, executor, [&](const Block& block, std::size_t layer, auto& y, const auto& normed) {
        block.attention.forward_into(y, normed, cache.layers[layer], workspace, executor);
      });
    } catch (...) {
      cache.roll_back(before);
      throw;
    }
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
    const Index n = static_cast<Index>(std::size(tokens));
    detail::check_shape(kName, "logits", y, n, config_.vocab_size);
    detail::check_lengths(kName, lengths, n);
    check_tokens(tokens);
    tape.filled = false;  // until this has come to its end
    tape.tokens.assign(std::begin(tokens), std::end(tokens));
    tape.lengths.assign(lengths.begin(), lengths.end());
    tape.blocks.resize(tape.recompute ? 1 : blocks.size());
    tape.inputs.resize(blocks.size() + 1);
    for (Matrix<Scalar>& input : tape.inputs) input.resize(n, embedding.cols());
    tape.hidden.resize(n, embedding.cols());
    detail::MatrixMap<Scalar> x(tape.inputs[0].data(), n, embedding.cols());
    embed_into(x, tokens);
    for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
      blocks[layer].forward_into(tape.inputs[layer + 1], tape.inputs[layer], lengths,
                                 tape.blocks[tape.recompute ? 0 : layer], workspace, executor);
    }
    norm.forward_rows(tape.hidden.data(), tape.inputs.back().data(), n, executor);
    head_into(y, tape.hidden, workspace, executor);
    tape.filled = true;
  }

  /// Adds to the parameters of `grad`, a decoder of the same configuration, their gradients: from dlogits, the gradient
  /// of the logits, and the tape of the forward pass. Throws, before any work,
  /// std::invalid_argument for a tape that is not this decoder's, ShapeError for a dlogits or grad of another shape.
  void backward(const Matrix<Scalar>& dlogits, Tape& tape, Decoder& grad) const {
    Workspace workspace;
    backward(dlogits, tape, grad, workspace);
  }

  template <typename DY, Executor E = Serial>
  void backward(const Eigen::MatrixBase<DY>& dlogits, Tape& tape, Decoder& grad, Workspace& workspace,
                E&& executor = {}) const {
    const Index n = dlogits.rows(), embed_dim = embedding.cols();
    if (!tape.filled) {
      detail::throw_invalid({kName, ": backward needs a tape that logits(tokens, lengths, tape) has filled"});
    }
    if (tape.inputs.size() != blocks.size() + 1 || tape.blocks.size() != (tape.recompute ? 1 : blocks.size()) ||
        tape.hidden.cols() != embed_dim) {
      detail::throw_invalid({kName, ": the tape was filled by a decoder of another configuration"});
    }
    detail::check_shape(kName, "dlogits", dlogits, tape.hidden.rows(), config_.vocab_size);
    detail::check_gradient(kName, *this, grad);

    const auto frame = workspace.frame();
    detail::MatrixMap<Scalar> dx(workspace.take<Scalar>(n * embed_dim), n, embed_dim);
    if (head) {
      head->backward_into(dx, dlogits, tape.hidden, grad.head.value(), workspace, executor);
    } else {
      linear_backward_into<Scalar>(dx, grad.embedding, dlogits, tape.hidden, embedding, detail::Store::overwrite,
                                   workspace, executor);
    }
    norm.backward_rows(dx.data(), dx.data(), tape.inputs.back().data(), n, grad.norm, Scalar(1),
                       detail::Store::overwrite, workspace, executor);
    for (std::size_t layer = blocks.size(); layer-- > 0;) {
      typename Block::Tape& block_tape = tape.blocks[tape.recompute ? 0 : layer];
      if (tape.recompute) {
        // The output goes where the next block's input was, which it is, bit for bit.
        blocks[layer].forward_into(tape.inputs[layer + 1], tape.inputs[layer], tape.lengths, block_tape, workspace,
                                   executor);
      }
      blocks[layer].backward_in_place(dx, tape.inputs[layer], block_tape, grad.blocks[layer], workspace, executor);
    }
    for (Index i = 0; i < n; ++i) grad.embedding.row(tape.tokens[static_cast<std::size_t>(i)]) += dx.row(i);
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visitor("embed_tokens.weight", self.embedding);
    for (std::size_t layer = 0; layer < self.blocks.size(); ++layer) {
      detail::visit_part("layers." + std::to_string(layer), self.blocks[layer], visitor);
    }
    detail::visit_part("norm", self.norm, visitor);
    if (self.head) detail::visit_part("lm_head", *self.head, visitor);
  }

 private:
  static constexpr const char* kName = "Decoder";
  static constexpr bool kFrozen = std::is_same_v<Weight, FrozenMatrix>;

  static Config checked(Config config) {
    detail::check_positive(kName, "vocab_size", config.vocab_size);
    detail::check_positive(kName, "num_layers", config.num_layers);
    detail::check_positive(kName, "hidden_dim", config.hidden_dim);
    detail::check_positive(kName, "attention.embed_dim", config.attention.embed_dim);
    return config;
  }

  typename Attention::Config attention_config(Index layer) const {
    typename Attention::Config config = config_.attention;
    if constexpr (requires { config.depth; }) config.depth = layer;
    config.seed = config_.seed + 1 + static_cast<std::uint64_t>(layer);
    return config;
  }

  /// Copies the embeddings of the tokens, all of which are checked before.
  template <typename Tokens>
  void embed_into(detail::MatrixMap<Scalar>& x, const Tokens& tokens) const {
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

  /// All blocks and the last norm on x in place; attend(block, layer, y, normed) is the attention.
  template <Executor E, typename Attend>
  void run_blocks(detail::MatrixMap<Scalar>& x, Workspace& workspace, E& executor, Attend&& attend) const {
    const auto frame = workspace.frame();
    detail::MatrixMap<Scalar> normed(workspace.take<Scalar>(x.size()), x.rows(), x.cols());
    detail::MatrixMap<Scalar> y(workspace.take<Scalar>(x.size()), x.rows(), x.cols());
    const auto normalize = [&](const RmsNorm<Scalar>& with, detail::MatrixMap<Scalar>& to) {
      detail::for_each_row_block(x.rows(), executor, [&](Index row, Index count) {
        if (&to != &x) detail::rows_of(to, row, count) = detail::rows_of(x, row, count);
        for (Index i = row; i < row + count; ++i) with.apply(&to(i, 0));
      });
    };
    for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
      const Block& block = blocks[layer];
      normalize(block.attention_norm, normed);
      attend(block, layer, y, normed);
      x += y;
      normalize(block.feed_forward_norm, normed);
      block.feed_forward.forward_into(y, normed, workspace, executor);
      x += y;
    }
    normalize(norm, x);
  }

  Config config_;

 public:
  Weight embedding;  ///< vocab_size x embed_dim
  std::vector<Block> blocks;
  RmsNorm<Scalar> norm;                        ///< before the head
  std::optional<Linear<Scalar, Weight>> head;  ///< vocab_size x embed_dim; empty if tied
};

}  // namespace diffattn::inline v0_1
