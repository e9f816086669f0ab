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
//   Matrix<float> logits = model.logits({1, 2, 3});             or (tokens, mask): (tokens x vocab_size)
//   auto cache = model.make_cache();  model.logits(prompt, cache);  model.logits({token}, cache);
//   model.logits(tokens, lengths, tape);  model.backward(dlogits, tape, grad);
//   model.logits_into(y, …, workspace, executor)                into a matrix of yours, scratch and threads from you
//
// Tokens   any contiguous integers: a std::vector, std::span, Eigen vector or {1, 2, 3}.
// Errors   std::invalid_argument for a configuration that cannot be, for a token id outside the vocabulary and for a
//          cache of another model or without room, ShapeError for a matrix that does not fit; before any work.
//          Const functions may be called from several threads, each with a workspace and a cache of its own.
// Memory   (tokens x (embed_dim and hidden_dim)) scratch from the workspace; after a first call of the largest shape no
//          heap, but for pages by which a cache grows.

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <span>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/cache_batch.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/sequences.hpp"
#include "diffattn/models/decoder_cache.hpp"
#include "diffattn/models/decoder_config.hpp"
#include "diffattn/models/decoder_stack.hpp"
#include "diffattn/models/decoder_tape.hpp"
#include "diffattn/models/language_model.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar, typename Attention>
class Decoder : public DecoderStack<Scalar, Attention>, public LanguageModel<Decoder<Scalar, Attention>, Scalar> {
  using Stack = DecoderStack<Scalar, Attention>;
  using Calls = LanguageModel<Decoder, Scalar>;
  using Calls::size_of;
  using Stack::kName;

 public:
  using typename Stack::Config;
  using typename Stack::Tape;
  // Parameters and checks, which decoder_stack.hpp describes.
  using Stack::blocks;
  using Stack::check_cache;
  using Stack::check_tokens;
  using Stack::config;
  using Stack::embedding, Stack::head;
  // What language_model.hpp describes; below are the forms with a tape, and those that take everything.
  using Calls::logits, Calls::logits_into;

  /// Initial parameters: embedding N(0, 0.02²), linear layers as nn.Linear, norms 1, attention as its layer says.
  /// Throws std::invalid_argument naming a size that is below 1 or more than memory holds.
  explicit Decoder(const Config& sizes) : Stack(sizes) {}

  /// A cache for this model, whose storage type is free: make_cache<Eigen::bfloat16>(). Throws std::invalid_argument
  /// for options that KvCache refuses.
  template <typename Storage = Scalar>
  DecoderCache<Storage> make_cache(const KvCacheOptions& options = {}) const {
    return DecoderCache<Storage>(config().num_layers, options);
  }

  /// The logits of sequences stacked in `tokens`, `lengths` long, none of which sees another; what backward needs of
  /// this pass goes into `tape`.
  template <typename Tokens>
  Matrix<Scalar> logits(const Tokens& tokens, const SequenceLengths& lengths, Tape& tape) const {
    return logits(tokens, CausalMask{}, lengths, tape);
  }
  template <typename Tokens, AttentionMask Mask>
  Matrix<Scalar> logits(const Tokens& tokens, const Mask& mask, const SequenceLengths& lengths, Tape& tape) const {
    Workspace workspace;
    Matrix<Scalar> result(size_of(tokens), config().vocab_size);
    logits_into(result, tokens, mask, lengths, tape, workspace);
    return result;
  }

  /// Adds to the parameters of `grad`, a decoder of the same configuration, their gradients: from dlogits, the gradient
  /// of the logits, and the tape of the forward pass. Throws, before any work, std::invalid_argument for a tape that is
  /// not this decoder's, ShapeError for a dlogits or grad of another shape. After anything else that is thrown
  /// (std::bad_alloc, by an executor), model and tape are as before, but `grad` holds some of the gradients: set it to
  /// zero and begin the step again.
  void backward(const Matrix<Scalar>& dlogits, Tape& tape, Decoder& grad) const {
    Workspace workspace;
    backward(dlogits, tape, grad, workspace);
  }
  /// The same, and the gradient of the mask's learned bias (learned_bias.hpp), a sum over the layers, is added to dbias,
  /// which has the shape of its table.
  template <typename DB>
  void backward(const Matrix<Scalar>& dlogits, Tape& tape, Decoder& grad, const Eigen::MatrixBase<DB>& dbias) const {
    Workspace workspace;
    backward(dlogits, tape, grad, dbias, workspace);
  }

