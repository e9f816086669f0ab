#pragma once

// A decoder run in plain loops, so that what stays inside a kernel can be seen and changed: the scores of its attention.
//
//   Matrix<float> logits = rounded_logits(decoder, tokens, 6, nullptr);     scores rounded to 6 bits before the softmax
//
// Rounding is what the paper did for its figure 8: symmetric, the largest score of a layer at the largest number that so
// many bits can hold, anew for every sequence. With bits = 0 nothing is rounded and the logits are the decoder's.

#include <algorithm>
#include <cmath>
#include <diffattn/core/matrix.hpp>
#include <diffattn/kernels/mask.hpp>
#include <vector>

namespace lab {

using diffattn::Index;
using diffattn::Matrix;

/// The sizes of what a decoder computes on its way.
struct InnerValues {
  std::vector<float> scores;  ///< |q·k| / √d of every map, head and pair that sees each other
  std::vector<float> hidden;  ///< |x| behind every block
};

/// Rounds all that a query sees to 2^bits − 1 numbers between −largest and largest.
inline void round_scores(Matrix<float>& scores, float largest, int bits) {
  if (bits == 0 || largest == 0) return;
  const float step = largest / static_cast<float>((1 << (bits - 1)) - 1);
  scores = (scores / step).array().round().matrix() * step;
}

/// Softmax over the keys up to the query, row by row; what lies behind becomes 0.
inline void causal_softmax(Matrix<float>& scores) {
  for (Index i = 0; i < scores.rows(); ++i) {
    auto seen = scores.row(i).head(i + 1).array();
    seen = (seen - seen.maxCoeff()).exp();
    seen /= seen.sum();
    scores.row(i).tail(scores.cols() - i - 1).setZero();
  }
}

/// The scores of every map of every head, head by head, from queries and keys as a tape has them.
template <typename Attention>
std::vector<Matrix<float>> scores_of(const Attention& layer, const typename Attention::Tape& tape) {
  const auto& config = layer.config();
  const Index d = config.head_dim, heads_per_kv = config.num_heads / config.num_kv_heads;
  const Index key_maps = tape.k.cols() / (config.num_kv_heads * d);
  const Index query_maps = tape.q.cols() > config.num_heads * d ? 2 : 1;
  std::vector<Matrix<float>> all;
  for (Index head = 0; head < config.num_heads; ++head) {
    for (Index map = 0; map < query_maps; ++map) {
      const Index key_map = head / heads_per_kv * key_maps + std::min(map, key_maps - 1);
      all.emplace_back(tape.q.middleCols(layer.query_head(head, map) * d, d) *
                       tape.k.middleCols(key_map * d, d).transpose() / std::sqrt(static_cast<float>(d)));
    }
  }
  return all;
}

/// What layer.forward(x) computes, with rounded scores.
template <typename Attention>
Matrix<float> rounded_attention(const Attention& layer, const Matrix<float>& x, int bits, InnerValues* seen) {
  typename Attention::Tape tape;
  layer.forward(x, diffattn::CausalMask{}, tape);
  std::vector<Matrix<float>> maps = scores_of(layer, tape);
  float largest = 0;
  for (const Matrix<float>& scores : maps) {
    for (Index i = 0; i < scores.rows(); ++i) {
      const auto row = scores.row(i).head(i + 1).cwiseAbs();
      largest = std::max(largest, row.maxCoeff());
      if (seen != nullptr) {
        for (Index j = 0; j <= i; ++j) seen->scores.push_back(row(j));
      }
    }
  }
  for (Matrix<float>& map : maps) {
    round_scores(map, largest, bits);
    causal_softmax(map);
  }

  const auto& config = layer.config();
  const Index value_dim = tape.v.cols() / config.num_kv_heads, heads_per_kv = config.num_heads / config.num_kv_heads;
  const std::size_t maps_a_head = maps.size() / static_cast<std::size_t>(config.num_heads);
  Matrix<float> attended(x.rows(), config.num_heads * value_dim);
  for (Index head = 0; head < config.num_heads; ++head) {
    Matrix<float>& map = maps[static_cast<std::size_t>(head) * maps_a_head];
    if constexpr (requires { layer.lambda_value(); }) {
      map -= layer.lambda_value() * maps[static_cast<std::size_t>(head) * maps_a_head + 1];
    }
    auto result = attended.middleCols(head * value_dim, value_dim);
    result = map * tape.v.middleCols(head / heads_per_kv * value_dim, value_dim);
    if constexpr (requires {
                    layer.subln;
                    layer.lambda.init;
                  }) {
      result = layer.subln.forward(Matrix<float>(result)) * static_cast<float>(1 - layer.lambda.init);
    }
  }
  return layer.out_proj.forward(attended);
}

/// The logits of one sequence by a decoder whose attention is MultiheadAttention or MultiheadDiffAttention. What its
/// values were is added to *seen, if there is one.
template <typename Decoder>
Matrix<float> rounded_logits(const Decoder& decoder, const std::vector<Index>& tokens, int bits, InnerValues* seen) {
  const auto n = static_cast<Index>(tokens.size());
  Matrix<float> x(n, decoder.config().attention.embed_dim);
  for (Index i = 0; i < n; ++i) x.row(i) = decoder.embedding.row(tokens[static_cast<std::size_t>(i)]);
  for (const auto& block : decoder.blocks) {
    x += rounded_attention(block.attention, block.attention_norm.forward(x), bits, seen);
    x += block.feed_forward.forward(block.feed_forward_norm.forward(x));
    if (seen != nullptr) {
      for (Index i = 0; i < x.size(); ++i) seen->hidden.push_back(std::abs(x.data()[i]));
    }
  }
  const Matrix<float> last = decoder.norm.forward(x);
  return decoder.head ? decoder.head->forward(last) : Matrix<float>(last * decoder.embedding.transpose());
}

}  // namespace lab
