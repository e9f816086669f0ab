#pragma once

// What Hugging Face's modeling_diffllama.py does (eager attention), in plain loops over matrices of double, and random
// checkpoints to do it with.

#include <diffattn/hugging_face/diffllama_config.hpp>
#include <diffattn/io/safetensors.hpp>

#include <cmath>
#include <filesystem>
#include <map>
#include <numbers>
#include <string>
#include <vector>

#include "io/files.hpp"
#include "support/random.hpp"

namespace hugging_face {

using diffattn::DiffLlamaConfig;
using diffattn::Index;
using Matrix = diffattn::Matrix<double>;
using Weights = std::map<std::string, Matrix>;  // vectors are one row

/// A small model that is unlike every default.
inline DiffLlamaConfig small() {
  DiffLlamaConfig config;
  config.vocab_size = 29;
  config.hidden_size = 24;
  config.intermediate_size = 20;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 6;
  config.max_position_embeddings = 40;
  config.rms_norm_eps = 1e-3;
  config.eos_token_ids = {};
  return config;
}

inline std::string layer(Index i) { return "model.layers." + std::to_string(i) + "."; }

/// Every tensor of the configuration with random values, of a size that keeps activations of order 1.
inline Weights random_weights(const DiffLlamaConfig& c, support::Rng& rng) {
  Weights weights;
  const auto add = [&](const std::string& name, Index rows, Index cols, double scale, double mean = 0) {
    weights[name] = (scale * support::random_matrix<double>(rows, cols, rng)).array() + mean;
  };
  const auto linear = [&](const std::string& name, Index out, Index in, bool bias = false) {
    add(name + ".weight", out, in, 1 / std::sqrt(static_cast<double>(in)));
    if (bias) add(name + ".bias", 1, out, 0.5);
  };
  const Index q = c.num_attention_heads * c.head_dim, kv = c.num_key_value_heads * c.head_dim;
  add("model.embed_tokens.weight", c.vocab_size, c.hidden_size, 1);
  for (Index i = 0; i < c.num_hidden_layers; ++i) {
    add(layer(i) + "input_layernorm.weight", 1, c.hidden_size, 0.3, 1);
    add(layer(i) + "post_attention_layernorm.weight", 1, c.hidden_size, 0.3, 1);
    linear(layer(i) + "self_attn.q_proj", q, c.hidden_size, c.attention_bias);
    linear(layer(i) + "self_attn.k_proj", kv, c.hidden_size, c.attention_bias);
    linear(layer(i) + "self_attn.v_proj", kv, c.hidden_size, c.attention_bias);
    linear(layer(i) + "self_attn.o_proj", c.hidden_size, q, c.attention_bias);
    for (const char* const name : {"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}) {
      add(layer(i) + "self_attn." + name, 1, c.head_dim, 0.2);
    }
    linear(layer(i) + "mlp.gate_proj", c.intermediate_size, c.hidden_size);
    linear(layer(i) + "mlp.up_proj", c.intermediate_size, c.hidden_size);
    linear(layer(i) + "mlp.down_proj", c.hidden_size, c.intermediate_size);
  }
  add("model.norm.weight", 1, c.hidden_size, 0.3, 1);
  if (!c.tie_word_embeddings) linear("lm_head", c.vocab_size, c.hidden_size);
  return weights;
}

/// Rounds the weights to T, so that a file of that type holds them exactly.
template <typename T>
void round_to(Weights& weights) {
  for (auto& [name, weight] : weights) weight = weight.template cast<T>().template cast<double>().eval();
}

template <typename T>
void write_tensors(const std::filesystem::path& path, const Weights& weights) {
  diffattn::SafetensorsWriter writer;
  for (const auto& [name, weight] : weights) {
    const diffattn::Matrix<T> values = weight.template cast<T>();
    const bool vector = weight.rows() == 1 && name.find("proj.weight") == std::string::npos;
    writer.add(name, values,
               vector ? std::vector<Index>{values.size()} : std::vector<Index>{values.rows(), values.cols()});
  }
  writer.save(path);
}

template <typename T>
void write_checkpoint(const std::filesystem::path& directory, const DiffLlamaConfig& config, const Weights& weights) {
  std::filesystem::create_directories(directory);
  files::write(directory / "config.json", config.to_json());
  write_tensors<T>(directory / "model.safetensors", weights);
}

// ---- the forward pass

inline Matrix rms_norm(const Matrix& x, double eps) {
  Matrix y = x;
  for (Index i = 0; i < x.rows(); ++i) {
    y.row(i) /= std::sqrt(x.row(i).squaredNorm() / static_cast<double>(x.cols()) + eps);
  }
  return y;
}

inline Matrix linear(const Weights& w, const std::string& name, const Matrix& x) {
  Matrix y = x * w.at(name + ".weight").transpose();
  if (const auto bias = w.find(name + ".bias"); bias != w.end()) y.rowwise() += bias->second.row(0);
  return y;
}

/// Angular frequencies for a sequence of `tokens`: modeling_rope_utils.py.
inline std::vector<double> frequencies(const DiffLlamaConfig& c, Index tokens) {
  using Kind = diffattn::RotaryScaling::Kind;
  const auto& s = c.rope_scaling;
  const auto dim = static_cast<double>(c.head_dim);
  double base = c.rope_theta;
  if (s.kind == Kind::dynamic) {
    const double limit = static_cast<double>(c.max_position_embeddings);
    const double length = std::max(static_cast<double>(tokens), limit);
    base *= std::pow(s.factor * length / limit - (s.factor - 1), dim / (dim - 2));
  }
  std::vector<double> result;
  for (Index i = 0; i < c.head_dim; i += 2) {
    double f = 1 / std::pow(base, static_cast<double>(i) / dim);
    if (s.kind == Kind::linear) f /= s.factor;
    if (s.kind == Kind::llama3) {
      const double wavelength = 2 * std::numbers::pi / f, longest = s.context / s.low_freq_factor,
                   shortest = s.context / s.high_freq_factor;
      const double smooth = (s.context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
      f = wavelength > longest ? f / s.factor : wavelength < shortest ? f : (1 - smooth) * f / s.factor + smooth * f;
    }
    result.push_back(f);
  }
  return result;
}

/// rotate_half on one head.
inline Matrix rotated(const Matrix& head, const std::vector<double>& f) {
  Matrix y = head;
  const Index half = head.cols() / 2;
  for (Index t = 0; t < head.rows(); ++t) {
    for (Index i = 0; i < half; ++i) {
      const double angle = static_cast<double>(t) * f[static_cast<std::size_t>(i)];
      y(t, i) = head(t, i) * std::cos(angle) - head(t, i + half) * std::sin(angle);
      y(t, i + half) = head(t, i + half) * std::cos(angle) + head(t, i) * std::sin(angle);
    }
  }
  return y;
}

inline Matrix causal_softmax(const Matrix& scores) {
  Matrix p = Matrix::Zero(scores.rows(), scores.cols());
  for (Index i = 0; i < p.rows(); ++i) {
    const double most = scores.row(i).head(i + 1).maxCoeff();
    for (Index j = 0; j <= i; ++j) p(i, j) = std::exp(scores(i, j) - most);
    p.row(i) /= p.row(i).sum();
  }
  return p;
}

inline Matrix attention(const DiffLlamaConfig& c, const Weights& w, Index index, const Matrix& x) {
  const std::string name = layer(index) + "self_attn.";
  const Index heads = c.num_attention_heads, d = c.head_dim, repeats = heads / c.num_key_value_heads;
  const Matrix q = linear(w, name + "q_proj", x), k = linear(w, name + "k_proj", x), v = linear(w, name + "v_proj", x);
  const auto f = frequencies(c, x.rows());
  const auto dot = [&](const char* a, const char* b) {
    return w.at(name + "lambda_" + a).row(0).dot(w.at(name + "lambda_" + b).row(0));
  };
  const double init = 0.8 - 0.6 * std::exp(-0.3 * static_cast<double>(index));
  const double lambda = std::exp(dot("q1", "k1")) - std::exp(dot("q2", "k2")) + init;

  // repeat_kv, then the halves of the value heads side by side, twice.
  std::vector<Matrix> out;
  for (Index head = 0; head < heads; ++head) {
    const Index kv = head / repeats, half = heads / 2;
    const Matrix scores = rotated(q.middleCols(head * d, d), f) * rotated(k.middleCols(kv * d, d), f).transpose();
    Matrix values(x.rows(), 2 * d);
    values << v.middleCols(head % half / repeats * d, d), v.middleCols((half + head % half) / repeats * d, d);
    out.push_back(causal_softmax(scores / std::sqrt(static_cast<double>(d))) * values);
  }
  Matrix joined(x.rows(), heads * d);
  for (Index head = 0; head < heads / 2; ++head) {
    const Matrix difference =
        out[static_cast<std::size_t>(head)] - lambda * out[static_cast<std::size_t>(heads / 2 + head)];
    joined.middleCols(head * 2 * d, 2 * d) = (1 - init) * rms_norm(difference, c.rms_norm_eps);
  }
  return linear(w, name + "o_proj", joined);
}

/// (tokens x vocab_size)
inline Matrix logits(const DiffLlamaConfig& c, const Weights& w, const std::vector<Index>& tokens) {
  const Matrix& embedding = w.at("model.embed_tokens.weight");
  Matrix x(static_cast<Index>(tokens.size()), c.hidden_size);
  for (Index i = 0; i < x.rows(); ++i) x.row(i) = embedding.row(tokens[static_cast<std::size_t>(i)]);
  const auto normed = [&](const std::string& name) {
    return Matrix(rms_norm(x, c.rms_norm_eps).array().rowwise() * w.at(name + ".weight").row(0).array());
  };
  for (Index i = 0; i < c.num_hidden_layers; ++i) {
    x += attention(c, w, i, normed(layer(i) + "input_layernorm"));
    const Matrix y = normed(layer(i) + "post_attention_layernorm");
    const Matrix gate = linear(w, layer(i) + "mlp.gate_proj", y), up = linear(w, layer(i) + "mlp.up_proj", y);
    x += linear(w, layer(i) + "mlp.down_proj", (gate.array() / (1 + (-gate.array()).exp()) * up.array()).matrix());
  }
  const Matrix last = normed("model.norm");
  return last * (c.tie_word_embeddings ? embedding : w.at("lm_head.weight")).transpose();
}

}  // namespace hugging_face
