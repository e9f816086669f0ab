#pragma once

// Encoder: a stack of transformer layers in which every token sees every other, as vision transformers, BERT and speech
// encoders are built; what goes in (patches, embeddings) and what comes after it (a head) is yours: examples/
// 10_image_encoder.cpp.
//
//   pre-norm    per layer  x += Attention(norm(x)),  x += FeedForward(norm(x));   y = norm(x)
//   post-norm   per layer  x = norm(x + Attention(x)),  x = norm(x + FeedForward(x));   y = x
//
//   Encoder<float, MultiheadDiffAttention<float>> encoder({.num_layers = 4, .hidden_dim = 256,
//                                                          .attention = {.embed_dim = 64, .num_heads = 2}});
//   y = encoder.forward(x);                      or forward(x, mask), (x, mask, lengths) for stacked sequences
//   y = encoder.forward(x, mask, tape);          or (x, mask, lengths, tape): keeps what backward needs
//   dx = encoder.backward(dy, tape, grad);       `grad` as zeros_like(encoder) makes it; gradients are added
//   encoder.forward_into(y, x, …, workspace, executor), backward_into(dx, …, workspace, executor)
//
// Attention is a layer type: MultiheadDiffAttention<Scalar>, MultiheadDiffAttentionV2<Scalar>, MultiheadAttention
// <Scalar>, or of a variant of your own. encoder_config.hpp has the choices of norm and feed-forward layer.
//
// Parameters (visit_parameters): layers.N.{attention_norm, self_attn, feed_forward_norm, mlp}.… and, pre-norm, norm.…
// x, y, dx, dy: tokens x embed_dim, either storage order and any strides; y may be x, and dx dy. The mask is FullMask
//          unless one is given; any will do, with a bias or without.
// Errors   std::invalid_argument for a configuration that cannot be, for a mask that says so of itself and for a tape
//          or grad of another encoder; ShapeError for a matrix, or lengths, that do not fit; before any work.
// Memory   (tokens x (embed_dim and hidden_dim)) scratch from the workspace; after a first call of the largest shape no
//          heap. A tape holds about 12 · embed_dim + hidden_dim values a token and layer, and no scores.
// Threads  const functions may be called from several threads, each with a workspace of its own; the same bits for any
//          executor.

#include <cstddef>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/sequences.hpp"
#include "diffattn/models/encoder_block.hpp"
#include "diffattn/models/encoder_config.hpp"
#include "diffattn/models/encoder_tape.hpp"
#include "diffattn/models/norm.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar, typename Attention>
class Encoder {
 public:
  using Config = EncoderConfig<Attention>;
  using Block = EncoderBlock<Scalar, Attention>;
  using Tape = EncoderTape<Scalar, Attention>;

  /// Initial parameters: linear layers as nn.Linear, norms 1 (and 0), attention as its layer says. Throws
  /// std::invalid_argument naming a size that is below 1 or more than memory holds.
  explicit Encoder(const Config& config) : config_(detail::checked(kName, config)) {
    Initializer random(config.seed);
    blocks.reserve(static_cast<std::size_t>(config.num_layers));
    for (Index layer = 0; layer < config.num_layers; ++layer) {
      blocks.emplace_back(config, layer);
      blocks.back().feed_forward.initialize(random);
    }
    if (config.norm_placement == NormPlacement::before) {
      norm.emplace(config.norm, config.attention.embed_dim, config.norm_eps);
    }
  }

  const Config& config() const { return config_; }

