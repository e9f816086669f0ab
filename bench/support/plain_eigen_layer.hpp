#pragma once

// MultiheadDiffAttention as a good Eigen user writes it, forward and backward, on the parameters of ours: as many key
// and value heads as query heads, no biases, every column of a head rotary, one causal sequence. Memory of a first call
// is kept for the next.

#include <cmath>
#include <complex>
#include <cstddef>
#include <vector>

#include "diffattn/core/matrix.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rms_norm.hpp"
#include "support/plain_eigen.hpp"

namespace bench {

using Layer = diffattn::MultiheadDiffAttention<float>;
using Norm = diffattn::RmsNorm<float>;
using Operand = PlainHead<float>::Operand;
using Result = PlainResult<float>;

/// y (n x out) = x (n x in) weightᵀ.
inline void linear(Matrix<float>& y, const Matrix<float>& x, const Matrix<float>& weight) {
  y.noalias() = x * weight.transpose();
}

/// dx (n x in) and dweight (out x in) from dy (n x out).
inline void linear_backward(Matrix<float>& dx, Matrix<float>& dweight, const Matrix<float>& dy, const Matrix<float>& x,
                            const Matrix<float>& weight) {
  dx.noalias() = dy * weight;
  dweight.noalias() = dy.transpose() * x;
}

/// The same where dx is the gradient of what several linear layers read: it is added to.
inline void linear_backward_add(Matrix<float>& dx, Matrix<float>& dweight, const Matrix<float>& dy,
                                const Matrix<float>& x, const Matrix<float>& weight) {
  dx.noalias() += dy * weight;
  dweight.noalias() = dy.transpose() * x;
}

/// y = factor · x / sqrt(mean(x²) + eps) ∘ weight, row by row.
inline void rms_norm(Result y, const Operand& x, const Norm& norm, float factor = 1) {
  const auto width = static_cast<float>(x.cols()), eps = static_cast<float>(norm.eps);
  for (Index i = 0; i < x.rows(); ++i) {
    const float scale = factor / std::sqrt(x.row(i).squaredNorm() / width + eps);
    y.row(i) = scale * x.row(i).cwiseProduct(norm.weight.transpose());
  }
}

/// Turns dy, the gradient of y, into that of x, in place; that of the weight is added to `grad`.
inline void rms_norm_backward(Result dy, const Operand& x, const Norm& norm, Norm& grad, float factor = 1) {
  const auto width = static_cast<float>(x.cols()), eps = static_cast<float>(norm.eps);
  for (Index i = 0; i < x.rows(); ++i) {
    const float mean = x.row(i).squaredNorm() / width + eps, scale = factor / std::sqrt(mean);
    grad.weight += scale * dy.row(i).cwiseProduct(x.row(i)).transpose();
    dy.row(i) = scale * dy.row(i).cwiseProduct(norm.weight.transpose());
    const float along = dy.row(i).dot(x.row(i)) / (width * mean);
    dy.row(i) -= along * x.row(i);
  }
}

/// exp(i·angle) for every position and pair of columns (positions x d/2).
using Turns = Matrix<std::complex<float>>;

inline Turns rotary_turns(Index positions, Index d, double base) {
  Turns turns(positions, d / 2);
  for (Index position = 0; position < positions; ++position) {
    for (Index i = 0; i < d / 2; ++i) {
      const double frequency = std::pow(base, -2 * static_cast<double>(i) / static_cast<double>(d));
      turns(position, i) = std::complex<float>(std::polar(1.0, static_cast<double>(position) * frequency));
    }
  }
  return turns;
}

/// Turns every head in x (n x heads·d): neighbouring columns are the parts of a complex number.
template <typename Derived>
void rotate(Matrix<float>& x, const Eigen::MatrixBase<Derived>& turns) {
  Eigen::Map<Turns> pairs(reinterpret_cast<std::complex<float>*>(x.data()), x.rows(), x.cols() / 2);
  for (Index col = 0; col < pairs.cols(); col += turns.cols()) {
    pairs.middleCols(col, turns.cols()).array() *= turns.topRows(x.rows()).array();
  }
}

/// What backward needs of a forward pass.
struct AttentionActivations {
  Matrix<float> q, k, v;                            // n x heads·2d, q and k after rotary
  Matrix<float> attended, normed;                   // n x heads·2d, before and after the norm of every head
  std::vector<std::vector<PlainMaps<float>>> maps;  // of every head
};

/// Gradients that only a backward pass needs.
struct AttentionScratch {
  Matrix<float> dq, dk, dv, dattended;
};

inline PlainHead<float> head_of(const AttentionActivations& a, Index h, Index d, float lambda) {
  const Index first = 2 * h * d, second = first + d;
  return {a.q.middleCols(first, d),  a.k.middleCols(first, d),     a.q.middleCols(second, d),
          a.k.middleCols(second, d), a.v.middleCols(first, 2 * d), lambda};
}

inline PlainHeadGradients<float> head_of(AttentionScratch& s, Index h, Index d) {
  const Index first = 2 * h * d, second = first + d;
  return {s.dq.middleCols(first, d), s.dk.middleCols(first, d), s.dq.middleCols(second, d), s.dk.middleCols(second, d),
          s.dv.middleCols(first, 2 * d)};
}

/// Whether a forward pass keeps its maps, which are large, but save backward computing them again.
enum class Maps { keep, drop };

/// y (n x embed_dim) = layer(x). Backward needs Maps::keep.
inline void attention_forward(Matrix<float>& y, const Matrix<float>& x, const Layer& layer, const Turns& turns,
                              AttentionActivations& a, Maps maps) {
  const Index heads = layer.config().num_heads, d = layer.lambda.q1.size();
  linear(a.q, x, layer.q_proj.weight);
  linear(a.k, x, layer.k_proj.weight);
  linear(a.v, x, layer.v_proj.weight);
  rotate(a.q, turns);
  rotate(a.k, turns);
  a.attended.resizeLike(a.v);
  a.normed.resizeLike(a.v);
  a.maps.resize(static_cast<std::size_t>(heads));
  for (Index h = 0; h < heads; ++h) {
    auto attended = a.attended.middleCols(2 * h * d, 2 * d);
    auto& kept = a.maps[static_cast<std::size_t>(h)];
    plain_diff_attention_into<float>(attended, head_of(a, h, d, layer.lambda_value()), true,
                                     maps == Maps::keep ? &kept : nullptr);
    rms_norm(a.normed.middleCols(2 * h * d, 2 * d), attended, layer.subln, static_cast<float>(1 - layer.lambda.init));
  }
  linear(y, a.normed, layer.out_proj.weight);
}

/// dx from dy (n x embed_dim); the parameters of `grad` become their gradients. Uses up the maps.
inline void attention_backward(Matrix<float>& dx, const Matrix<float>& dy, const Matrix<float>& x, const Layer& layer,
                               const Turns& turns, AttentionActivations& a, AttentionScratch& s, Layer& grad) {
  const Index heads = layer.config().num_heads, d = layer.lambda.q1.size();
  linear_backward(s.dattended, grad.out_proj.weight, dy, a.normed, layer.out_proj.weight);
  s.dq.resizeLike(a.q);
  s.dk.setZero(a.k.rows(), a.k.cols());
  s.dv.setZero(a.v.rows(), a.v.cols());
  grad.subln.weight.setZero();
  float dlambda = 0;
  for (Index h = 0; h < heads; ++h) {
    auto dattended = s.dattended.middleCols(2 * h * d, 2 * d);
    rms_norm_backward(dattended, a.attended.middleCols(2 * h * d, 2 * d), layer.subln, grad.subln,
                      static_cast<float>(1 - layer.lambda.init));
    dlambda += plain_diff_attention_backward_into<float>(head_of(s, h, d), head_of(a, h, d, layer.lambda_value()),
                                                         dattended, true, &a.maps[static_cast<std::size_t>(h)]);
  }
  diffattn::set_zero(grad.lambda);
  layer.lambda.backward(dlambda, grad.lambda);
  rotate(s.dq, turns.conjugate());
  rotate(s.dk, turns.conjugate());
  linear_backward(dx, grad.q_proj.weight, s.dq, x, layer.q_proj.weight);
  linear_backward_add(dx, grad.k_proj.weight, s.dk, x, layer.k_proj.weight);
  linear_backward_add(dx, grad.v_proj.weight, s.dv, x, layer.v_proj.weight);
}

}  // namespace bench
