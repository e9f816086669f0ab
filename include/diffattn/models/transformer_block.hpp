#pragma once

// TransformerBlock: attention and a feed-forward layer, each with a norm and a residual connection: what the layers of
// a Decoder and of an Encoder have in common.
//
//   norms before   x += attention(attention_norm(x));     x += feed_forward(feed_forward_norm(x))        as Llama
//   norms after    x = attention_norm(x + attention(x));  x = feed_forward_norm(x + feed_forward(x))     as BERT
//
// Three passes: in place; forward with a tape; backward from that tape. The model has checked what they are given.
//
// Norm     RmsNorm<Scalar> or Norm<Scalar>.
// Shapes   x, y (n x embed_dim), n >= 0.
// Memory   2 · n · embed_dim values of the workspace, beside what attention and feed-forward take; no heap after a
//          first call.
//
// Tested by tests/models/decoder_block_test.cpp, encoder_test.cpp and encoder_gradients_test.cpp.

#include <cstdint>
#include <utility>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/row_blocks.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/arithmetic.hpp"
#include "diffattn/layers/sequences.hpp"
#include "diffattn/models/feed_forward.hpp"

namespace diffattn::inline v0_1 {

enum class NormPlacement { before, after };

namespace detail {

/// The attention of layer `layer` of a model, from 0: its depth, which λ_init follows, and a seed of its own. It
/// multiplies in bfloat16 if it or the model says so.
template <typename Attention>
typename Attention::Config attention_of_layer(typename Attention::Config config, std::uint64_t seed, Index layer,
                                              Arithmetic arithmetic) {
  if constexpr (requires { config.depth; }) config.depth = layer;
  if constexpr (requires { config.arithmetic; }) {
    if (arithmetic != Arithmetic::scalar) config.arithmetic = arithmetic;
  }
  config.seed = seed + 1 + static_cast<std::uint64_t>(layer);
  return config;
}

}  // namespace detail

/// What backward_in_place needs of forward_into, beside x.
template <typename Scalar, typename Attention>
struct TransformerBlockTape {
  typename Attention::Tape attention;
  typename FeedForward<Scalar>::Tape feed_forward;
  Matrix<Scalar> attended;  ///< n x embed_dim: x and attention's result, before the second norm or, behind, the first
  Matrix<Scalar> fed;       ///< n x embed_dim, with norms behind: what the second is given; else empty
};

template <typename Scalar, typename Attention, typename NormType>
struct TransformerBlock {
  using Weight = typename Attention::WeightMatrix;
  using Tape = TransformerBlockTape<Scalar, Attention>;

  TransformerBlock(const typename Attention::Config& config, NormType norm,
                   FeedForward<Scalar, Weight> with_feed_forward, NormPlacement placement = NormPlacement::before)
      : attention_norm(norm),
        attention(config),
        feed_forward_norm(std::move(norm)),
        feed_forward(std::move(with_feed_forward)),
        norms_before(placement == NormPlacement::before) {}

  /// x = block(x), in place, for the tokens of one sequence.
  template <AttentionMask Mask, Executor E>
  void forward_in_place(MatrixMap<Scalar>& x, const Mask& mask, Workspace& workspace, E& executor) const {
    forward_in_place(x, mask, {x.rows()}, workspace, executor);
  }

  /// The same for sequences stacked in the rows of x.
  template <AttentionMask Mask, Executor E>
  void forward_in_place(MatrixMap<Scalar>& x, const Mask& mask, const SequenceLengths& lengths, Workspace& workspace,
                        E& executor) const {
    forward_around(x, workspace, executor, [&](MatrixMap<Scalar>& y, const MatrixMap<Scalar>& input) {
      attention.forward_into(y, input, mask, lengths, workspace, executor);
    });
  }

