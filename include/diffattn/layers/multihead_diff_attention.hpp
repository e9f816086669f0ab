#pragma once

// Multi-head differential attention, the layer of the paper and of the official multihead_flashdiff_1.py:
//
//   λ      = exp(λq1·λk1) − exp(λq2·λk2) + λ_init                                             eq. (2)
//   head_h = (1 − λ_init) · RMSNorm((P1_h − λ·P2_h) V_g)                                      eq. (1), (3)
//   y      = Concat(head_1 … head_H) W_Oᵀ                                                     eq. (3)
//
// num_heads (H) counts differential heads, half a Transformer's. d = embed_dim / (2H), or as head_dim says. Packed
// query head 2h is Q1_h and 2h + 1 is Q2_h, each d wide; keys likewise for num_kv_heads (G); V_g is one slab of 2d
// columns. Head h reads key and value head g = h / (H/G): the pairing of the flash variants, to which every other
// implementation keeps (the official naive file differs when G < H). Rotary turns each packed head. The norm weight and
// λ are shared by all heads.
//
// How it is called: attention_layer.hpp.
// Parameters (visit_parameters): q_proj, k_proj, v_proj, out_proj, lambda_q1, lambda_k1, lambda_q2, lambda_k2, subln.
// Shapes     x, y (tokens x embed_dim). Zero rows give an empty result.
// Errors     std::invalid_argument for a configuration that cannot be, ShapeError for an x that does not fit; before
//            any work. Const functions may be called from several threads, each with a workspace of its own.

#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/attention_layer.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/kv_cache.hpp"
#include "diffattn/layers/lambda.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rms_norm.hpp"
#include "diffattn/layers/rotary.hpp"

namespace diffattn::inline v0_1 {

struct MultiheadDiffAttentionConfig {
  Index embed_dim = 0;
  Index num_heads = 0;                                ///< differential heads
  Index num_kv_heads = 0;                             ///< divides num_heads; 0 = num_heads
  Index depth = 0;                                    ///< 0-based index of the layer, which sets λ_init
  std::optional<double> lambda_init = std::nullopt;   ///< overrides what depth gives
  std::optional<RotaryConfig> rotary = std::nullopt;  ///< no position embedding if left out
  double norm_eps = 1e-5;
  bool bias = false;        ///< biases on the four projections
  bool norm_weight = true;  ///< whether the head norm has a learned weight
  std::uint64_t seed = 0;   ///< of the initial parameters
  Index head_dim = 0;       ///< d; 0 = embed_dim / (2·num_heads)
};

/// Weight: the matrix type of the projections' weights, as linear.hpp says.
template <typename Scalar, typename Weight = Matrix<Scalar>>
class MultiheadDiffAttention : public AttentionLayer<MultiheadDiffAttention<Scalar, Weight>, Scalar> {
  using Base = AttentionLayer<MultiheadDiffAttention, Scalar>;

 public:
  using Config = MultiheadDiffAttentionConfig;
  using WeightMatrix = Weight;
  using Tape = typename Base::Tape;

  /// Initial parameters are those of the official code: projections as nn.Linear, λ vectors N(0, 0.1²), norm weight 1.
  explicit MultiheadDiffAttention(const Config& config)
      : config_(checked(config)),
        head_dim_(config_.head_dim),
        q_proj(config_.embed_dim, config_.num_heads * 2 * head_dim_, config_.bias),
        k_proj(config_.embed_dim, config_.num_kv_heads * 2 * head_dim_, config_.bias),
        v_proj(config_.embed_dim, config_.num_kv_heads * 2 * head_dim_, config_.bias),
        out_proj(config_.num_heads * 2 * head_dim_, config_.embed_dim, config_.bias),
        lambda(head_dim_, config_.lambda_init.value_or(diffattn::lambda_init(static_cast<double>(config_.depth)))),
        subln(2 * head_dim_, config_.norm_eps, config_.norm_weight),
        rotary_(detail::make_rotary<Scalar>(config_.rotary, head_dim_)) {
    Initializer random(config.seed);
    for (Linear<Scalar, Weight>* projection : {&q_proj, &k_proj, &v_proj, &out_proj}) projection->initialize(random);
    lambda.initialize(random);
  }

