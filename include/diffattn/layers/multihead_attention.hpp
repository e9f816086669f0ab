#pragma once

// Multi-head attention, the baseline that differential attention is compared with: the layer of the official
// multihead_attention.py, on the same parts and of the same quality. y = Concat(softmax(s·Q_h K_gᵀ) V_g) W_Oᵀ.
//
// d = embed_dim / num_heads. Query head h reads key and value head g = h / (num_heads / num_kv_heads).
// A layer with twice the heads of a MultiheadDiffAttention has the same d and, but for λ and the norm, the same
// parameters.
//
// Parameters (visit_parameters): q_proj, k_proj, v_proj, out_proj.
// How it is called: attention_layer.hpp. Shapes, errors, threads: as multihead_diff_attention.hpp says.

#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/attention_layer.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/kv_cache.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rotary.hpp"

namespace diffattn::inline v0_1 {

struct MultiheadAttentionConfig {
  Index embed_dim = 0;
  Index num_heads = 0;
  Index num_kv_heads = 0;                             ///< divides num_heads; 0 = num_heads
  std::optional<RotaryConfig> rotary = std::nullopt;  ///< no position embedding if left out
  bool bias = false;                                  ///< biases on the four projections
  std::uint64_t seed = 0;                             ///< of the initial parameters
};

/// Weight: the matrix type of the projections' weights, as linear.hpp says.
template <typename Scalar, typename Weight = Matrix<Scalar>>
class MultiheadAttention : public AttentionLayer<MultiheadAttention<Scalar, Weight>, Scalar> {
  using Base = AttentionLayer<MultiheadAttention, Scalar>;

 public:
  using Config = MultiheadAttentionConfig;
  using WeightMatrix = Weight;
  using Tape = typename Base::Tape;

  /// Initial parameters are those of nn.Linear.
  explicit MultiheadAttention(const Config& config)
      : config_(checked(config)),
        head_dim_(config_.embed_dim / config_.num_heads),
        q_proj(config_.embed_dim, config_.embed_dim, config_.bias),
        k_proj(config_.embed_dim, config_.num_kv_heads * head_dim_, config_.bias),
        v_proj(config_.embed_dim, config_.num_kv_heads * head_dim_, config_.bias),
        out_proj(config_.embed_dim, config_.embed_dim, config_.bias),
        rotary_(detail::make_rotary<Scalar>(config_.rotary, head_dim_)) {
    Initializer random(config.seed);
    for (Linear<Scalar, Weight>* projection : {&q_proj, &k_proj, &v_proj, &out_proj}) projection->initialize(random);
  }

  const Config& config() const { return config_; }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    detail::visit_part("q_proj", self.q_proj, visitor);
    detail::visit_part("k_proj", self.k_proj, visitor);
    detail::visit_part("v_proj", self.v_proj, visitor);
    detail::visit_part("out_proj", self.out_proj, visitor);
  }

 private:
  friend Base;
  static constexpr const char* kName = "MultiheadAttention";

  template <typename Y, typename X, AttentionMask Mask, Executor E>
  void forward_sequences(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                         std::span<const Index> lengths, Tape* tape, Workspace& workspace, E& executor) const {
    const Index heads = config_.num_heads, kv_heads = config_.num_kv_heads;
    run(y, x, tape, workspace, executor, [&](auto& attended, auto& q, auto& k, auto& v) {
      detail::for_each_sequence(lengths, workspace, executor, [&](detail::SequenceRows rows, auto& share, auto& own) {
        const Index first = rows.first, tokens = rows.count;
        detail::rotate_rows(rotary_, q, heads, k, kv_heads, first, tokens, 0, own);
        multihead_attention_into(detail::rows_of(attended, first, tokens), detail::rows_of(q, first, tokens),
                                 detail::rows_of(k, first, tokens), detail::rows_of(v, first, tokens),
                                 Heads{heads, kv_heads}, mask, AttentionOptions{}, share, own);
      });
    });
  }

  template <typename Y, typename X, typename Storage, Executor E>
  void forward_cached(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, KvCache<Storage>& cache,
                      Workspace& workspace, E& executor) const {
    const Index n = x.rows(), heads = config_.num_heads, kv_heads = config_.num_kv_heads, d = head_dim_;
    cache.template prepare<Scalar>(kName, kv_heads, 1, d, d, n);
    run(y, x, nullptr, workspace, executor, [&](auto& attended, auto& q, auto& k, auto& v) {
      detail::rotate_rows(rotary_, q, heads, k, kv_heads, 0, n, cache.position(), executor);
      cache.write(detail::view_of(k), detail::view_of(v), executor);
      decode_attention_into(attended, q, cache.packed(n), Heads{heads, kv_heads}, cache.window_mask(),
                            AttentionOptions{}, workspace, executor);
    });
  }

