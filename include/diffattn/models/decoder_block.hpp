#pragma once

// One layer of a Decoder, pre-norm, as the paper has it (section 2.2) and Llama:
//
//   x += attention(attention_norm(x));   x += feed_forward(feed_forward_norm(x))
//
// Three passes: in place, alone or behind a cache; forward with a tape; backward from that tape. The Decoder has
// checked what they are given.
//
// Parameters (visit_parameters): input_layernorm, self_attn, post_attention_layernorm, mlp.
// Shapes   x, y (n x embed_dim), n >= 0.
// Memory   2 · n · embed_dim values of the workspace, beside what attention and feed-forward take; no heap after a
//          first call.

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/row_blocks.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rms_norm.hpp"
#include "diffattn/layers/sequences.hpp"
#include "diffattn/models/feed_forward.hpp"

namespace diffattn::inline v0_1 {

/// What backward_in_place needs of forward_into, beside x.
template <typename Scalar, typename Attention>
struct DecoderBlockTape {
  typename Attention::Tape attention;
  typename FeedForward<Scalar>::Tape feed_forward;
  Matrix<Scalar> attended;  ///< n x embed_dim: x + attention(norm(x)), before the second norm
};

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
    visit_part("input_layernorm", self.attention_norm, visitor);
    visit_part("self_attn", self.attention, visitor);
    visit_part("post_attention_layernorm", self.feed_forward_norm, visitor);
    visit_part("mlp", self.feed_forward, visitor);
  }

  /// x = block(x), in place, for the tokens of one sequence.
  template <AttentionMask Mask, Executor E>
  void forward_in_place(MatrixMap<Scalar>& x, const Mask& mask, Workspace& workspace, E& executor) const {
    forward_around(x, workspace, executor, [&](MatrixMap<Scalar>& y, const MatrixMap<Scalar>& normed) {
      attention.forward_into(y, normed, mask, workspace, executor);
    });
  }

  /// The same for the tokens that follow those in `cache`, which they join: a KvCache, or a batch of them, one a row.
  template <typename Cache, AttentionMask Mask, Executor E>
  void forward_in_place(MatrixMap<Scalar>& x, Cache& cache, const Mask& mask, Workspace& workspace, E& executor) const {
    forward_around(x, workspace, executor, [&](MatrixMap<Scalar>& y, const MatrixMap<Scalar>& normed) {
      attention.forward_into(y, normed, cache, mask, workspace, executor);
    });
  }

  using Tape = DecoderBlockTape<Scalar, Attention>;

  /// y (n x embed_dim) = block(x), keeping what backward needs beside x.
  template <AttentionMask Mask, Executor E>
  void forward_into(Matrix<Scalar>& y, const Matrix<Scalar>& x, const Mask& mask, const SequenceLengths& lengths,
                    Tape& tape, Workspace& workspace, E& executor) const {
    // Norms write where the layers behind them would keep a copy.
    Matrix<Scalar>& attention_x = tape.attention.x;
    Matrix<Scalar>& feed_forward_x = tape.feed_forward.x;
    for (Matrix<Scalar>* part : {&attention_x, &feed_forward_x, &tape.attended}) part->resize(x.rows(), x.cols());
    attention_norm.forward_rows(attention_x.data(), x.data(), x.rows(), executor);
    attention.forward_into(tape.attended, attention_x, mask, lengths, tape.attention, workspace, executor);
    feed_forward_norm.add_forward_rows(feed_forward_x.data(), tape.attended.data(), x.data(), x.rows(), executor);
    feed_forward.forward_into(y, feed_forward_x, tape.feed_forward, workspace, executor);
    detail::add_rows(y, tape.attended, executor);
  }

  /// Turns dy, the gradient of y, into that of x, in place.
  template <Executor E>
  void backward_in_place(MatrixMap<Scalar>& dy, const Matrix<Scalar>& x, const Tape& tape, DecoderBlock& grad,
                         Workspace& workspace, E& executor) const {
    const auto frame = workspace.frame();
    MatrixMap<Scalar> dnormed(workspace.take<Scalar>(x.size()), x.rows(), x.cols());
    const auto through_norm = [&](const RmsNorm<Scalar>& norm, const Matrix<Scalar>& before, RmsNorm<Scalar>& to) {
      norm.backward_rows(dy.data(), dnormed.data(), before.data(), x.rows(), to, Scalar(1), Store::add, workspace,
                         executor);
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

 private:
  /// The block around its attention: attend(y, normed) computes y from normed.
  template <Executor E, typename Attend>
  void forward_around(MatrixMap<Scalar>& x, Workspace& workspace, E& executor, Attend&& attend) const {
    const auto frame = workspace.frame();
    MatrixMap<Scalar> normed(workspace.take<Scalar>(x.size()), x.rows(), x.cols());
    MatrixMap<Scalar> y(workspace.take<Scalar>(x.size()), x.rows(), x.cols());
    attention_norm.forward_rows(normed.data(), x.data(), x.rows(), executor);
    attend(y, normed);
    feed_forward_norm.add_forward_rows(normed.data(), x.data(), y.data(), x.rows(), executor);
    feed_forward.forward_into(y, normed, workspace, executor);
    detail::add_rows(x, y, executor);
  }
};

}  // namespace diffattn::inline v0_1
