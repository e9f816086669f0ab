#pragma once

// Multi-head differential attention, second version (Microsoft, January 2026, multihead_flashdiffv2.py): λ is learned
// per token and head, both maps of a head share keys and values, and there is neither norm nor λ_init.
//
//   O_i = (P_{2i} − σ(λ_i) P_{2i+1}) V_g,   λ = x W_λᵀ,   y = Concat(O_1 … O_h) W_Oᵀ
//
// num_heads (h) counts differential heads: q has 2h heads of width head_dim, the pair (2i, 2i+1) reads key and value
// head i / (num_heads / num_kv_heads). head_dim is free.
//
// Parameters (visit_parameters): q_proj, k_proj, v_proj, lambda_proj, o_proj.
// How it is called: attention_layer.hpp. Shapes, errors, threads: as multihead_diff_attention.hpp says.

#include <array>
#include <cmath>
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
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rotary.hpp"

namespace diffattn::inline v0_1 {

struct MultiheadDiffAttentionV2Config {
  Index embed_dim = 0;
  Index num_heads = 0;                                ///< differential heads
  Index num_kv_heads = 0;                             ///< divides num_heads; 0 = num_heads
  Index head_dim = 0;                                 ///< 0 = embed_dim / (2·num_heads)
  std::optional<RotaryConfig> rotary = std::nullopt;  ///< no position embedding if left out
  bool bias = false;                                  ///< biases on the five projections
  std::uint64_t seed = 0;                             ///< of the initial parameters
};

/// Weight: the matrix type of the projections' weights, as linear.hpp says.
template <typename Scalar, typename Weight = Matrix<Scalar>>
class MultiheadDiffAttentionV2 : public AttentionLayer<MultiheadDiffAttentionV2<Scalar, Weight>, Scalar> {
  using Base = AttentionLayer<MultiheadDiffAttentionV2, Scalar>;

 public:
  using Config = MultiheadDiffAttentionV2Config;
  using WeightMatrix = Weight;
  using Tape = typename Base::Tape;

  /// Initial parameters are those of nn.Linear.
  explicit MultiheadDiffAttentionV2(const Config& config)
      : config_(checked(config)),
        q_proj(config_.embed_dim, 2 * config_.num_heads * config_.head_dim, config_.bias),
        k_proj(config_.embed_dim, config_.num_kv_heads * config_.head_dim, config_.bias),
        v_proj(config_.embed_dim, config_.num_kv_heads * config_.head_dim, config_.bias),
        lambda_proj(config_.embed_dim, config_.num_heads, config_.bias),
        o_proj(config_.num_heads * config_.head_dim, config_.embed_dim, config_.bias),
        rotary_(detail::make_rotary<Scalar>(config_.rotary, config_.head_dim)) {
    Initializer random(config.seed);
    for (Linear<Scalar, Weight>* projection : {&q_proj, &k_proj, &v_proj, &lambda_proj, &o_proj}) {
      projection->initialize(random);
    }
  }

  const Config& config() const { return config_; }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    detail::visit_part("q_proj", self.q_proj, visitor);
    detail::visit_part("k_proj", self.k_proj, visitor);
    detail::visit_part("v_proj", self.v_proj, visitor);
    detail::visit_part("lambda_proj", self.lambda_proj, visitor);
    detail::visit_part("o_proj", self.o_proj, visitor);
  }

 private:
  friend Base;
  static constexpr const char* kName = "MultiheadDiffAttentionV2";

  template <typename Y, typename X, AttentionMask Mask, Executor E>
  void forward_sequences(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                         std::span<const Index> lengths, Tape* tape, Workspace& workspace, E& executor) const {
    const Index heads = config_.num_heads, kv_heads = config_.num_kv_heads;
    run(y, x, tape, workspace, executor, [&](auto& attended, auto& q, auto& k, auto& v, auto& lambda) {
      detail::for_each_sequence(lengths, workspace, executor, [&](detail::SequenceRows rows, auto& share, auto& own) {
        const Index first = rows.first, tokens = rows.count;
        detail::rotate_rows(rotary_, q, 2 * heads, k, kv_heads, first, tokens, 0, own);
        multihead_diff_attention_into(detail::rows_of(attended, first, tokens), detail::rows_of(q, first, tokens),
                                      detail::rows_of(k, first, tokens), detail::rows_of(v, first, tokens),
                                      detail::rows_of(lambda, first, tokens), Heads{heads, kv_heads}, mask,
                                      AttentionOptions{}, share, own);
      });
    });
  }

  template <typename Y, typename X, typename Storage, Executor E>
  void forward_cached(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, KvCache<Storage>& cache,
                      Workspace& workspace, E& executor) const {
    const Index n = x.rows(), heads = config_.num_heads, kv_heads = config_.num_kv_heads, d = config_.head_dim;
    cache.template prepare<Scalar>(kName, kv_heads, 1, d, d, n);
    run(y, x, nullptr, workspace, executor, [&](auto& attended, auto& q, auto& k, auto& v, auto& lambda) {
      detail::rotate_rows(rotary_, q, 2 * heads, k, kv_heads, 0, n, cache.position(), executor);
      cache.write(detail::view_of(k), detail::view_of(v), executor);
      decode_diff_attention_into(attended, q, cache.packed(n), lambda, Heads{heads, kv_heads}, cache.window_mask(),
                                 AttentionOptions{}, workspace, executor);
    });
  }

