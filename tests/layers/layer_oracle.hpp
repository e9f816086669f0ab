#pragma once

// The layers as the official code spells them out, in plain loops over one sequence and for any scalar: in long double
// the truth, in float the naive float32 evaluation that the library is measured against. Weights come by their
// state-dict names, so nothing here knows how a layer is built.
//
//   multihead_flashdiff_2.py, multihead_attention.py, rms_norm.py, kernel/rotary.py, multihead_flashdiffv2.py
//   (microsoft/unilm, Diff-Transformer)

#include <Eigen/Core>

#include <cmath>
#include <complex>
#include <diffattn/kernels/reference.hpp>
#include <diffattn/layers/parameters.hpp>
#include <diffattn/layers/rotary.hpp>
#include <map>
#include <string>
#include <string_view>

namespace oracle {

using diffattn::Index;
using diffattn::Matrix;

template <typename S>
using Weights = std::map<std::string, Matrix<S>>;

/// Every parameter of `layer` by name, a vector as one column.
template <typename S, typename Layer>
Weights<S> weights_of(const Layer& layer) {
  Weights<S> weights;
  diffattn::visit_parameters(layer, [&](std::string_view name, const auto& parameter) {
    weights[std::string(name)] = parameter.template cast<S>();
  });
  return weights;
}

template <typename S>
Matrix<S> linear(const Weights<S>& weights, const std::string& name, const Matrix<S>& x) {
  const Matrix<S>& w = weights.at(name + ".weight");
  const auto bias = weights.find(name + ".bias");
  Matrix<S> y(x.rows(), w.rows());
  for (Index i = 0; i < y.rows(); ++i) {
    for (Index j = 0; j < y.cols(); ++j) {
      S sum = 0;
      for (Index c = 0; c < x.cols(); ++c) sum += x(i, c) * w(j, c);
      y(i, j) = bias == weights.end() ? sum : sum + bias->second(j, 0);
    }
  }
  return y;
}

/// Turns pair i of every head at position t by the angle t·base^(-2i/dim): (a + ib)·exp(i·angle). Pair i is
/// (2i, 2i + 1), or (i, i + dim/2); columns of a head from `dim` on stay as they are.
template <typename S>
void rotate(Matrix<S>& x, Index head_dim, const diffattn::RotaryConfig& config, Index first_position = 0) {
  const Index dim = config.dim == 0 ? head_dim : config.dim;
  const bool interleaved = config.pairing == diffattn::RotaryPairing::interleaved;
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index i = 0; i < dim / 2; ++i) {
      const long double angle = static_cast<long double>(first_position + t) *
                                std::pow(static_cast<long double>(config.base),
                                         -2.0L * static_cast<long double>(i) / static_cast<long double>(dim));
      const std::complex<S> turn(static_cast<S>(std::cos(angle)), static_cast<S>(std::sin(angle)));
      for (Index head = 0; head < x.cols(); head += head_dim) {
        S& a = x(t, head + (interleaved ? 2 * i : i));
        S& b = x(t, head + (interleaved ? 2 * i + 1 : i + dim / 2));
        const std::complex<S> turned = std::complex<S>(a, b) * turn;
        a = turned.real();
        b = turned.imag();
      }
    }
  }
}

/// Each group of `width` columns divided by its root mean square, times `weight` (no weight: width 0 x 0).
template <typename S>
void rms_norm(Matrix<S>& x, Index width, double eps, const Matrix<S>& weight, double factor = 1) {
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index first = 0; first < x.cols(); first += width) {
      S sum = 0;
      for (Index c = first; c < first + width; ++c) sum += x(i, c) * x(i, c);
      const S inverse = S(1) / std::sqrt(sum / static_cast<S>(width) + static_cast<S>(eps));
      for (Index c = 0; c < width; ++c) {
        x(i, first + c) *= inverse;
        if (weight.size() != 0) x(i, first + c) *= weight(c, 0);
        x(i, first + c) *= static_cast<S>(factor);
      }
    }
  }
}

template <typename S>
S lambda(const Weights<S>& weights, double lambda_init) {
  const auto exp_dot = [&](const char* q, const char* k) {
    S dot = 0;
    for (Index i = 0; i < weights.at(q).size(); ++i) dot += weights.at(q)(i, 0) * weights.at(k)(i, 0);
    return std::exp(dot);
  };
  return exp_dot("lambda_q1", "lambda_k1") - exp_dot("lambda_q2", "lambda_k2") + static_cast<S>(lambda_init);
}

inline double lambda_init(Index depth) { return 0.8 - 0.6 * std::exp(-0.3 * static_cast<double>(depth)); }

/// A mask as head `head` sees it, for the reference, which knows of one.
template <typename Mask>
struct OfHead {
  const Mask& mask;
  Index head;

  auto visible_keys(Index query, Index n_q, Index n_k) const { return mask.visible_keys(query, n_q, n_k); }
  auto bias(Index /*head*/, Index query, Index key, Index n_q,
            Index n_k) const requires diffattn::detail::HasBias<Mask> {
    return mask.bias(head, query, key, n_q, n_k);
  }
};

