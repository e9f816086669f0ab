#pragma once

// A training step of the Differential Transformer as a good Eigen user writes it: whole-matrix products, activations
// kept, gradients overwritten. Weights and gradients lie in Decoders of ours, whose head is tied; the arithmetic is
// Eigen's alone.

#include <cmath>
#include <string_view>
#include <utility>
#include <vector>

#include "diffattn/layers/parameters.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/models/feed_forward.hpp"
#include "diffattn/training/adamw.hpp"
#include "support/plain_eigen_layer.hpp"

namespace bench {

using FeedForward = diffattn::FeedForward<float>;
using PlainModel = diffattn::Decoder<float, Layer>;

/// What backward needs of a block's forward pass.
struct BlockActivations {
  Matrix<float> x, attention_input;  // n x embed_dim: the block's input, before and after the norm
  AttentionActivations attention;
  Matrix<float> middle, feed_forward_input;  // n x embed_dim: after attention, before and after the norm
  Matrix<float> gate, up, activated;         // n x hidden_dim
};

/// Gradients that only a backward pass needs, one block after another.
struct BlockScratch {
  AttentionScratch attention;
  Matrix<float> dbranch;              // n x embed_dim: of what attention or feed-forward reads
  Matrix<float> dgate, dup, sigmoid;  // n x hidden_dim
};

/// y (n x embed_dim) = (silu(x W_gateᵀ) ∘ x W_upᵀ) W_downᵀ.
inline void feed_forward(Matrix<float>& y, BlockActivations& a, const FeedForward& layer) {
  linear(a.gate, a.feed_forward_input, layer.gate_proj.weight);
  linear(a.up, a.feed_forward_input, layer.up_proj.weight);
  a.activated = a.gate.array() * a.gate.array().logistic() * a.up.array();
  linear(y, a.activated, layer.down_proj.weight);
}

inline void feed_forward_backward(Matrix<float>& dx, const Matrix<float>& dy, const BlockActivations& a,
                                  const FeedForward& layer, BlockScratch& s, FeedForward& grad) {
  linear_backward(s.dup, grad.down_proj.weight, dy, a.activated, layer.down_proj.weight);
  s.sigmoid = a.gate.array().logistic();
  s.dgate = s.dup.array() * a.up.array() * s.sigmoid.array() * (1 + a.gate.array() * (1 - s.sigmoid.array()));
  s.dup.array() *= a.gate.array() * s.sigmoid.array();
  linear_backward(dx, grad.gate_proj.weight, s.dgate, a.feed_forward_input, layer.gate_proj.weight);
  linear_backward_add(dx, grad.up_proj.weight, s.dup, a.feed_forward_input, layer.up_proj.weight);
}

/// y (n x embed_dim) = block(a.x).
inline void block_forward(Matrix<float>& y, BlockActivations& a, const PlainModel::Block& block, const Turns& turns) {
  a.attention_input.resizeLike(a.x);
  a.feed_forward_input.resizeLike(a.x);
  rms_norm(a.attention_input, a.x, block.attention_norm);
  attention_forward(a.middle, a.attention_input, block.attention, turns, a.attention, Maps::keep);
  a.middle += a.x;
  rms_norm(a.feed_forward_input, a.middle, block.feed_forward_norm);
  feed_forward(y, a, block.feed_forward);
  y += a.middle;
}

/// Turns dy, the gradient of y, into that of the block's input, in place.
inline void block_backward(Matrix<float>& dy, BlockActivations& a, const PlainModel::Block& block, const Turns& turns,
                           BlockScratch& s, PlainModel::Block& grad) {
  grad.feed_forward_norm.weight.setZero();
  feed_forward_backward(s.dbranch, dy, a, block.feed_forward, s, grad.feed_forward);
  rms_norm_backward(s.dbranch, a.middle, block.feed_forward_norm, grad.feed_forward_norm);
  dy += s.dbranch;
  grad.attention_norm.weight.setZero();
  attention_backward(s.dbranch, dy, a.attention_input, block.attention, turns, a.attention, s.attention,
                     grad.attention);
  rms_norm_backward(s.dbranch, a.x, block.attention_norm, grad.attention_norm);
  dy += s.dbranch;
}

/// Turns logits into the gradient of the mean of −log softmax(logits)[target] over the rows, and returns that mean.
inline double cross_entropy(Matrix<float>& logits, const std::vector<Index>& targets) {
  const float share = 1 / static_cast<float>(logits.rows());
  double loss = 0;
  for (Index i = 0; i < logits.rows(); ++i) {
    const Index target = targets[static_cast<std::size_t>(i)];
    auto row = logits.row(i).array();
    row -= row.maxCoeff();
    const float at_target = row[target];
    row = row.exp();
    const float sum = row.sum();
    row *= share / sum;
    row[target] -= share;
    loss += static_cast<double>(std::log(sum) - at_target);
  }
  return loss / static_cast<double>(logits.rows());
}

/// All parameters of a model, as arrays.
inline std::vector<Eigen::Map<Eigen::ArrayXf>> arrays_of(PlainModel& model) {
  std::vector<Eigen::Map<Eigen::ArrayXf>> arrays;
  diffattn::visit_parameters(model, [&](std::string_view /*name*/, auto& parameter) {
    arrays.emplace_back(parameter.data(), parameter.size());
  });
  return arrays;
}

/// Multiplies the gradient by max_norm / its norm if that is less than 1.
inline void clip(PlainModel& gradient, double max_norm) {
  double squares = 0;
  for (const auto& array : arrays_of(gradient)) squares += static_cast<double>(array.matrix().squaredNorm());
  const double factor = max_norm / (std::sqrt(squares) + 1e-6);
  if (factor >= 1) return;
  for (auto& array : arrays_of(gradient)) array *= static_cast<float>(factor);
}

/// ‖model − reference‖ / ‖reference‖ over all parameters.
inline double relative_difference(PlainModel model, PlainModel reference) {
  const auto arrays = arrays_of(model), expected = arrays_of(reference);
  double difference = 0, whole = 0;
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    difference += static_cast<double>((arrays[i] - expected[i]).square().sum());
    whole += static_cast<double>(expected[i].square().sum());
  }
  return std::sqrt(difference / whole);
}