  const Config& config() const { return config_; }
  /// λ as the forward pass uses it.
  Scalar lambda_value() const { return lambda.value(); }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    detail::visit_part("q_proj", self.q_proj, visitor);
    detail::visit_part("k_proj", self.k_proj, visitor);
    detail::visit_part("v_proj", self.v_proj, visitor);
    detail::visit_part("out_proj", self.out_proj, visitor);
    visit_parameters(self.lambda, visitor);
    detail::visit_part("subln", self.subln, visitor);
  }

 private:
  friend Base;
  static constexpr const char* kName = "MultiheadDiffAttention";

  template <typename Y, typename X, AttentionMask Mask, Executor E>
  void forward_sequences(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                         std::span<const Index> lengths, Tape* tape, Workspace& workspace, E& executor) const {
    const Index heads = config_.num_heads, kv_heads = config_.num_kv_heads;
    run(y, x, tape, workspace, executor, [&](auto& attended, auto& q, auto& k, auto& v) {
      detail::for_each_sequence(lengths, workspace, executor, [&](detail::SequenceRows rows, auto& share, auto& own) {
        const Index first = rows.first, tokens = rows.count;
        detail::rotate_rows(rotary_, q, 2 * heads, k, 2 * kv_heads, first, tokens, 0, own);
        multihead_diff_attention_into(detail::rows_of(attended, first, tokens), detail::rows_of(q, first, tokens),
                                      detail::rows_of(k, first, tokens), detail::rows_of(v, first, tokens),
                                      lambda.value(), Heads{heads, kv_heads}, mask, AttentionOptions{}, share, own);
      });
    });
  }

  template <typename Y, typename X, typename Storage, Executor E>
  void forward_cached(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, KvCache<Storage>& cache,
                      Workspace& workspace, E& executor) const {
    const Index n = x.rows(), heads = config_.num_heads, kv_heads = config_.num_kv_heads, d = head_dim_;
    cache.template prepare<Scalar>(kName, kv_heads, 2, d, 2 * d, n);
    run(y, x, nullptr, workspace, executor, [&](auto& attended, auto& q, auto& k, auto& v) {
      detail::rotate_rows(rotary_, q, 2 * heads, k, 2 * kv_heads, 0, n, cache.position(), executor);
      cache.write(detail::view_of(k), detail::view_of(v), executor);
      decode_diff_attention_into(attended, q, cache.packed(n), lambda.value(), Heads{heads, kv_heads},
                                 cache.window_mask(), AttentionOptions{}, workspace, executor);
    });
  }

  /// Projects x, lets `attend` fill what the heads have attended to (from q, k and v), and projects that to y.
  template <typename Y, typename X, Executor E, typename Attend>
  void run(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Tape* tape, Workspace& workspace, E& executor,
           Attend&& attend) const {
    const Index n = x.rows(), heads = config_.num_heads, kv_heads = config_.num_kv_heads, d = head_dim_;
    const auto frame = workspace.frame();
    const auto part = [&](auto member, Index cols) { return Base::part(tape, member, n, cols, workspace); };
    auto q = part(&Tape::q, heads * 2 * d), k = part(&Tape::k, kv_heads * 2 * d), v = part(&Tape::v, kv_heads * 2 * d);
    auto attended = part(&Tape::attended, heads * 2 * d);
    using Output = detail::LinearOutput<Scalar, Weight>;
    const std::array outputs{Output{q_proj, q}, Output{k_proj, k}, Output{v_proj, v}};
    detail::linear_forward_all(outputs, x, workspace, executor);
    attend(attended, q, k, v);
    // In place, unless the tape keeps what was not normed.
    auto* const to = tape == nullptr ? attended.data() : workspace.take<Scalar>(attended.size());
    subln.forward_rows(to, attended.data(), n * heads, executor, head_scale());
    out_proj.forward_into(y, MatrixMap<Scalar>(to, n, attended.cols()), workspace, executor);
  }

  Scalar head_scale() const { return static_cast<Scalar>(1 - lambda.init); }