  /// Projects x, lets `attend` fill what the heads have attended to (from q, k, v and λ), and projects that to y.
  template <typename Y, typename X, Executor E, typename Attend>
  void run(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Tape* tape, Workspace& workspace, E& executor,
           Attend&& attend) const {
    const Index n = x.rows(), heads = config_.num_heads, kv_heads = config_.num_kv_heads, d = config_.head_dim;
    const auto frame = workspace.frame();
    const auto part = [&](auto member, Index cols) { return Base::part(tape, member, n, cols, workspace); };
    auto q = part(&Tape::q, 2 * heads * d), k = part(&Tape::k, kv_heads * d), v = part(&Tape::v, kv_heads * d);
    auto lambda = part(&Tape::lambda, heads), attended = part(&Tape::attended, heads * d);
    using Output = detail::LinearOutput<Scalar, Weight>;
    const std::array outputs{Output{q_proj, q}, Output{k_proj, k}, Output{v_proj, v}, Output{lambda_proj, lambda}};
    detail::linear_forward_all(outputs, x, workspace, executor);
    // One at a time: Eigen's packets and their tails round differently, which a token would notice in other company.
    lambda = lambda.unaryExpr([](Scalar logit) { return Scalar(1) / (Scalar(1) + std::exp(-logit)); });
    attend(attended, q, k, v, lambda);
    o_proj.forward_into(y, attended, workspace, executor);
  }

  template <typename DX, typename DY, Executor E>
  void differentiate(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape,
                     MultiheadDiffAttentionV2& grad, Workspace& workspace, E& executor) const {
    using detail::rows_of;
    const Index n = dy.rows(), heads = config_.num_heads, kv_heads = config_.num_kv_heads, d = config_.head_dim;
    const auto frame = workspace.frame();
    const auto scratch = [&](Index cols) { return MatrixMap<Scalar>(workspace.take<Scalar>(n * cols), n, cols); };
    auto dattended = scratch(heads * d), dq = scratch(2 * heads * d), dk = scratch(kv_heads * d);
    auto dv = scratch(kv_heads * d), dlambda = scratch(heads);
    o_proj.backward_into(dattended, dy, tape.attended, grad.o_proj, workspace, executor);
    tape.mask.visit([&](const auto& mask) {
      detail::for_each_sequence(
          tape.lengths, workspace, executor, [&](detail::SequenceRows rows, auto& share, auto& own) {
            const Index first = rows.first, tokens = rows.count;
            multihead_diff_attention_backward_into({rows_of(dq, first, tokens), rows_of(dk, first, tokens),
                                                    rows_of(dv, first, tokens), rows_of(dlambda, first, tokens)},
                                                   rows_of(tape.q, first, tokens), rows_of(tape.k, first, tokens),
                                                   rows_of(tape.v, first, tokens), rows_of(tape.lambda, first, tokens),
                                                   rows_of(dattended, first, tokens), Heads{heads, kv_heads}, mask,
                                                   AttentionOptions{}, share, own);
            detail::rotate_rows(rotary_, dq, 2 * heads, dk, kv_heads, first, tokens, 0, own, Turn::back);
          });
    });
    dlambda.array() *= tape.lambda.array() * (Scalar(1) - tape.lambda.array());  // of the sigmoid
    using Gradient = detail::LinearGradient<Scalar, Weight>;
    const std::array gradients{Gradient{q_proj, dq, grad.q_proj}, Gradient{k_proj, dk, grad.k_proj},
                               Gradient{v_proj, dv, grad.v_proj}, Gradient{lambda_proj, dlambda, grad.lambda_proj}};
    detail::linear_backward_all(dx, gradients, tape.x, workspace, executor);
  }

  /// Whether parameters have the same shapes, as far as fields go that only this layer has.
  static bool same_shape(const Config& a, const Config& b) { return a.head_dim == b.head_dim; }

  static Config checked(Config config) {
    detail::check_positive(kName, "embed_dim", config.embed_dim);
    detail::check_positive(kName, "num_heads", config.num_heads);
    config.num_kv_heads = detail::checked_heads(kName, {config.num_heads, config.num_kv_heads}).num_kv_heads;
    if (config.head_dim == 0) {
      const Index parts = detail::checked_product(kName, "2·num_heads", {2, config.num_heads});
      config.head_dim = detail::checked_head_dim(kName, config.embed_dim, "2·num_heads", parts);
    }
    detail::check_positive(kName, "head_dim", config.head_dim);
    detail::checked_product(kName, "2·num_heads·head_dim·embed_dim, the size of a weight,",
                            {2, config.num_heads, config.head_dim, config.embed_dim});
    return config;
  }

  Config config_;

 public:
  Linear<Scalar, Weight> q_proj;       ///< 2·num_heads·head_dim x embed_dim
  Linear<Scalar, Weight> k_proj;       ///< num_kv_heads·head_dim x embed_dim
  Linear<Scalar, Weight> v_proj;       ///< num_kv_heads·head_dim x embed_dim
  Linear<Scalar, Weight> lambda_proj;  ///< num_heads x embed_dim
  Linear<Scalar, Weight> o_proj;       ///< embed_dim x num_heads·head_dim

 private:
  std::optional<Rotary<Scalar>> rotary_;
};

}  // namespace diffattn::inline v0_1
