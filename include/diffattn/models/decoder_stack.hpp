#pragma once

// DecoderStack: the parts of a Decoder, embedding, blocks, last norm and head, and the ways through them: for text at
// once, behind a cache or many, and with a tape there and back. The Decoder, which is one, has checked every argument; its
// header says what they compute.
//
// Tested by tests/models/decoder_test.cpp and decoder_tape_test.cpp.

#include <cstddef>
#include <iterator>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/frozen_matrix.hpp"
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rms_norm.hpp"
#include "diffattn/models/decoder_block.hpp"
#include "diffattn/models/decoder_cache.hpp"
#include "diffattn/models/decoder_config.hpp"
#include "diffattn/models/decoder_tape.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar, typename Attention>
class DecoderStack {
 protected:
  static constexpr const char* kName = "Decoder";

 public:
  using Config = DecoderConfig<Attention>;
  using Block = DecoderBlock<Scalar, Attention>;
  using Weight = typename Attention::WeightMatrix;
  using Tape = DecoderTape<Scalar, Attention>;

  /// The configuration, with what was left to its default filled in.
  const Config& config() const { return config_; }
  /// How many blocks there are.
  Index num_layers() const { return config_.num_layers; }

  /// Throws std::invalid_argument, naming `where`, unless all tokens are in the vocabulary.
  template <typename Tokens>
  void check_tokens(const Tokens& tokens, const char* where = kName) const {
    const auto* const ids = std::data(tokens);
    for (Index i = 0; i < static_cast<Index>(std::size(tokens)); ++i) {
      const auto id = static_cast<Index>(ids[i]);
      if (id < 0 || id >= config_.vocab_size) {
        detail::throw_invalid({where, ": token ", i, " is ", id, ", outside the vocabulary of ", config_.vocab_size});
      }
    }
  }