  /// y (n x embed_dim) = block(x), keeping what backward needs beside x.
  template <AttentionMask Mask, Executor E>
  void forward_into(Matrix<Scalar>& y, const Matrix<Scalar>& x, const Mask& mask, const SequenceLengths& lengths,
                    Tape& tape, Workspace& workspace, E& executor) const {
    const Index n = x.rows();
    // Norms write where the layers behind them would keep a copy.
    Matrix<Scalar>& attention_x = tape.attention.x;
    Matrix<Scalar>& feed_forward_x = tape.feed_forward.x;
    for (Matrix<Scalar>* part : {&attention_x, &feed_forward_x, &tape.attended}) part->resize(n, x.cols());
    tape.fed.resize(norms_before ? 0 : n, x.cols());
    if (norms_before) {
      attention_norm.forward_rows(attention_x.data(), x.data(), n, executor);
      attention.forward_into(tape.attended, attention_x, mask, lengths, tape.attention, workspace, executor);
      feed_forward_norm.add_forward_rows(feed_forward_x.data(), tape.attended.data(), x.data(), n, executor);
      feed_forward.forward_into(y, feed_forward_x, tape.feed_forward, workspace, executor);
      detail::add_rows(y, tape.attended, executor);
    } else {
      attention.forward_into(tape.attended, x, mask, lengths, tape.attention, workspace, executor);
      attention_norm.add_forward_rows(feed_forward_x.data(), tape.attended.data(), x.data(), n, executor);
      feed_forward.forward_into(tape.fed, feed_forward_x, tape.feed_forward, workspace, executor);
      feed_forward_norm.add_forward_rows(y.data(), tape.fed.data(), feed_forward_x.data(), n, executor);
    }
  }

  /// Turns dy, the gradient of y, into that of x, in place. With a dbias, the gradient of the mask's learned bias is
  /// added to it.
  template <Executor E, typename... DBias>
  void backward_in_place(MatrixMap<Scalar>& dy, const Matrix<Scalar>& x, const Tape& tape, TransformerBlock& grad,
                         Workspace& workspace, E& executor, const DBias&... dbias) const {
    const auto frame = workspace.frame();
    MatrixMap<Scalar> dbranch(workspace.take<Scalar>(x.size()), x.rows(), x.cols());
    // A layer, and the norm before it or behind its sum; `normed` is what the norm was given.
    const auto through = [&](const NormType& norm, const Matrix<Scalar>& normed, NormType& to, auto&& layer) {
      if (norms_before) {
        layer();
        norm.backward_rows(dy.data(), dbranch.data(), normed.data(), x.rows(), to, Store::add, workspace, executor);
      } else {
        norm.backward_rows(dy.data(), dy.data(), normed.data(), x.rows(), to, Store::overwrite, workspace, executor);
        layer();
        detail::add_rows(dy, dbranch, executor);
      }
    };
    through(feed_forward_norm, norms_before ? tape.attended : tape.fed, grad.feed_forward_norm, [&] {
      feed_forward.backward_into(dbranch, dy, tape.feed_forward, grad.feed_forward, workspace, executor);
    });
    through(attention_norm, norms_before ? x : tape.attended, grad.attention_norm, [&] {
      attention.backward_into(dbranch, dy, tape.attention, grad.attention, dbias..., workspace, executor);
    });
  }

  NormType attention_norm;
  Attention attention;
  NormType feed_forward_norm;
  FeedForward<Scalar, Weight> feed_forward;

 protected:
  /// The block around its attention: attend(y, x) computes y from x.
  template <Executor E, typename Attend>
  void forward_around(MatrixMap<Scalar>& x, Workspace& workspace, E& executor, Attend&& attend) const {
    const auto frame = workspace.frame();
    const auto scratch = [&] { return MatrixMap<Scalar>(workspace.take<Scalar>(x.size()), x.rows(), x.cols()); };
    auto normed = scratch(), y = scratch();
    if (norms_before) {
      attention_norm.forward_rows(normed.data(), x.data(), x.rows(), executor);
      attend(y, normed);
      feed_forward_norm.add_forward_rows(normed.data(), x.data(), y.data(), x.rows(), executor);
      feed_forward.forward_into(y, normed, workspace, executor);
      detail::add_rows(x, y, executor);
    } else {
      attend(y, x);
      attention_norm.add_forward_rows(x.data(), x.data(), y.data(), x.rows(), executor);
      feed_forward.forward_into(y, x, workspace, executor);
      feed_forward_norm.add_forward_rows(x.data(), x.data(), y.data(), x.rows(), executor);
    }
  }

 private:
  bool norms_before;
};

}  // namespace diffattn::inline v0_1
