#pragma once

// The two layouts of a differential attention layer's weights: Hugging Face's DiffLlama and the official one (unilm,
// and this library's), and the way from one to the other.
//
//                     official                                   Hugging Face
//   query heads       2h + s is Q{s+1} of head h                 s·H + h
//   key heads         2g + s is K{s+1} of group g                s·G + g
//   values            V_g is one slab of 2d                      heads g and G + g of d
//   rotary pairs      (2i, 2i + 1)                               (i, i + d/2)
//   head norm         a weight of 2d                             none: it is multiplied into o_proj
//
//   DiffLlamaAttention<float> theirs(layer);                     from the official layout
//   DiffLlamaAttention<float> theirs(layer.config());            or to be filled, by load_parameters for instance
//   MultiheadDiffAttention<float> ours = theirs.official();      and back; its norm weight is 1
//
// An odd number of Hugging Face's key and value heads cannot be halved. Their code repeats the heads first and then
// takes the halves, so that query pair h meets key heads h/r and (H + h)/r, r = A/n_kv: that is a layer of n_kv groups
// in the official layout, whose heads appear twice.
//
// Errors   std::invalid_argument for what DiffLlama does not have: a rotary embedding that turns a part of a head, and
//          noise heads that several heads share.

#include <string_view>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/parameters.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// Which head of Hugging Face each packed head of ours is.
struct DiffLlamaHeads {
  Index num_heads;     // A: query heads of both maps
  Index num_kv_heads;  // n_kv

  /// Differential key and value heads of ours.
  Index groups() const { return num_kv_heads % 2 == 0 ? num_kv_heads / 2 : num_kv_heads; }

  std::vector<Index> queries() const {
    std::vector<Index> heads;
    for (Index p = 0; p < num_heads; ++p) heads.push_back(p % 2 * (num_heads / 2) + p / 2);
    return heads;
  }
  /// Keys and values alike: V_g is the values of the heads whose keys are K1_g and K2_g.
  std::vector<Index> keys() const {
    const bool even = num_kv_heads % 2 == 0;
    std::vector<Index> heads;
    for (Index p = 0; p < 2 * groups(); ++p) {
      const Index map = p % 2, group = p / 2;
      heads.push_back(even ? map * (num_kv_heads / 2) + group : (map * num_kv_heads + group) / 2);
    }
    return heads;
  }
};

/// The way back: the first packed head of ours that is head i of Hugging Face.
inline std::vector<Index> first_of_each(const std::vector<Index>& heads, Index count) {
  std::vector<Index> first(static_cast<std::size_t>(count), 0);
  for (std::size_t p = heads.size(); p-- > 0;) first[static_cast<std::size_t>(heads[p])] = static_cast<Index>(p);
  return first;
}

/// The rows of `from` in another order: head i of the result is head heads[i] of `from`, each d rows.
template <typename To, typename From>
void gather_heads(To& to, const From& from, const std::vector<Index>& heads, Index d) {
  for (std::size_t i = 0; i < heads.size(); ++i) {
    to.middleRows(static_cast<Index>(i) * d, d) = from.middleRows(heads[i] * d, d);
  }
}

/// The rows of every head in the order of half pairing (even ones first), or back.
template <typename M>
void pair_by_halves(M& rows, Index d, bool back) {
  const M from = rows;
  for (Index head = 0; head < rows.rows(); head += d) {
    for (Index i = 0; i < d; ++i) {
      const Index half = i / 2 + i % 2 * (d / 2);  // where row i goes
      if (back) {
        rows.row(head + i) = from.row(head + half);
      } else {
        rows.row(head + half) = from.row(head + i);
      }
    }
  }
}

}  // namespace detail

/// The attention of one DiffLlama layer, its parameters named and laid out as in Hugging Face's checkpoints.
template <typename Scalar>
class DiffLlamaAttention {
 public:
  using Config = MultiheadDiffAttentionConfig;

  /// Zeros, in the shapes that a layer of this configuration has.
  explicit DiffLlamaAttention(const Config& config)
      : DiffLlamaAttention(MultiheadDiffAttention<Scalar>(config), /*zeros=*/true) {}