  template <typename DX, typename DY, Executor E>
  void differentiate(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape,
                     MultiheadDiffAttention& grad, Workspace& workspace, E& executor) const {
    using detail::rows_of;
    const Index n = dy.rows(), heads = config_.num_heads, kv_heads = config_.num_kv_heads, d = head_dim_;
    const auto frame = workspace.frame();
    const auto scratch = [&](Index cols) { return MatrixMap<Scalar>(workspace.take<Scalar>(n * cols), n, cols); };
    auto dattended = scratch(heads * 2 * d), dq = scratch(heads * 2 * d), dk = scratch(kv_heads * 2 * d);
    auto dv = scratch(kv_heads * 2 * d);
    {
      const auto inner = workspace.frame();
      auto normed = scratch(heads * 2 * d);
      subln.forward_rows(normed.data(), tape.attended.data(), n * heads, executor, head_scale());
      out_proj.backward_into(dattended, dy, normed, grad.out_proj, workspace, executor);
    }
    subln.backward_rows(dattended.data(), dattended.data(), tape.attended.data(), n * heads, grad.subln, head_scale(),
                        Store::overwrite, workspace, executor);

    const Scalar lambda_value = lambda.value();
    auto* const dlambdas = workspace.take<Scalar>(static_cast<Index>(tape.lengths.size()));
    tape.mask.visit([&](const auto& mask) {
      detail::for_each_sequence(
          tape.lengths, workspace, executor, [&](detail::SequenceRows rows, auto& share, auto& own) {
            const Index first = rows.first, tokens = rows.count;
            multihead_diff_attention_backward_into({rows_of(dq, first, tokens), rows_of(dk, first, tokens),
                                                    rows_of(dv, first, tokens), dlambdas[rows.number]},
                                                   rows_of(tape.q, first, tokens), rows_of(tape.k, first, tokens),
                                                   rows_of(tape.v, first, tokens), lambda_value,
                                                   rows_of(dattended, first, tokens), Heads{heads, kv_heads}, mask,
                                                   AttentionOptions{}, share, own);
            detail::rotate_rows(rotary_, dq, 2 * heads, dk, 2 * kv_heads, first, tokens, 0, own, Turn::back);
          });
    });
    Scalar dlambda = 0;
    for (std::size_t s = 0; s < tape.lengths.size(); ++s) dlambda += dlambdas[s];
    lambda.backward(dlambda, grad.lambda);
    using Gradient = detail::LinearGradient<Scalar, Weight>;
    const std::array gradients{Gradient{q_proj, dq, grad.q_proj}, Gradient{k_proj, dk, grad.k_proj},
                               Gradient{v_proj, dv, grad.v_proj}};
    detail::linear_backward_all(dx, gradients, tape.x, workspace, executor);
  }

  /// Whether parameters have the same shapes, as far as fields go that only this layer has.
  static bool same_shape(const Config& a, const Config& b) {
    return a.head_dim == b.head_dim && a.norm_weight == b.norm_weight;
  }

  static Config checked(Config config) {
    detail::check_positive(kName, "num_heads", config.num_heads);
    detail::check_positive(kName, "embed_dim", config.embed_dim);
    if (config.head_dim == 0) {
      const Index parts = detail::checked_product(kName, "2·num_heads", {2, config.num_heads});
      config.head_dim = detail::checked_head_dim(kName, config.embed_dim, "2·num_heads", parts);
    }
    detail::check_positive(kName, "head_dim", config.head_dim);
    detail::checked_product(kName, "2·num_heads·head_dim·embed_dim, the size of a weight,",
                            {2, config.num_heads, config.head_dim, config.embed_dim});
    config.num_kv_heads = detail::checked_heads(kName, {config.num_heads, config.num_kv_heads}).num_kv_heads;
    return config;
  }

  Config config_;
  Index head_dim_;  // d

 public:
  Linear<Scalar, Weight> q_proj;    ///< 2·num_heads·d x embed_dim
  Linear<Scalar, Weight> k_proj;    ///< 2·num_kv_heads·d x embed_dim
  Linear<Scalar, Weight> v_proj;    ///< num_kv_heads·2d x embed_dim
  Linear<Scalar, Weight> out_proj;  ///< embed_dim x num_heads·2d
  DiffLambda<Scalar> lambda;        ///< vectors of width d
  RmsNorm<Scalar> subln;            ///< width 2d

 private:
  std::optional<Rotary<Scalar>> rotary_;
};

}  // namespace diffattn::inline v0_1
