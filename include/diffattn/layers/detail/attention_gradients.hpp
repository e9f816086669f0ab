#pragma once

// What an attention layer does going back, whichever variant it is: from dy to dx, to the gradient of the memory if
// there was one, and to those of the parameters. CrossAttention and AttentionLayer have checked what comes here.
//
//   dy → differentiate_output → differentiate_attention → projections → dx, dmemory

#include <array>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/gradients.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/layers/attention_variant.hpp"
#include "diffattn/layers/detail/bias_gradients.hpp"
#include "diffattn/layers/detail/cached_attention.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/linear_group.hpp"
#include "diffattn/layers/rotary.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Variant>
class AttentionGradients : public CachedAttention<Variant> {
  using Passes = CachedAttention<Variant>;

 public:
  using typename Passes::Scalar, typename Passes::Tape, typename Passes::Projection;

 protected:
  using Passes::kTokenLambda, Passes::Passes;
  using typename Passes::Rows, typename Passes::Input, typename Passes::Output, typename Passes::Parts;

  /// dx, and into grad, from dy: output, heads, attention, projections. Of a tape with a memory, dmemory too. dbias:
  /// what the gradient of a learned bias is added to; no data: nothing.
  template <typename E>
  void differentiate(const Output& dx, const Output* dmemory, const Input& dy, const Tape& tape, Passes& grad,
                     const StridedView<Scalar>& dbias, Workspace& workspace, E& executor) const {
    const auto frame = workspace.frame();
    const auto like = [&](const Matrix<Scalar>& part) {
      return Rows(workspace.take<Scalar>(part.size()), part.rows(), part.cols());
    };
    Parts d{like(tape.q), like(tape.k), like(tape.v), like(tape.lambda), like(tape.attended)};
    differentiate_output(d.attended, dy, tape, grad, workspace, executor);
    differentiate_attention(d, tape, grad, dbias, workspace, executor);
    const From k{this->k_proj, d.k, grad.k_proj}, v{this->v_proj, d.v, grad.v_proj};
    if (dmemory == nullptr) {
      differentiate_queries(dx, d, tape, grad, workspace, executor, k, v);
    } else {
      differentiate_queries(dx, d, tape, grad, workspace, executor);
      linear_backward_all(*dmemory, std::array{k, v}, tape.memory, workspace, executor);
    }
  }

  using From = LinearGradient<Scalar, typename Variant::WeightMatrix>;

  /// From the gradients of the queries and of what comes with them to dx; `others` have read x, too.
  template <typename E, typename... Others>
  void differentiate_queries(const Output& dx, Parts& d, const Tape& tape, Passes& grad, Workspace& workspace,
                             E& executor, const Others&... others) const {
    const From q{this->q_proj, d.q, grad.q_proj};
    if constexpr (kTokenLambda) {
      for (Index i = 0; i < d.lambda.size(); ++i) {
        d.lambda.data()[i] *= Variant::lambda_slope(tape.lambda.data()[i]);
      }
      const From numbers{this->lambda_proj, d.lambda, grad.lambda_proj};
      linear_backward_all(dx, std::array{q, others..., numbers}, tape.x, workspace, executor);
    } else {
      linear_backward_all(dx, std::array{q, others...}, tape.x, workspace, executor);
    }
  }

  /// Of what the heads attended to.
  template <typename E>
  void differentiate_output(Rows& dattended, const Input& dy, const Tape& tape, Passes& grad, Workspace& workspace,
                            E& executor) const {
    const Projection& output = this->*Variant::kOutput;
    Projection& output_grad = grad.*Variant::kOutput;
    if constexpr (!Variant::kFinishesHeads) {
      output.backward_into(dattended, dy, tape.attended, output_grad, workspace, executor);
    } else {
      {
        const auto frame = workspace.frame();
        Rows finished(workspace.take<Scalar>(dattended.size()), dattended.rows(), dattended.cols());
        this->finish_all_heads(finished, tape.attended.data(), workspace, executor);
        output.backward_into(dattended, dy, finished, output_grad, workspace, executor);
      }
      auto dresults = this->heads_of(dattended.data(), dattended.rows());
      this->backward_heads(dresults, dresults, this->heads_of(tape.attended.data(), dattended.rows()), grad, workspace,
                           executor);
    }
  }

  /// Of queries, keys, values, λ and a learned bias, from d.attended.
  template <typename E>
  void differentiate_attention(Parts& d, const Tape& tape, Passes& grad, const StridedView<Scalar>& dbias,
                               Workspace& workspace, E& executor) const {
    constexpr bool kLayerLambda = Variant::kLambda == LambdaSource::layer;
    const auto sequences = static_cast<Index>(tape.lengths.size());
    auto* const dlambdas = workspace.take<Scalar>(kLayerLambda ? sequences : 0);
    const BiasGradients<Scalar> dbiases(dbias, sequences, workspace);
    tape.mask.visit([&](const auto& mask) {
      const auto differentiate_sequence = [&](SequenceRows rows, auto& share, auto& own) {
        const auto of = [&](auto& part) { return rows_of(part, rows.first, rows.count); };
        const auto of_keys = [&](auto& part) { return rows_of(part, rows.first_key, rows.num_keys); };
        const auto dq = of(d.q), dk = of_keys(d.k), dv = of_keys(d.v), dattended = of(d.attended);
        const auto q = of(tape.q), k = of_keys(tape.k), v = of_keys(tape.v);
        if constexpr (Variant::kLambda == LambdaSource::none) {
          AttentionGradientViews<Scalar> gradients{dq, dk, dv};
          gradients.dbias = dbiases.of_sequence(rows.number);
          multihead_attention_backward_into(gradients, q, k, v, dattended, this->heads(), mask, AttentionOptions{},
                                            share, own);
        } else {
          const auto lambda_of_these = this->lambda_of_rows(tape.lambda, rows.first, rows.count);
          const auto differentiate_heads = [&](DiffAttentionGradientViews<Scalar> gradients) {
            gradients.dbias = dbiases.of_sequence(rows.number);
            multihead_diff_attention_backward_into(gradients, q, k, v, lambda_of_these, dattended, this->heads(), mask,
                                                   AttentionOptions{}, share, own);
          };
          if constexpr (kLayerLambda) {
            differentiate_heads({dq, dk, dv, dlambdas[rows.number]});
          } else {
            differentiate_heads({dq, dk, dv, of(d.lambda)});
          }
        }
        this->turn(d, rows, 0, own, Turn::back);
      };
      for_each_sequence(tape.lengths, tape.key_lengths(), workspace, executor, differentiate_sequence);
    });
    dbiases.add_up();
    if constexpr (kLayerLambda) {
      Scalar dlambda = 0;
      for (Index s = 0; s < sequences; ++s) dlambda += dlambdas[s];
      this->backward_lambda(dlambda, grad);
    }
  }
};

}  // namespace diffattn::inline v0_1::detail