/// Version 1. Query pair h reads key pair and value slab h / (num_heads / num_kv_heads), as both flash files do. Keys
/// and values come from `memory`.
template <typename S, typename Config, typename Mask>
Matrix<S> multihead_diff_attention(const Weights<S>& weights, const Config& config, const Matrix<S>& x,
                                   const Matrix<S>& memory, const Mask& mask) {
  const Index heads = config.num_heads, kv_heads = config.num_kv_heads == 0 ? heads : config.num_kv_heads;
  const Index d = config.head_dim == 0 ? config.embed_dim / heads / 2 : config.head_dim;
  const double init = config.lambda_init ? *config.lambda_init : lambda_init(config.depth);
  Matrix<S> q = linear(weights, "q_proj", x), k = linear(weights, "k_proj", memory);
  const Matrix<S> v = linear(weights, "v_proj", memory);
  if (config.rotary) {
    rotate(q, d, *config.rotary);
    rotate(k, d, *config.rotary);
  }
  const S l = lambda(weights, init);
  Matrix<S> heads_out(x.rows(), 2 * heads * d);
  for (Index h = 0; h < heads; ++h) {
    const Index g = h / (heads / kv_heads);
    heads_out.middleCols(2 * h * d, 2 * d) = diffattn::reference::diff_attention(
        q.middleCols(2 * h * d, d), k.middleCols(2 * g * d, d), q.middleCols((2 * h + 1) * d, d),
        k.middleCols((2 * g + 1) * d, d), v.middleCols(2 * g * d, 2 * d), l, OfHead<Mask>{mask, h});
  }
  const auto norm = weights.find("subln.weight");
  rms_norm(heads_out, 2 * d, config.norm_eps, norm == weights.end() ? Matrix<S>() : norm->second, 1 - init);
  return linear(weights, "out_proj", heads_out);
}

/// The same of x alone.
template <typename S, typename Config, typename Mask>
Matrix<S> multihead_diff_attention(const Weights<S>& weights, const Config& config, const Matrix<S>& x,
                                   const Mask& mask) {
  return multihead_diff_attention(weights, config, x, x, mask);
}

/// The baseline.
template <typename S, typename Config, typename Mask>
Matrix<S> multihead_attention(const Weights<S>& weights, const Config& config, const Matrix<S>& x,
                              const Matrix<S>& memory, const Mask& mask) {
  const Index heads = config.num_heads, kv_heads = config.num_kv_heads == 0 ? heads : config.num_kv_heads;
  const Index d = config.embed_dim / heads;
  Matrix<S> q = linear(weights, "q_proj", x), k = linear(weights, "k_proj", memory);
  const Matrix<S> v = linear(weights, "v_proj", memory);
  if (config.rotary) {
    rotate(q, d, *config.rotary);
    rotate(k, d, *config.rotary);
  }
  Matrix<S> heads_out(x.rows(), config.embed_dim);
  for (Index h = 0; h < heads; ++h) {
    const Index g = h / (heads / kv_heads);
    heads_out.middleCols(h * d, d) = diffattn::reference::attention(q.middleCols(h * d, d), k.middleCols(g * d, d),
                                                                    v.middleCols(g * d, d), OfHead<Mask>{mask, h});
  }
  return linear(weights, "out_proj", heads_out);
}

/// The same of x alone.
template <typename S, typename Config, typename Mask>
Matrix<S> multihead_attention(const Weights<S>& weights, const Config& config, const Matrix<S>& x, const Mask& mask) {
  return multihead_attention(weights, config, x, x, mask);
}

/// Version 2: heads 2i and 2i + 1 share key and value head i / (num_heads / num_kv_heads); λ per token and head.
template <typename S, typename Config, typename Mask>
Matrix<S> multihead_diff_attention_v2(const Weights<S>& weights, const Config& config, const Matrix<S>& x,
                                      const Matrix<S>& memory, const Mask& mask) {
  const Index heads = config.num_heads, kv_heads = config.num_kv_heads == 0 ? heads : config.num_kv_heads;
  const Index d = weights.at("q_proj.weight").rows() / heads / 2;
  Matrix<S> q = linear(weights, "q_proj", x), k = linear(weights, "k_proj", memory);
  const Matrix<S> v = linear(weights, "v_proj", memory), logits = linear(weights, "lambda_proj", x);
  if (config.rotary) {
    rotate(q, d, *config.rotary);
    rotate(k, d, *config.rotary);
  }
  Matrix<S> heads_out(x.rows(), heads * d);
  for (Index h = 0; h < heads; ++h) {
    const Index g = h / (heads / kv_heads);
    const Matrix<S> key = k.middleCols(g * d, d), value = v.middleCols(g * d, d);
    const OfHead<Mask> mask_of_head{mask, h};
    const Matrix<S> first = diffattn::reference::attention(q.middleCols(2 * h * d, d), key, value, mask_of_head);
    const Matrix<S> second = diffattn::reference::attention(q.middleCols((2 * h + 1) * d, d), key, value, mask_of_head);
    for (Index t = 0; t < x.rows(); ++t) {
      const S sigmoid = S(1) / (S(1) + std::exp(-logits(t, h)));
      heads_out.row(t).segment(h * d, d) = first.row(t) - sigmoid * second.row(t);
    }
  }
  return linear(weights, "o_proj", heads_out);
}

/// The same of x alone.
template <typename S, typename Config, typename Mask>
Matrix<S> multihead_diff_attention_v2(const Weights<S>& weights, const Config& config, const Matrix<S>& x,
                                      const Mask& mask) {
  return multihead_diff_attention_v2(weights, config, x, x, mask);
}

}  // namespace oracle