/// AdamW with the defaults and the groups of ours.
class PlainAdamW {
 public:
  explicit PlainAdamW(const PlainModel& model) : first_moment_(zeros_like(model)), second_moment_(first_moment_) {
    diffattn::visit_parameters(model, [&](std::string_view name, const auto& /*parameter*/) {
      decays_.push_back(diffattn::adamw_group(name).weight_decay_factor);
    });
  }

  void step(PlainModel& model, PlainModel& gradient, double rate) {
    ++steps_;
    const double correction1 = 1 - std::pow(config_.beta1, steps_), correction2 = 1 - std::pow(config_.beta2, steps_);
    const auto beta1 = static_cast<float>(config_.beta1), beta2 = static_cast<float>(config_.beta2);
    const auto eps = static_cast<float>(config_.eps), step_size = static_cast<float>(rate / correction1);
    const auto root = static_cast<float>(1 / std::sqrt(correction2));
    auto parameters = arrays_of(model), first = arrays_of(first_moment_), second = arrays_of(second_moment_);
    const auto gradients = arrays_of(gradient);
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const auto keep = static_cast<float>(1 - rate * config_.weight_decay * decays_[i]);
      first[i] = beta1 * first[i] + (1 - beta1) * gradients[i];
      second[i] = beta2 * second[i] + (1 - beta2) * gradients[i].square();
      parameters[i] = keep * parameters[i] - step_size * first[i] / (root * second[i].sqrt() + eps);
    }
  }

 private:
  diffattn::AdamWConfig config_;
  PlainModel first_moment_, second_moment_;
  std::vector<double> decays_;  // of each parameter
  int steps_ = 0;
};

/// One batch, a causal sequence, and all that training on it needs.
class PlainTraining {
 public:
  PlainTraining(PlainModel model, std::vector<Index> tokens, std::vector<Index> targets)
      : model_(std::move(model)),
        gradient_(zeros_like(model_)),
        optimizer_(model_),
        tokens_(std::move(tokens)),
        targets_(std::move(targets)),
        turns_(rotary_turns(static_cast<Index>(tokens_.size()), model_.blocks[0].attention.lambda.q1.size(),
                            model_.config().attention.rotary->base)),
        blocks_(model_.blocks.size()) {}

  const PlainModel& model() const { return model_; }
  const PlainModel& gradient() const { return gradient_; }

  void step(double max_norm, double learning_rate) {
    differentiate();
    clip(gradient_, max_norm);
    optimizer_.step(model_, gradient_, learning_rate);
  }

  /// Computes the gradient and returns the loss.
  double differentiate() {
    forward();
    const double loss = cross_entropy(logits_, targets_);
    backward();
    return loss;
  }

 private:
  void forward() {
    blocks_[0].x = model_.embedding(tokens_, Eigen::all);
    for (std::size_t layer = 0; layer < blocks_.size(); ++layer) {
      Matrix<float>& y = layer + 1 < blocks_.size() ? blocks_[layer + 1].x : last_;
      block_forward(y, blocks_[layer], model_.blocks[layer], turns_);
    }
    hidden_.resizeLike(last_);
    rms_norm(hidden_, last_, model_.norm);
    linear(logits_, hidden_, model_.embedding);
  }

  void backward() {
    linear_backward(dx_, gradient_.embedding, logits_, hidden_, model_.embedding);
    gradient_.norm.weight.setZero();
    rms_norm_backward(dx_, last_, model_.norm, gradient_.norm);
    for (std::size_t layer = blocks_.size(); layer-- > 0;) {
      block_backward(dx_, blocks_[layer], model_.blocks[layer], turns_, scratch_, gradient_.blocks[layer]);
    }
    for (Index i = 0; i < dx_.rows(); ++i) {
      gradient_.embedding.row(tokens_[static_cast<std::size_t>(i)]) += dx_.row(i);
    }
  }

  PlainModel model_, gradient_;
  PlainAdamW optimizer_;
  std::vector<Index> tokens_, targets_;
  Turns turns_;
  std::vector<BlockActivations> blocks_;
  BlockScratch scratch_;
  Matrix<float> last_, hidden_;  // n x embed_dim: the last block's output, before and after the norm
  Matrix<float> logits_;         // n x vocab_size, then their gradient
  Matrix<float> dx_;             // n x embed_dim
};

}  // namespace bench