  /// Projects x, lets `attend` fill what the heads have attended to (from q, k and v), and projects that to y.
  template <typename Y, typename X, Executor E, typename Attend>
  void run(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Tape* tape, Workspace& workspace, E& executor,
           Attend&& attend) const {
    const Index n = x.rows(), heads = config_.num_heads, kv_heads = config_.num_kv_heads, d = head_dim_;
    const auto frame = workspace.frame();
    const auto part = [&](auto member, Index cols) { return Base::part(tape, member, n, cols, workspace); };
    auto q = part(&Tape::q, heads * d), k = part(&Tape::k, kv_heads * d), v = part(&Tape::v, kv_heads * d);
    auto attended = part(&Tape::attended, heads * d);
    using Output = detail::LinearOutput<Scalar, Weight>;
    const std::array outputs{Output{q_proj, q}, Output{k_proj, k}, Output{v_proj, v}};
    detail::linear_forward_all(outputs, x, workspace, executor);
    attend(attended, q, k, v);
    out_proj.forward_into(y, attended, workspace, executor);
  }

  template <typename DX, typename DY, Executor E>
  void differentiate(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape,
                     MultiheadAttention& grad, Workspace& workspace, E& executor) const {
    using detail::rows_of;
    const Index n = dy.rows(), heads = config_.num_heads, kv_heads = config_.num_kv_heads, d = head_dim_;
    const auto frame = workspace.frame();
    const auto scratch = [&](Index cols) { return MatrixMap<Scalar>(workspace.take<Scalar>(n * cols), n, cols); };
    auto dattended = scratch(heads * d), dq = scratch(heads * d), dk = scratch(kv_heads * d),
         dv = scratch(kv_heads * d);
    out_proj.backward_into(dattended, dy, tape.attended, grad.out_proj, workspace, executor);
    tape.mask.visit([&](const auto& mask) {
      detail::for_each_sequence(
          tape.lengths, workspace, executor, [&](detail::SequenceRows rows, auto& share, auto& own) {
            const Index first = rows.first, tokens = rows.count;
            multihead_attention_backward_into(
                {rows_of(dq, first, tokens), rows_of(dk, first, tokens), rows_of(dv, first, tokens)},
                rows_of(tape.q, first, tokens), rows_of(tape.k, first, tokens), rows_of(tape.v, first, tokens),
                rows_of(dattended, first, tokens), Heads{heads, kv_heads}, mask, AttentionOptions{}, share, own);
            detail::rotate_rows(rotary_, dq, heads, dk, kv_heads, first, tokens, 0, own, Turn::back);
          });
    });
    using Gradient = detail::LinearGradient<Scalar, Weight>;
    const std::array gradients{Gradient{q_proj, dq, grad.q_proj}, Gradient{k_proj, dk, grad.k_proj},
                               Gradient{v_proj, dv, grad.v_proj}};
    detail::linear_backward_all(dx, gradients, tape.x, workspace, executor);
  }

  /// Whether parameters have the same shapes, as far as fields go that only this layer has.
  static bool same_shape(const Config& /*a*/, const Config& /*b*/) { return true; }

  static Config checked(Config config) {
    detail::check_positive(kName, "num_heads", config.num_heads);
    detail::checked_head_dim(kName, config.embed_dim, "num_heads", config.num_heads);
    detail::checked_product(kName, "embed_dim², the size of a weight,", {config.embed_dim, config.embed_dim});
    config.num_kv_heads = detail::checked_heads(kName, {config.num_heads, config.num_kv_heads}).num_kv_heads;
    return config;
  }

  Config config_;
  Index head_dim_;  // d

 public:
  Linear<Scalar, Weight> q_proj;    ///< num_heads·d x embed_dim
  Linear<Scalar, Weight> k_proj;    ///< num_kv_heads·d x embed_dim
  Linear<Scalar, Weight> v_proj;    ///< num_kv_heads·d x embed_dim
  Linear<Scalar, Weight> out_proj;  ///< embed_dim x num_heads·d

 private:
  std::optional<Rotary<Scalar>> rotary_;
};

}  // namespace diffattn::inline v0_1
