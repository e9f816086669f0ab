#pragma once

// DecoderTape: what the backward pass of a Decoder needs of its forward pass, and those two passes.
//
// A tape is filled by decoder.logits(tokens, lengths, tape), read by decoder.backward(dlogits, tape, grad), and used
// again for the next batch: for as many tokens without allocation. With `recompute` it keeps but the input of every
// block, and backward runs each block forward once more (activation checkpointing, Chen et al., arXiv 1604.06174):
// about a third more work, one block's memory instead of all blocks', and the same gradients bit for bit.

#include <iterator>
#include <span>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/sequences.hpp"
#include "diffattn/models/decoder_block.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar, typename Attention>
struct DecoderTape {
  bool recompute = false;  ///< set it before the forward pass

  std::vector<Index> tokens;
  std::vector<Index> lengths;
  std::vector<DecoderBlockTape<Scalar, Attention>> blocks;  ///< one a block; one for all with `recompute`
  std::vector<Matrix<Scalar>> inputs;                       ///< of each block, then of the last norm
  Matrix<Scalar> hidden;                                    ///< after the last norm
  bool filled = false;
};

template <typename Scalar, typename Attention>
class Decoder;

namespace detail {

inline constexpr const char* kDecoder = "Decoder";

/// Decoder::logits_into with a tape.
template <typename Scalar, typename Attention, typename Y, typename Tokens, Executor E>
void logits_on_tape(const Decoder<Scalar, Attention>& model, const Eigen::MatrixBase<Y>& y, const Tokens& tokens,
                    std::span<const Index> lengths, DecoderTape<Scalar, Attention>& tape, Workspace& workspace,
                    E& executor) {
  const Index n = static_cast<Index>(std::size(tokens));
  check_shape(kDecoder, "logits", y, n, model.config().vocab_size);
  check_lengths(kDecoder, lengths, n);
  model.check_tokens(tokens);
  tape.filled = false;  // until this has come to its end
  tape.tokens.assign(std::begin(tokens), std::end(tokens));
  tape.lengths.assign(lengths.begin(), lengths.end());
  tape.blocks.resize(tape.recompute ? 1 : model.blocks.size());
  tape.inputs.resize(model.blocks.size() + 1);
  for (Matrix<Scalar>& input : tape.inputs) input.resize(n, model.embedding.cols());
  tape.hidden.resize(n, model.embedding.cols());
  MatrixMap<Scalar> x(tape.inputs[0].data(), n, model.embedding.cols());
  model.embed_into(x, tokens);
  for (std::size_t layer = 0; layer < model.blocks.size(); ++layer) {
    model.blocks[layer].forward_into(tape.inputs[layer + 1], tape.inputs[layer], lengths,
                                     tape.blocks[tape.recompute ? 0 : layer], workspace, executor);
  }
  model.norm.forward_rows(tape.hidden.data(), tape.inputs.back().data(), n, executor);
  model.head_into(y, tape.hidden, workspace, executor);
  tape.filled = true;
}

/// Decoder::backward.
template <typename Scalar, typename Attention, typename DY, Executor E>
void decoder_backward(const Decoder<Scalar, Attention>& model, const Eigen::MatrixBase<DY>& dlogits,
                      DecoderTape<Scalar, Attention>& tape, Decoder<Scalar, Attention>& grad, Workspace& workspace,
                      E& executor) {
  const Index n = dlogits.rows(), embed_dim = model.embedding.cols();
  if (!tape.filled) {
    throw_invalid({kDecoder, ": backward needs a tape that logits(tokens, lengths, tape) has filled"});
  }
  if (tape.inputs.size() != model.blocks.size() + 1 ||
      tape.blocks.size() != (tape.recompute ? 1 : model.blocks.size()) || tape.hidden.cols() != embed_dim) {
    throw_invalid({kDecoder, ": the tape was filled by a decoder of another configuration"});
  }
  check_shape(kDecoder, "dlogits", dlogits, tape.hidden.rows(), model.config().vocab_size);
  check_gradient(kDecoder, model, grad);

  const auto frame = workspace.frame();
  MatrixMap<Scalar> dx(workspace.take<Scalar>(n * embed_dim), n, embed_dim);
  if (model.head) {
    model.head->backward_into(dx, dlogits, tape.hidden, grad.head.value(), workspace, executor);
  } else {
    linear_backward_into<Scalar>(dx, grad.embedding, dlogits, tape.hidden, model.embedding, Store::overwrite, workspace,
                                 executor);
  }
  model.norm.backward_rows(dx.data(), dx.data(), tape.inputs.back().data(), n, grad.norm, Scalar(1), Store::overwrite,
                           workspace, executor);
  for (std::size_t layer = model.blocks.size(); layer-- > 0;) {
    DecoderBlockTape<Scalar, Attention>& block_tape = tape.blocks[tape.recompute ? 0 : layer];
    if (tape.recompute) {
      // The output goes where the next block's input was, which it is, bit for bit.
      model.blocks[layer].forward_into(tape.inputs[layer + 1], tape.inputs[layer], tape.lengths, block_tape, workspace,
                                       executor);
    }
    model.blocks[layer].backward_in_place(dx, tape.inputs[layer], block_tape, grad.blocks[layer], workspace, executor);
  }
  for (Index i = 0; i < n; ++i) grad.embedding.row(tape.tokens[static_cast<std::size_t>(i)]) += dx.row(i);
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