  /// logits(tokens, mask) into y (tokens x vocab_size).
  template <typename Y, typename Tokens, AttentionMask Mask, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, const Mask& mask, Workspace& workspace,
                   E&& executor = {}) const {
    detail::with_others(executor, kName, Stack::num_layers(), [&] {
      detail::check_shape(kName, "logits", y, size_of(tokens), config().vocab_size);
      const auto frame = workspace.frame();
      auto x = Stack::rows(size_of(tokens), workspace);
      hidden_into(x, tokens, mask, workspace, executor);
      head_into(y, x, workspace, executor);
    });
  }

  /// logits(tokens, cache, mask) into y.
  template <typename Y, typename Tokens, typename Storage, AttentionMask Mask, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, DecoderCache<Storage>& cache, const Mask& mask,
                   Workspace& workspace, E&& executor = {}) const {
    detail::CacheTransaction transaction(cache);
    detail::with_others(executor, kName, Stack::num_layers(), [&] {
      detail::check_shape(kName, "logits", y, size_of(tokens), config().vocab_size);
      const auto frame = workspace.frame();
      auto x = Stack::rows(size_of(tokens), workspace);
      hidden_into(x, tokens, cache, mask, workspace, executor);
      head_into(y, x, workspace, executor);
    });
    transaction.keep();
  }

  /// logits(tokens, caches, mask) into y: every product is one for all sequences.
  template <typename Y, typename Tokens, CacheBatch<DecoderCache> Caches, AttentionMask Mask, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, Caches&& caches, const Mask& mask,
                   Workspace& workspace, E&& executor = {}) const {
    const Index n = size_of(tokens);
    const auto batch = detail::batch_of<DecoderCache>(std::data(caches), std::size(caches));
    detail::check_shape(kName, "logits", y, n, config().vocab_size);
    detail::check_batch(kName, "tokens", n, batch, workspace);
    detail::check_sequences(kName, n, [&](const char* where, Index i) {
      check_tokens(std::span(std::data(tokens) + i, 1), where);
      check_cache(*batch[static_cast<std::size_t>(i)], 1, where);
    });
    if (n == 0) return;
    const auto frame = workspace.frame();
    auto x = Stack::rows(n, workspace);
    detail::BatchTransaction transaction(batch, workspace);
    Stack::embed(x, std::data(tokens));
    Stack::run_cached(x, batch, mask, workspace, executor);
    head_into(y, x, workspace, executor);
    transaction.keep();
  }

  /// y (1 x vocab_size): the logits behind the last of `tokens` alone, which follow those in `cache` and are fed
  /// `chunk` (1 or more) at a time, so that scratch grows with the chunk and not with the tokens. There must be one
  /// token at least. Whatever is thrown, the cache is as before.
  template <typename Y, typename Tokens, typename Storage, AttentionMask Mask, Executor E = Serial>
  void last_logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, DecoderCache<Storage>& cache,
                        const Mask& mask, Index chunk, Workspace& workspace, E&& executor = {}) const {
    const Index n = size_of(tokens);
    if (n < 1) detail::throw_invalid({kName, ": there is no last one of no tokens"});
    detail::check_positive(kName, "chunk", chunk);
    detail::check_shape(kName, "logits", y, 1, config().vocab_size);
    check_tokens(tokens);
    check_cache(cache, n);
    using Feeding = typename detail::CacheTransaction<Storage>::Calls;
    detail::CacheTransaction<Storage> transaction(cache, n > chunk ? Feeding::several : Feeding::one);
    for (Index at = 0; at < n; at += chunk) {
      const Index count = std::min(chunk, n - at);
      const auto frame = workspace.frame();
      auto x = Stack::rows(count, workspace);
      Stack::embed(x, std::data(tokens) + at);
      Stack::run_cached(x, cache, mask, workspace, executor);
      if (at + count == n) head_into(y, detail::rows_of(x, count - 1, 1), workspace, executor);
    }
    transaction.keep();
  }

  /// logits(tokens, lengths, tape) and logits(tokens, mask, lengths, tape) into y.
  template <typename Y, typename Tokens, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, const SequenceLengths& lengths, Tape& tape,
                   Workspace& workspace, E&& executor = {}) const {
    logits_into(y, tokens, CausalMask{}, lengths, tape, workspace, executor);
  }
  template <typename Y, typename Tokens, AttentionMask Mask, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, const Mask& mask,
                   const SequenceLengths& lengths, Tape& tape, Workspace& workspace, E&& executor = {}) const {
    const Index n = size_of(tokens);
    detail::check_before(executor, kName, [&] {
      if (!std::is_same_v<Mask, CausalMask> && tape.recompute) {
        detail::throw_invalid({kName, ": a tape with recompute takes a CausalMask only"});
      }
      detail::check_shape(kName, "logits", y, n, config().vocab_size);
      detail::check_lengths(kName, lengths, n);
      check_tokens(tokens);
    });
    detail::with_others(executor, kName, Stack::num_layers(), [&] {
      tape.begin(tokens, lengths, blocks.size(), embedding.cols());
      Stack::run_on_tape(mask, tape, workspace, executor);
      head_into(y, tape.hidden, workspace, executor);
    });
    tape.filled = true;
  }

  /// backward with scratch from `workspace` and work spread over `executor`.
  template <typename DY, Executor E = Serial>
  void backward(const Eigen::MatrixBase<DY>& dlogits, Tape& tape, Decoder& grad, Workspace& workspace,
                E&& executor = {}) const {
    go_back(dlogits, tape, grad, workspace, executor);
  }
  template <typename DY, typename DB, Executor E = Serial>
  void backward(const Eigen::MatrixBase<DY>& dlogits, Tape& tape, Decoder& grad, const Eigen::MatrixBase<DB>& dbias,
                Workspace& workspace, E&& executor = {}) const {
    go_back(dlogits, tape, grad, workspace, executor, dbias);
  }

  /// x (tokens x embed_dim): the embeddings of the tokens.
  template <typename Tokens>
  void embed_into(MatrixMap<Scalar>& x, const Tokens& tokens) const {
    detail::check_shape(kName, "x", x, size_of(tokens), embedding.cols());
    check_tokens(tokens);
    Stack::embed(x, std::data(tokens));
  }

  /// x (tokens x embed_dim): what the head is multiplied with, after the last norm.
  template <typename Tokens, Executor E = Serial>
  void hidden_into(MatrixMap<Scalar>& x, const Tokens& tokens, Workspace& workspace, E&& executor = {}) const {
    hidden_into(x, tokens, CausalMask{}, workspace, executor);
  }
  template <typename Tokens, AttentionMask Mask, Executor E = Serial>
  void hidden_into(MatrixMap<Scalar>& x, const Tokens& tokens, const Mask& mask, Workspace& workspace,
                   E&& executor = {}) const {
    embed_into(x, tokens);
    Stack::run(x, mask, workspace, executor);
  }

  /// The same for the tokens that follow those in `cache`, which is as before if anything throws.
  template <typename Tokens, typename Storage, Executor E = Serial>
  void hidden_into(MatrixMap<Scalar>& x, const Tokens& tokens, DecoderCache<Storage>& cache, Workspace& workspace,
                   E&& executor = {}) const {
    hidden_into(x, tokens, cache, CausalMask{}, workspace, executor);
  }
  template <typename Tokens, typename Storage, AttentionMask Mask, Executor E = Serial>
  void hidden_into(MatrixMap<Scalar>& x, const Tokens& tokens, DecoderCache<Storage>& cache, const Mask& mask,
                   Workspace& workspace, E&& executor = {}) const {
    detail::CacheTransaction transaction(cache);
    detail::with_others(executor, kName, Stack::num_layers(), [&] {
      detail::check_shape(kName, "x", x, size_of(tokens), embedding.cols());
      check_tokens(tokens);
      check_cache(cache, x.rows());
      Stack::embed(x, std::data(tokens));
      Stack::run_cached(x, cache, mask, workspace, executor);
    });
    transaction.keep();
  }

  /// y (n x vocab_size) = x (n x embed_dim) W_headᵀ.
  template <typename Y, typename X, Executor E = Serial>
  void head_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Workspace& workspace,
                 E&& executor = {}) const {
    detail::check_shape(kName, "x", x, x.rows(), embedding.cols());
    detail::check_shape(kName, "logits", y, x.rows(), embedding.rows());
    if (head) return head->forward_into(y, x, workspace, executor);
    linear_into<Scalar>(y, x, embedding, workspace, executor, nullptr, config().arithmetic);
  }

 private:
  /// backward, with a dbias or without.
  template <typename DY, Executor E, typename... DBias>
  void go_back(const Eigen::MatrixBase<DY>& dlogits, Tape& tape, Decoder& grad, Workspace& workspace, E& executor,
               const DBias&... dbias) const {
    detail::check_before(executor, kName, [&] {
      tape.check(kName, blocks.size(), embedding.cols());
      detail::check_shape(kName, "dlogits", dlogits, tape.hidden.rows(), config().vocab_size);
      detail::check_gradient(kName, *this, grad);
      (blocks.front().attention.check_bias_gradient(dbias, tape.blocks.front().attention), ...);
    });
    detail::with_others(executor, kName, Stack::num_layers(), [&] {
      const auto frame = workspace.frame();
      auto dx = Stack::rows(dlogits.rows(), workspace);
      if (head) {
        head->backward_into(dx, dlogits, tape.hidden, grad.head.value(), workspace, executor);
      } else {
        linear_backward_into<Scalar>(dx, grad.embedding, dlogits, tape.hidden, embedding, Store::overwrite, workspace,
                                     executor);
      }
      Stack::run_back(dx, tape, grad, workspace, executor, dbias...);
    });
  }
};

}  // namespace diffattn::inline v0_1