  /// Throws, naming `where`, std::invalid_argument or ShapeError unless the cache is one for this model and has room for
  /// so many tokens.
  template <typename Storage>
  void check_cache(const DecoderCache<Storage>& cache, Index tokens, const char* where = kName) const {
    cache.check_room(where, config_.num_layers, tokens);
    for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
      blocks[layer].attention.check_cache(where, cache.layers[layer], tokens);
    }
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visitor("embed_tokens.weight", self.embedding);
    visit_part("layers", self.blocks, visitor);
    visit_part("norm", self.norm, visitor);
    visit_part("lm_head", self.head, visitor);
  }

 private:
  static constexpr bool kFrozen = std::is_same_v<Weight, FrozenMatrix>;
  Config config_;

 public:
  Weight embedding;  ///< vocab_size x embed_dim
  std::vector<Block> blocks;
  RmsNorm<Scalar> norm;                        ///< before the head
  std::optional<Linear<Scalar, Weight>> head;  ///< vocab_size x embed_dim; empty if tied

 protected:
  explicit DecoderStack(const Config& config)
      : config_(detail::checked(kName, config)),
        embedding(config_.vocab_size, config_.attention.embed_dim),
        norm(config_.attention.embed_dim, config_.norm_eps) {
    Initializer random(config_.seed);
    if constexpr (!kFrozen) random.normal(embedding, 0.02);
    blocks.reserve(static_cast<std::size_t>(config_.num_layers));
    for (Index layer = 0; layer < config_.num_layers; ++layer) {
      blocks.emplace_back(config_.attention_of(layer), config_.hidden_dim, config_.norm_eps, config_.arithmetic);
      blocks.back().feed_forward.initialize(random);
    }
    if (!config_.tied_head) {
      head.emplace(config_.attention.embed_dim, config_.vocab_size, false, config_.arithmetic);
      head->initialize(random);
    }
  }

  /// Room for the hidden values of n tokens.
  MatrixMap<Scalar> rows(Index n, Workspace& workspace) const {
    return MatrixMap<Scalar>(workspace.take<Scalar>(n * embedding.cols()), n, embedding.cols());
  }

  /// x (n x embed_dim): the embeddings of n tokens.
  template <typename X, typename Token>
  void embed(X& x, const Token* tokens) const {
    for (Index i = 0; i < x.rows(); ++i) {
      const auto token = static_cast<Index>(tokens[i]);
      if constexpr (kFrozen) {
        embedding.copy_row(token, &x(i, 0));
      } else {
        x.row(i) = embedding.row(token).template cast<Scalar>();
      }
    }
  }

  /// x, embedded tokens, becomes what the head is multiplied with.
  template <typename Mask, Executor E>
  void run(MatrixMap<Scalar>& x, const Mask& mask, Workspace& workspace, E& executor) const {
    for (const Block& block : blocks) block.forward_in_place(x, mask, workspace, executor);
    norm.forward_rows(x.data(), x.data(), x.rows(), executor);
  }

  /// The same behind a cache, in a transaction of the caller's.
  template <typename Storage, typename Mask, Executor E>
  void run_cached(MatrixMap<Scalar>& x, DecoderCache<Storage>& cache, const Mask& mask, Workspace& workspace,
                  E& executor) const {
    for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
      blocks[layer].forward_in_place(x, cache.layers[layer], mask, workspace, executor);
    }
    norm.forward_rows(x.data(), x.data(), x.rows(), executor);
  }

  /// The same behind a cache for each row, in a transaction of the caller's.
  template <typename Storage, typename Mask, Executor E>
  void run_cached(MatrixMap<Scalar>& x, std::span<DecoderCache<Storage>* const> caches, const Mask& mask,
                  Workspace& workspace, E& executor) const {
    const auto frame = workspace.frame();
    auto* const of_layer = workspace.take<KvCache<Storage>*>(x.rows());
    std::span<KvCache<Storage>* const> batch(of_layer, caches.size());
    for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
      for (std::size_t i = 0; i < caches.size(); ++i) of_layer[i] = &caches[i]->layers[layer];
      blocks[layer].forward_in_place(x, batch, mask, workspace, executor);
    }
    norm.forward_rows(x.data(), x.data(), x.rows(), executor);
  }

  /// The same for the tokens of a tape that was begun: from its first input to its `hidden`.
  template <typename Mask, Executor E>
  void run_on_tape(const Mask& mask, Tape& tape, Workspace& workspace, E& executor) const {
    embed(tape.inputs[0], tape.tokens.data());
    for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
      run_on_tape(layer, mask, tape, workspace, executor);
    }
    norm.forward_rows(tape.hidden.data(), tape.inputs.back().data(), tape.hidden.rows(), executor);
  }

  /// dx (n x embed_dim), the gradient of the tape's `hidden`, goes back through norm, blocks and embedding, whose
  /// gradients are added to those of `grad`; that of a learned bias to dbias, if there is one.
  template <Executor E, typename... DBias>
  void run_back(MatrixMap<Scalar>& dx, Tape& tape, DecoderStack& grad, Workspace& workspace, E& executor,
                const DBias&... dbias) const {
    norm.backward_rows(dx.data(), dx.data(), tape.inputs.back().data(), dx.rows(), grad.norm, Scalar(1),
                       Store::overwrite, workspace, executor);
    for (std::size_t layer = blocks.size(); layer-- > 0;) {
      // The output goes where the next block's input was, which it is, bit for bit.
      if (tape.recompute) run_on_tape(layer, CausalMask{}, tape, workspace, executor);
      blocks[layer].backward_in_place(dx, tape.inputs[layer], tape.block(layer), grad.blocks[layer], workspace,
                                      executor, dbias...);
    }
    for (Index i = 0; i < dx.rows(); ++i) {
      grad.embedding.row(tape.tokens[static_cast<std::size_t>(i)]) += dx.row(i);
    }
  }

 private:
  template <typename Mask, Executor E>
  void run_on_tape(std::size_t layer, const Mask& mask, Tape& tape, Workspace& workspace, E& executor) const {
    blocks[layer].forward_into(tape.inputs[layer + 1], tape.inputs[layer], mask, tape.lengths, tape.block(layer),
                               workspace, executor);
  }
};

}  // namespace diffattn::inline v0_1
