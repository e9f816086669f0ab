#pragma once

// Where a call's gradients go, once its operands are known to fit: matrices that are resized, or views that must fit.

#include "diffattn/kernels/detail/backward/backward_operands.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/gradients.hpp"

namespace diffattn::inline v0_1::detail {

/// The shapes of the gradients of a call.
struct GradientShapes {
  explicit GradientShapes(const CallSizes& sizes)
      : q_cols(sizes.heads.query_heads(sizes.query_maps) * sizes.d),
        k_cols(sizes.heads.num_kv_heads * sizes.key_maps * sizes.d),
        v_cols(sizes.heads.num_kv_heads * sizes.dv) {}
  Index q_cols, k_cols, v_cols;
};

template <typename Scalar>
Operand operand(const char* name, const StridedView<Scalar>& view) {
  return {name, view.rows, view.cols};
}

template <typename Views>
void check_gradients(const char* where, const Views& to, const CallSizes& sizes) {
  const GradientShapes shapes(sizes);
  check_operand(where, operand("dq", to.dq), sizes.n_q, shapes.q_cols);
  check_operand(where, operand("dk", to.dk), sizes.n_k, shapes.k_cols);
  check_operand(where, operand("dv", to.dv), sizes.n_k, shapes.v_cols);
}

template <typename Gradients>
void resize_gradients(Gradients& to, const CallSizes& sizes) {
  const GradientShapes shapes(sizes);
  to.dq.resize(sizes.n_q, shapes.q_cols);
  to.dk.resize(sizes.n_k, shapes.k_cols);
  to.dv.resize(sizes.n_k, shapes.v_cols);
}

template <typename Scalar, bool kBias>
AttentionGradientViews<Scalar> gradient_views(const char* /*where*/, AttentionGradients<Scalar, kBias>& to,
                                              const CallSizes& sizes) {
  resize_gradients(to, sizes);
  return {to.dq, to.dk, to.dv};
}

template <typename Scalar>
AttentionGradientViews<Scalar> gradient_views(const char* where, const AttentionGradientViews<Scalar>& to,
                                              const CallSizes& sizes) {
  check_gradients(where, to, sizes);
  return to;
}

template <typename Lambda, typename Scalar, bool kBias>
DiffAttentionGradientViews<Scalar> gradient_views(const char* /*where*/,
                                                  MultiheadDiffAttentionGradients<Scalar, Lambda, kBias>& to,
                                                  const CallSizes& sizes) {
  resize_gradients(to, sizes);
  if constexpr (!is_scalar_lambda<Lambda>) to.dlambda.resize(sizes.n_q, sizes.heads.num_heads);
  return {to.dq, to.dk, to.dv, to.dlambda};
}

/// Lambda: whether dlambda must be a number.
template <typename Lambda, typename Scalar>
DiffAttentionGradientViews<Scalar> gradient_views(const char* where, const DiffAttentionGradientViews<Scalar>& to,
                                                  const CallSizes& sizes) {
  constexpr bool kNumber = is_scalar_lambda<Lambda>;
  check_gradients(where, to, sizes);
  check_operand(where, operand("dlambda", to.dlambda), kNumber ? 1 : sizes.n_q, kNumber ? 1 : sizes.heads.num_heads);
  return to;
}

/// Of one differential head, each map by itself; dλ apart.
template <typename Scalar, typename Lambda, bool kBias>
void set_gradients(HeadGradients<Scalar, 2>& grad, DiffAttentionGradients<Scalar, Lambda, kBias>& to,
                   const CallSizes& sizes) {
  Matrix<Scalar>* const dq[] = {&to.dq1, &to.dq2};
  Matrix<Scalar>* const dk[] = {&to.dk1, &to.dk2};
  for (Index map = 0; map < 2; ++map) {
    dq[map]->resize(sizes.n_q, sizes.d);
    dk[map]->resize(sizes.n_k, sizes.d);
    grad.of_q[map] = writable_view_of(*dq[map]);
    grad.of_k[map] = writable_view_of(*dk[map]);
  }
  to.dv.resize(sizes.n_k, sizes.dv);
  grad.of_v = writable_view_of(to.dv);
}

/// 1 x 1 for a λ that is one number.
template <typename Scalar, typename Lambda, bool kBias>
StridedView<Scalar> resized_lambda_gradient(DiffAttentionGradients<Scalar, Lambda, kBias>& to, const CallSizes& sizes) {
  if constexpr (is_scalar_lambda<Lambda>) {
    return {&to.dlambda, 1, 1, 1, 1};
  } else {
    to.dlambda.resize(sizes.n_q);
    return writable_view_of(to.dlambda);
  }
}

/// Where the gradient of a mask's learned bias goes; no data where it is not wanted. Throws std::invalid_argument if it
/// is and the mask has none, ShapeError if it has not the shape of the table.
template <typename Scalar, typename Gradients, typename Mask>
StridedView<Scalar> bias_gradient_view(const char* where, Gradients& to, const Mask& mask) {
  constexpr bool kMatrix = requires { to.dbias.resize(1, 1); };
  static_assert(count_learned_biases<Mask>() < 2,
                "diffattn: the mask has two learned biases; only one of them can have a gradient");
  if constexpr (kMatrix) {
    static_assert(HasLearnedBias<Mask>, "diffattn: dbias is the gradient of a learned bias, and the mask has none");
    to.dbias.resize(mask.learned_bias().table_rows(), mask.learned_bias().table_cols());
    return writable_view_of(to.dbias);
  } else if constexpr (requires { to.dbias; }) {
    if (!to.dbias) return {};
    if constexpr (HasLearnedBias<Mask>) {
      check_operand(where, operand("dbias", *to.dbias), mask.learned_bias().table_rows(),
                    mask.learned_bias().table_cols());
      return *to.dbias;
    } else {
      throw_invalid({where, ": dbias is the gradient of a learned bias, and the mask has none"});
    }
  } else {
    return {};
  }
}

}  // namespace diffattn::inline v0_1::detail