  /// y (n x embed_dim) for x (n x embed_dim), one sequence.
  template <typename X, AttentionMask Mask = FullMask>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x, const Mask& mask = {}) const {
    return forward(x, mask, {x.rows()});
  }

  /// Several sequences stacked in the rows of x: `lengths` says how many rows each has. None sees another.
  template <typename X, AttentionMask Mask>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x, const Mask& mask, const SequenceLengths& lengths) const {
    Workspace workspace;
    Matrix<Scalar> y(x.rows(), config_.attention.embed_dim);
    forward_into(y, x, mask, lengths, workspace);
    return y;
  }

  /// y for one sequence; fills the tape.
  template <typename X, AttentionMask Mask>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x, const Mask& mask, Tape& tape) const {
    return forward(x, mask, {x.rows()}, tape);
  }

  /// y for several sequences; fills the tape.
  template <typename X, AttentionMask Mask>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x, const Mask& mask, const SequenceLengths& lengths,
                         Tape& tape) const {
    Workspace workspace;
    Matrix<Scalar> y(x.rows(), config_.attention.embed_dim);
    forward_into(y, x, mask, lengths, tape, workspace);
    return y;
  }

  /// dx (n x embed_dim) from dy (n x embed_dim), the gradient of y; the gradients of the parameters are added to those
  /// of `grad`, an encoder of the same configuration.
  template <typename DY>
  Matrix<Scalar> backward(const Eigen::MatrixBase<DY>& dy, const Tape& tape, Encoder& grad) const {
    Workspace workspace;
    Matrix<Scalar> dx(dy.rows(), config_.attention.embed_dim);
    backward_into(dx, dy, tape, grad, workspace);
    return dx;
  }

  /// forward(x, mask) into y.
  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                    Workspace& workspace, E&& executor = {}) const {
    forward_into(y, x, mask, {x.rows()}, workspace, executor);
  }

  /// forward(x, mask, lengths) into y.
  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                    const SequenceLengths& lengths, Workspace& workspace, E&& executor = {}) const {
    check_sequences(y, x, mask, lengths);
    const auto frame = workspace.frame();
    MatrixMap<Scalar> hidden(workspace.take<Scalar>(x.size()), x.rows(), x.cols());
    hidden = x;
    for (const Block& block : blocks) block.forward_in_place(hidden, mask, lengths, workspace, executor);
    if (norm) norm->forward_rows(hidden.data(), hidden.data(), hidden.rows(), executor);
    copy_to(y, hidden);
  }

  /// forward(x, mask, tape) into y.
  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask, Tape& tape,
                    Workspace& workspace, E&& executor = {}) const {
    forward_into(y, x, mask, {x.rows()}, tape, workspace, executor);
  }

  /// forward(x, mask, lengths, tape) into y: the same y, bit for bit.
  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                    const SequenceLengths& lengths, Tape& tape, Workspace& workspace, E&& executor = {}) const {
    check_sequences(y, x, mask, lengths);
    tape.begin(config_, x.rows());
    tape.inputs[0] = x;
    for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
      blocks[layer].forward_into(tape.inputs[layer + 1], tape.inputs[layer], mask, lengths, tape.blocks[layer],
                                 workspace, executor);
    }
    const Matrix<Scalar>& last = tape.inputs.back();
    if (norm) {
      const auto frame = workspace.frame();
      MatrixMap<Scalar> normed(workspace.take<Scalar>(last.size()), last.rows(), last.cols());
      norm->forward_rows(normed.data(), last.data(), last.rows(), executor);
      copy_to(y, normed);
    } else {
      copy_to(y, last);
    }
    tape.filled = true;
  }

  /// backward(dy, tape, grad) into dx.
  template <typename DX, typename DY, Executor E = Serial>
  void backward_into(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape, Encoder& grad,
                     Workspace& workspace, E&& executor = {}) const {
    tape.check(kName, config_);
    const Index n = tape.inputs.back().rows(), embed_dim = config_.attention.embed_dim;
    detail::check_shape(kName, "dy", dy, n, embed_dim);
    detail::check_shape(kName, "dx", dx, n, embed_dim);
    const auto frame = workspace.frame();
    MatrixMap<Scalar> d(workspace.take<Scalar>(n * embed_dim), n, embed_dim);
    d = dy;
    if (norm) {
      norm->backward_rows(d.data(), d.data(), tape.inputs.back().data(), n, *grad.norm, Store::overwrite, workspace,
                          executor);
    }
    for (std::size_t layer = blocks.size(); layer-- > 0;) {
      blocks[layer].backward_in_place(d, tape.inputs[layer], tape.blocks[layer], grad.blocks[layer], workspace,
                                      executor);
    }
    copy_to(dx, d);
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    for (std::size_t layer = 0; layer < self.blocks.size(); ++layer) {
      visit_part("layers." + std::to_string(layer), self.blocks[layer], visitor);
    }
    if (self.norm) visit_part("norm", *self.norm, visitor);
  }

 private:
  static constexpr const char* kName = "Encoder";

  template <typename Y, typename X, typename Mask>
  void check_sequences(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                       const SequenceLengths& lengths) const {
    static_assert(std::is_same_v<typename X::Scalar, Scalar> && std::is_same_v<typename Y::Scalar, Scalar>,
                  "diffattn: x and y must have the scalar type of the encoder; convert with .template cast<>()");
    detail::check_shape(kName, "x", x, x.rows(), config_.attention.embed_dim);
    detail::check_shape(kName, "y", y, x.rows(), config_.attention.embed_dim);
    detail::check_lengths(kName, lengths, x.rows());
    for (Index s = 0; s < lengths.size(); ++s) {
      detail::check_mask(kName, mask, config_.attention.num_heads, lengths[s], lengths[s]);
    }
  }

  /// y = from, for a y of the caller's; of the same size, which has been checked.
  template <typename Y, typename From>
  static void copy_to(const Eigen::MatrixBase<Y>& y, const From& from) {
    const StridedView<Scalar> to = detail::writable_view_of(y);
    for (Index i = 0; i < to.rows; ++i) {
      for (Index j = 0; j < to.cols; ++j) to(i, j) = from(i, j);
    }
  }

  Config config_;

 public:
  std::vector<Block> blocks;
  std::optional<Norm<Scalar>> norm;  ///< of pre-norm, after the last layer
};

}  // namespace diffattn::inline v0_1