  explicit DiffLlamaAttention(const MultiheadDiffAttention<Scalar>& layer) : DiffLlamaAttention(layer, false) {}

  /// The official layout, with a norm weight of 1 if the configuration has one.
  MultiheadDiffAttention<Scalar> official() const {
    MultiheadDiffAttention<Scalar> layer(config_);
    gather(layer.q_proj, q_proj, heads_.queries());
    gather(layer.k_proj, k_proj, heads_.keys());
    gather(layer.v_proj, v_proj, heads_.keys());
    layer.out_proj = o_proj;
    layer.lambda = lambda;
    if (interleaved()) {
      turn_pairs(layer.q_proj, true);
      turn_pairs(layer.k_proj, true);
    }
    return layer;
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("q_proj", self.q_proj, visitor);
    visit_part("k_proj", self.k_proj, visitor);
    visit_part("v_proj", self.v_proj, visitor);
    visit_part("o_proj", self.o_proj, visitor);
    visit_parameters(self.lambda, visitor);
  }

 private:
  DiffLlamaAttention(const MultiheadDiffAttention<Scalar>& layer, bool zeros)
      : config_(layer.config()),
        head_dim_(config_.head_dim),
        heads_{2 * config_.num_heads, 2 * config_.num_kv_heads},
        q_proj(layer.q_proj),
        k_proj(layer.k_proj),
        v_proj(layer.v_proj),
        o_proj(layer.out_proj),
        lambda(layer.lambda) {
    if (config_.rotary && config_.rotary->dim != 0 && config_.rotary->dim != head_dim_) {
      detail::throw_invalid(
          {"DiffLlamaAttention: rotary.dim must be the head_dim ", head_dim_, ", got ", config_.rotary->dim});
    }
    if (config_.num_noise_heads != config_.num_heads) {
      detail::throw_invalid({"DiffLlamaAttention: num_noise_heads must be the num_heads ", config_.num_heads, ", got ",
                             config_.num_noise_heads});
    }
    if (zeros) {
      set_zero(*this);
      return;
    }
    gather(q_proj, layer.q_proj, detail::first_of_each(heads_.queries(), heads_.num_heads));
    gather(k_proj, layer.k_proj, detail::first_of_each(heads_.keys(), heads_.num_kv_heads));
    gather(v_proj, layer.v_proj, detail::first_of_each(heads_.keys(), heads_.num_kv_heads));
    if (interleaved()) {
      turn_pairs(q_proj, false);
      turn_pairs(k_proj, false);
    }
    if (layer.subln.weight.size() == 0) return;
    for (Index column = 0; column < o_proj.weight.cols(); ++column) {
      o_proj.weight.col(column) *= layer.subln.weight[column % (2 * head_dim_)];
    }
  }

  bool interleaved() const { return config_.rotary && config_.rotary->pairing == RotaryPairing::interleaved; }

  void gather(Linear<Scalar>& to, const Linear<Scalar>& from, const std::vector<Index>& heads) const {
    detail::gather_heads(to.weight, from.weight, heads, head_dim_);
    if (from.bias.size() != 0) detail::gather_heads(to.bias, from.bias, heads, head_dim_);
  }
  void turn_pairs(Linear<Scalar>& projection, bool back) const {
    detail::pair_by_halves(projection.weight, head_dim_, back);
    if (projection.bias.size() != 0) detail::pair_by_halves(projection.bias, head_dim_, back);
  }

  Config config_;
  Index head_dim_;
  detail::DiffLlamaHeads heads_;

 public:
  Linear<Scalar> q_proj;  ///< 2·num_heads·d x embed_dim
  Linear<Scalar> k_proj;  ///< 2·num_kv_heads·d x embed_dim
  Linear<Scalar> v_proj;  ///< 2·num_kv_heads·d x embed_dim
  Linear<Scalar> o_proj;  ///< embed_dim x num_heads·2d, the norm weight multiplied into its columns
  DiffLambda<Scalar> lambda;
};

}  // namespace diffattn::inline v0_1
