#pragma once

// What an attention layer does, whichever variant it is: forward for stacked sequences, forward behind a cache, and
// backward. AttentionLayer has checked what comes here.
//
//   x → project → turn (rotary) → attend → finish → y          and back: differentiate_output, …_attention, projections

#include <array>
#include <optional>
#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "diffattn/kernels/gradients.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/layers/attention_variant.hpp"
#include "diffattn/layers/detail/attention_tape.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/kv_cache.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rotary.hpp"
#include "diffattn/layers/sequences.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Variant>
class AttentionPasses : public Variant {
 public:
  using Scalar = typename Variant::Scalar;
  using Config = typename Variant::Config;
  using WeightMatrix = typename Variant::WeightMatrix;
  using Projection = Linear<Scalar, WeightMatrix>;

  /// For visit_parameters: q_proj, k_proj, v_proj, then the variant's.
  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("q_proj", self.q_proj, visitor);
    visit_part("k_proj", self.k_proj, visitor);
    visit_part("v_proj", self.v_proj, visitor);
    Variant::visit(self, visitor);
  }

  struct Tape : AttentionTape<Scalar> {};

  /// The heads as the kernels are told of them.
  Heads heads() const { return configured_heads(config_); }
  /// Which packed head of the queries is that of a map, 0 or 1, of a head: rows query_head(…) · head_dim on of
  /// q_proj.weight. Heads that share their second map have the same for it.
  Index query_head(Index head, Index map) const { return heads().query_head(head, map, Variant::kQueryMaps); }

 protected:
  explicit AttentionPasses(const Config& config)
      : Variant(config),
        config_(config),
        q_proj(config.embed_dim, configured_heads(config).query_heads(Variant::kQueryMaps) * config.head_dim,
               config.bias),
        k_proj(config.embed_dim, config.num_kv_heads * Variant::kKeyMaps * config.head_dim, config.bias),
        v_proj(config.embed_dim, config.num_kv_heads * Variant::value_dim(config), config.bias),
        rotary_(make_rotary<Scalar>(config.rotary, config.head_dim)) {
    shape_ = {config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, parameter_count(*this)};
  }

  static constexpr bool kTokenLambda = Variant::kLambda == LambdaSource::token;
  static_assert((Variant::kQueryMaps == 1) == (Variant::kLambda == LambdaSource::none),
                "diffattn: a variant has a lambda when, and only when, its heads are the difference of two maps");

  using Rows = MatrixMap<Scalar>;
  using Input = ConstStridedMap<Scalar>;
  using Output = StridedMap<Scalar>;

  /// What the heads read and write, n rows each, on the tape or in the workspace.
  struct Parts {
    Rows q, k, v, lambda, attended;
  };

  /// x through the projections; room for what the heads attend to.
  template <typename E>
  Parts project(const Input& x, Tape* tape, Workspace& workspace, E& executor) const {
    const Index n = x.rows();
    const auto part = [&](Matrix<Scalar> AttentionTape<Scalar>::*member, Index cols) {
      if (tape == nullptr) return Rows(workspace.take<Scalar>(n * cols), n, cols);
      (tape->*member).resize(n, cols);
      return Rows((tape->*member).data(), n, cols);
    };
    Parts parts{part(&Tape::q, q_proj.weight.rows()), part(&Tape::k, k_proj.weight.rows()),
                part(&Tape::v, v_proj.weight.rows()), part(&Tape::lambda, kTokenLambda ? config_.num_heads : 0),
                part(&Tape::attended, (this->*Variant::kOutput).weight.cols())};
    using To = LinearOutput<Scalar, WeightMatrix>;
    const To q{q_proj, parts.q}, k{k_proj, parts.k}, v{v_proj, parts.v};
    if constexpr (kTokenLambda) {
      linear_forward_all(std::array{q, k, v, To{this->lambda_proj, parts.lambda}}, x, workspace, executor);
      // One at a time: packets of several numbers round otherwise, and a token must not depend on its company.
      for (Index i = 0; i < parts.lambda.size(); ++i) {
        parts.lambda.data()[i] = Variant::lambda_of(parts.lambda.data()[i]);
      }
    } else {
      linear_forward_all(std::array{q, k, v}, x, workspace, executor);
    }
    return parts;
  }

  /// What the heads have attended to, to y.
  template <typename E>
  void finish(const Output& y, Rows& attended, bool keep_attended, Workspace& workspace, E& executor) const {
    if constexpr (!Variant::kFinishesHeads) {
      (this->*Variant::kOutput).forward_into(y, attended, workspace, executor);
    } else {
      Rows finished(keep_attended ? workspace.take<Scalar>(attended.size()) : attended.data(), attended.rows(),
                    attended.cols());
      finish_all_heads(finished, attended.data(), workspace, executor);
      (this->*Variant::kOutput).forward_into(y, finished, workspace, executor);
    }
  }

  /// finish_heads, for which a head is a row.
  template <typename E>
  void finish_all_heads(Rows& finished, const Scalar* attended, Workspace& workspace, E& executor) const {
    auto y = heads_of(finished.data(), finished.rows());
    this->finish_heads(y, heads_of(attended, finished.rows()), workspace, executor);
  }

  /// The results of n tokens, one head a row.
  template <typename T>
  auto heads_of(T* results, Index n) const {
    using Results = std::conditional_t<std::is_const_v<T>, const Matrix<Scalar>, Matrix<Scalar>>;
    return Eigen::Map<Results>(results, n * config_.num_heads, Variant::value_dim(config_));
  }

  /// The λ of `count` tokens from `first` on: a number, or one for each of them and each head.
  template <typename Lambda>
  auto lambda_of_rows(Lambda& all_rows, Index first, Index count) const {
    if constexpr (kTokenLambda) {
      return rows_of(all_rows, first, count);
    } else {
      return this->lambda_value();
    }
  }

  template <typename E>
  void turn(Rows& q, Rows& k, Index first, Index count, Index position, E& executor, Turn turn = Turn::forward) const {
    rotate_rows(rotary_, q, heads().query_heads(Variant::kQueryMaps), k, config_.num_kv_heads * Variant::kKeyMaps,
                first, count, position, executor, turn);
  }

  /// y = layer(x), each sequence by itself.
  template <typename Mask, typename E>
  void attend_to_sequences(const Output& y, const Input& x, const Mask& mask, const SequenceLengths& lengths,
                           Tape* tape, Workspace& workspace, E& executor) const {
    const auto frame = workspace.frame();
    Parts parts = project(x, tape, workspace, executor);
    for_each_sequence(lengths, workspace, executor, [&](SequenceRows rows, auto& share, auto& own) {
      const auto of = [&](Rows& part) { return rows_of(part, rows.first, rows.count); };
      turn(parts.q, parts.k, rows.first, rows.count, 0, own);
      const auto q = of(parts.q), k = of(parts.k), v = of(parts.v), attended = of(parts.attended);
      if constexpr (Variant::kLambda == LambdaSource::none) {
        multihead_attention_into(attended, q, k, v, heads(), mask, AttentionOptions{}, share, own);
      } else {
        multihead_diff_attention_into(attended, q, k, v, lambda_of_rows(parts.lambda, rows.first, rows.count), heads(),
                                      mask, AttentionOptions{}, share, own);
      }
    });
    finish(y, parts.attended, tape != nullptr, workspace, executor);
  }

  /// y = layer(x) behind what the cache holds, in the cache's three steps: prepare, write, commit. What throws before
  /// the last leaves it as it was. The mask is that of all tokens ever fed and of x's, in one piece.
  template <typename Storage, typename Mask, typename E>
  void attend_to_cache(const Output& y, const Input& x, KvCache<Storage>& cache, const Mask& mask, Workspace& workspace,
                       E& executor) const {
    const Index n = x.rows();
    cache.template prepare<Scalar>(Variant::kName, config_.num_kv_heads, Variant::kKeyMaps, config_.head_dim,
                                   Variant::value_dim(config_), n);
    const auto frame = workspace.frame();
    Parts parts = project(x, nullptr, workspace, executor);
    turn(parts.q, parts.k, 0, n, cache.position(), executor);
    cache.write(view_of(parts.k), view_of(parts.v), executor);
    if constexpr (std::is_same_v<Mask, CausalMask>) {
      decode(parts, cache, cache.window_mask(), workspace, executor);  // the same, and compiled once
    } else if (cache.options().window) {
      decode(parts, cache, both(MaskReference<Mask>{mask}, cache.window_mask()), workspace, executor);
    } else {
      decode(parts, cache, mask, workspace, executor);
    }
    finish(y, parts.attended, false, workspace, executor);
    cache.commit(n);
  }

  /// Fills parts.attended from what has been written to the cache.
  template <typename Storage, typename Mask, typename E>
  void decode(Parts& parts, const KvCache<Storage>& cache, const Mask& mask, Workspace& workspace, E& executor) const {
    const Index n = parts.q.rows();
    const auto pages = cache.packed(n);
    if constexpr (Variant::kLambda == LambdaSource::none) {
      decode_attention_into(parts.attended, parts.q, pages, heads(), mask, AttentionOptions{}, workspace, executor);
    } else {
      decode_diff_attention_into(parts.attended, parts.q, pages, lambda_of_rows(parts.lambda, 0, n), heads(), mask,
                                 AttentionOptions{}, workspace, executor);
    }
  }

  /// dx, and into grad, from dy: output, heads, attention, projections.
  template <typename E>
  void differentiate(const Output& dx, const Input& dy, const Tape& tape, AttentionPasses& grad, Workspace& workspace,
                     E& executor) const {
    const Index n = dy.rows();
    const auto frame = workspace.frame();
    const auto scratch = [&](Index cols) { return Rows(workspace.take<Scalar>(n * cols), n, cols); };
    Parts d{scratch(tape.q.cols()), scratch(tape.k.cols()), scratch(tape.v.cols()), scratch(tape.lambda.cols()),
            scratch(tape.attended.cols())};
    differentiate_output(d.attended, dy, tape, grad, workspace, executor);
    differentiate_attention(d, tape, grad, workspace, executor);
    using From = LinearGradient<Scalar, WeightMatrix>;
    const From q{q_proj, d.q, grad.q_proj}, k{k_proj, d.k, grad.k_proj}, v{v_proj, d.v, grad.v_proj};
    if constexpr (kTokenLambda) {
      for (Index i = 0; i < d.lambda.size(); ++i) {
        d.lambda.data()[i] *= Variant::lambda_slope(tape.lambda.data()[i]);
      }
      const From numbers{this->lambda_proj, d.lambda, grad.lambda_proj};
      linear_backward_all(dx, std::array{q, k, v, numbers}, tape.x, workspace, executor);
    } else {
      linear_backward_all(dx, std::array{q, k, v}, tape.x, workspace, executor);
    }
  }

  /// Of what the heads attended to.
  template <typename E>
  void differentiate_output(Rows& dattended, const Input& dy, const Tape& tape, AttentionPasses& grad,
                            Workspace& workspace, E& executor) const {
    const Projection& output = this->*Variant::kOutput;
    Projection& output_grad = grad.*Variant::kOutput;
    if constexpr (!Variant::kFinishesHeads) {
      output.backward_into(dattended, dy, tape.attended, output_grad, workspace, executor);
    } else {
      {
        const auto frame = workspace.frame();
        Rows finished(workspace.take<Scalar>(dattended.size()), dattended.rows(), dattended.cols());
        finish_all_heads(finished, tape.attended.data(), workspace, executor);
        output.backward_into(dattended, dy, finished, output_grad, workspace, executor);
      }
      auto dresults = heads_of(dattended.data(), dattended.rows());
      this->backward_heads(dresults, dresults, heads_of(tape.attended.data(), dattended.rows()), grad, workspace,
                           executor);
    }
  }

  /// Of queries, keys, values and λ, from d.attended.
  template <typename E>
  void differentiate_attention(Parts& d, const Tape& tape, AttentionPasses& grad, Workspace& workspace,
                               E& executor) const {
    constexpr bool kLayerLambda = Variant::kLambda == LambdaSource::layer;
    const auto sequences = static_cast<Index>(tape.lengths.size());
    auto* const dlambdas = workspace.take<Scalar>(kLayerLambda ? sequences : 0);
    tape.mask.visit([&](const auto& mask) {
      for_each_sequence(tape.lengths, workspace, executor, [&](SequenceRows rows, auto& share, auto& own) {
        const auto of = [&](auto& part) { return rows_of(part, rows.first, rows.count); };
        const auto dq = of(d.q), dk = of(d.k), dv = of(d.v), dattended = of(d.attended);
        const auto q = of(tape.q), k = of(tape.k), v = of(tape.v);
        if constexpr (Variant::kLambda == LambdaSource::none) {
          multihead_attention_backward_into({dq, dk, dv}, q, k, v, dattended, heads(), mask, AttentionOptions{}, share,
                                            own);
        } else {
          const auto lambda_of_these = lambda_of_rows(tape.lambda, rows.first, rows.count);
          const auto differentiate_heads = [&](const DiffAttentionGradientViews<Scalar>& gradients) {
            multihead_diff_attention_backward_into(gradients, q, k, v, lambda_of_these, dattended, heads(), mask,
                                                   AttentionOptions{}, share, own);
          };
          if constexpr (kLayerLambda) {
            differentiate_heads({dq, dk, dv, dlambdas[rows.number]});
          } else {
            differentiate_heads({dq, dk, dv, of(d.lambda)});
          }
        }
        turn(d.q, d.k, rows.first, rows.count, 0, own, Turn::back);
      });
    });
    if constexpr (kLayerLambda) {
      Scalar dlambda = 0;
      for (Index s = 0; s < sequences; ++s) dlambda += dlambdas[s];
      this->backward_lambda(dlambda, grad);
    }
  }

  Config config_;
  AttentionShape shape_;

 public:
  Projection q_proj;  ///< heads().query_heads(kQueryMaps) · head_dim x embed_dim
  Projection k_proj;  ///< num_kv_heads · kKeyMaps · head_dim x embed_dim
  Projection v_proj;  ///< num_kv_heads · value_dim x embed_dim

 private:
  std::optional<Rotary<Scalar>> rotary_;
};

}  // namespace diffattn::inline v0_1::detail
