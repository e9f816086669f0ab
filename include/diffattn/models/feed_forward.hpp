#pragma once

// The feed-forward layer of a transformer: with SwiGLU, eq. (5) of the paper and Llama's, or with one projection and a
// GELU or ReLU (activation.hpp), which is that of encoders:
//
//   y = (silu(x W_gateᵀ) ∘ x W_upᵀ) W_downᵀ        y = f(x W_upᵀ + b_up) W_downᵀ + b_down
//
// Parameters (visit_parameters): gate_proj (SwiGLU alone), up_proj, down_proj, each with a bias if asked for.
// Shapes   x, y (n x embed_dim), n >= 0.
// Errors   std::invalid_argument for a width below 1, ShapeError for an x or y that does not fit; before any work.
// Memory   n · hidden_dim values of the workspace, with SwiGLU twice as many, beside what linear.hpp takes; three
//          times n · hidden_dim for backward.
//
// Gradients: forward_into(y, x, tape, …) keeps x, the gate and up in a Tape, which is used again without allocation for
// as many tokens; backward_into(dx, dy, tape, grad, …) adds to `grad`, a layer of the same shape.

#include <array>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/row_blocks.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/layers/arithmetic.hpp"
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/models/activation.hpp"

namespace diffattn::inline v0_1 {

/// Weight: the matrix type of the weights, as linear.hpp says.
template <typename Scalar, typename Weight = Matrix<Scalar>>
class FeedForward {
 public:
  /// Weights are not set: initialize() or load them. Throws std::invalid_argument for a width below 1, and for an
  /// arithmetic that the weights are not for.
  FeedForward(Index embed_dim, Index hidden_dim, Activation activation = Activation::swiglu, bool bias = false,
              Arithmetic arithmetic = Arithmetic::scalar)
      : up_proj(detail::checked_positive(kName, "embed_dim", embed_dim),
                detail::checked_positive(kName, "hidden_dim", hidden_dim), bias, arithmetic),
        down_proj(hidden_dim, embed_dim, bias, arithmetic),
        activation_(activation) {
    if (is_gated()) gate_proj = Linear<Scalar, Weight>(embed_dim, hidden_dim, bias, arithmetic);
  }

  /// What stands between the two products.
  Activation activation() const { return activation_; }

  /// The default of nn.Linear.
  void initialize(Initializer& random) {
    if (is_gated()) gate_proj.initialize(random);
    up_proj.initialize(random);
    down_proj.initialize(random);
  }

  /// y (n x embed_dim) for x (n x embed_dim).
  Matrix<Scalar> forward(const Matrix<Scalar>& x) const {
    Workspace workspace;
    Matrix<Scalar> y(x.rows(), down_proj.weight.rows());
    forward_into(y, x, workspace);
    return y;
  }

  /// forward(x) into y, which may be x.
  template <typename Y, typename X, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Workspace& workspace,
                    E&& executor = {}) const {
    const Index n = x.rows(), hidden_dim = up_proj.weight.rows();
    check_tokens(y, x);
    const auto frame = workspace.frame();
    const auto scratch = [&] { return MatrixMap<Scalar>(workspace.take<Scalar>(n * hidden_dim), n, hidden_dim); };
    auto inner = scratch();
    if (is_gated()) {
      auto up = scratch();
      project(inner, up, x, workspace, executor);
      detail::for_each_row_block(n, executor, [&](Index row, Index count) {
        auto gate = detail::rows_of(inner, row, count);
        gate.array() *= detail::rows_of(up, row, count).array() / (Scalar(1) + (-gate.array()).exp());
      });
    } else {
      up_proj.forward_into(inner, x, workspace, executor);
      activate(inner, inner.data(), executor);
    }
    down_proj.forward_into(y, inner, workspace, executor);
  }

  /// What backward needs of a forward pass.
  struct Tape {
    Matrix<Scalar> x;         ///< n x embed_dim
    Matrix<Scalar> gate, up;  ///< n x hidden_dim, before silu; of what has no gate, up is before f
    bool filled = false;
  };

  /// The same y, bit for bit, and what backward needs into `tape`.
  template <typename Y, typename X, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Tape& tape, Workspace& workspace,
                    E&& executor = {}) const {
    const Index n = x.rows(), hidden_dim = up_proj.weight.rows();
    check_tokens(y, x);
    tape.filled = false;  // until forward has come to its end
    detail::keep(tape.x, x);
    tape.gate.resize(n, gate_proj.weight.rows());
    tape.up.resize(n, hidden_dim);
    const auto frame = workspace.frame();
    MatrixMap<Scalar> activated(workspace.take<Scalar>(n * hidden_dim), n, hidden_dim);
    if (is_gated()) {
      project(map_of(tape.gate), map_of(tape.up), tape.x, workspace, executor);
    } else {
      up_proj.forward_into(tape.up, tape.x, workspace, executor);
    }
    activate(activated, tape, executor);
    down_proj.forward_into(y, activated, workspace, executor);
    tape.filled = true;
  }
  /// y, and what backward needs into `tape`.
  Matrix<Scalar> forward(const Matrix<Scalar>& x, Tape& tape) const {
    Workspace workspace;
    Matrix<Scalar> y(x.rows(), x.cols());
    forward_into(y, x, tape, workspace);
    return y;
  }

  /// dx from dy, the gradient of y, and the tape of the forward pass; parameters of `grad` grow by their gradients. dx
  /// may be dy.
  template <typename DX, typename DY, Executor E = Serial>
  void backward_into(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape,
                     FeedForward& grad, Workspace& workspace, E&& executor = {}) const {
    const Index n = dy.rows(), hidden_dim = up_proj.weight.rows();
    check_backward(dx, dy, tape, grad);
    const auto frame = workspace.frame();
    const auto scratch = [&] { return MatrixMap<Scalar>(workspace.take<Scalar>(n * hidden_dim), n, hidden_dim); };
    auto activated = scratch(), dup = scratch();
    activate(activated, tape, executor);
    down_proj.backward_into(dup, dy, activated, grad.down_proj, workspace, executor);
    if (!is_gated()) {
      detail::for_each_row_block(n, executor, [&](Index row, Index count) {
        const Index at = row * hidden_dim;
        detail::multiply_by_slope(activation_, dup.data() + at, tape.up.data() + at, count * hidden_dim);
      });
      return up_proj.backward_into(dx, dup, tape.x, grad.up_proj, workspace, executor);
    }
    auto dgate = scratch();
    differentiate_swiglu(dgate, dup, activated, tape, executor);
    using Gradient = detail::LinearGradient<Scalar, Weight>;
    const std::array gradients{Gradient{gate_proj, dgate, grad.gate_proj}, Gradient{up_proj, dup, grad.up_proj}};
    detail::linear_backward_all(dx, gradients, tape.x, workspace, executor);
  }
  /// backward_into, with a dx and scratch of its own.
  Matrix<Scalar> backward(const Matrix<Scalar>& dy, const Tape& tape, FeedForward& grad) const {
    Workspace workspace;
    Matrix<Scalar> dx(dy.rows(), up_proj.weight.cols());
    backward_into(dx, dy, tape, grad, workspace);
    return dx;
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    if (self.is_gated()) visit_part("gate_proj", self.gate_proj, visitor);
    visit_part("up_proj", self.up_proj, visitor);
    visit_part("down_proj", self.down_proj, visitor);
  }

 private:
  static constexpr const char* kName = "FeedForward";

  bool is_gated() const { return activation_ == Activation::swiglu; }

  template <typename Y, typename X>
  void check_tokens(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x) const {
    detail::check_shape(kName, "x", x, x.rows(), up_proj.weight.cols());
    detail::check_shape(kName, "y", y, x.rows(), up_proj.weight.cols());
  }

  template <typename DX, typename DY>
  void check_backward(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape,
                      const FeedForward& grad) const {
    const Index n = dy.rows(), embed_dim = up_proj.weight.cols();
    if (!tape.filled) detail::throw_invalid({kName, ": backward needs a tape that forward(x, tape) has filled"});
    detail::check_shape(kName, "dy", dy, n, embed_dim);
    detail::check_shape(kName, "dx", dx, n, embed_dim);
    detail::check_shape(kName, "the tape's x", tape.x, n, embed_dim);
    detail::check_shape(kName, "the tape's gate", tape.gate, n, gate_proj.weight.rows());
    detail::check_shape(kName, "the tape's up", tape.up, n, up_proj.weight.rows());
    if (grad.activation_ != activation_) detail::throw_invalid({kName, ": grad must have the same activation"});
    gate_proj.check_gradient(grad.gate_proj);
    up_proj.check_gradient(grad.up_proj);
    down_proj.check_gradient(grad.down_proj);
  }

  static MatrixMap<Scalar> map_of(Matrix<Scalar>& m) { return {m.data(), m.rows(), m.cols()}; }

  template <typename X, Executor E>
  void project(const MatrixMap<Scalar>& gate, const MatrixMap<Scalar>& up, const Eigen::MatrixBase<X>& x,
               Workspace& workspace, E& executor) const {
    using Output = detail::LinearOutput<Scalar, Weight>;
    const std::array outputs{Output{gate_proj, gate}, Output{up_proj, up}};
    detail::linear_forward_all(outputs, x, workspace, executor);
  }

  /// to = f(from), where there is no gate; to may be from.
  template <Executor E>
  void activate(MatrixMap<Scalar>& to, const Scalar* from, E& executor) const {
    detail::for_each_row_block(to.rows(), executor, [&](Index row, Index count) {
      const Index at = row * to.cols();
      detail::activate_values(activation_, to.data() + at, from + at, count * to.cols());
    });
  }

  /// What the tape's numbers come to: silu(gate) ∘ up in the order of operations of forward_into without a tape, or
  /// f(up).
  template <Executor E>
  void activate(MatrixMap<Scalar>& activated, const Tape& tape, E& executor) const {
    if (!is_gated()) return activate(activated, tape.up.data(), executor);
    detail::for_each_row_block(activated.rows(), executor, [&](Index row, Index count) {
      const Index at = row * activated.cols(), size = count * activated.cols();
      const Eigen::Map<const Eigen::Array<Scalar, Eigen::Dynamic, 1>> gate(tape.gate.data() + at, size),
          up(tape.up.data() + at, size);
      Eigen::Map<Eigen::Array<Scalar, Eigen::Dynamic, 1>>(activated.data() + at, size) =
          gate * (up / (Scalar(1) + (-gate).exp()));
    });
  }

  /// dup, the gradient of silu(gate) ∘ up, becomes that of up, and dgate that of gate. `scratch` is of their size.
  template <Executor E>
  static void differentiate_swiglu(MatrixMap<Scalar>& dgate, MatrixMap<Scalar>& dup, MatrixMap<Scalar>& scratch,
                                   const Tape& tape, E& executor) {
    detail::for_each_row_block(dup.rows(), executor, [&](Index row, Index count) {
      const auto rows = [&](const Matrix<Scalar>& m) { return detail::rows_of(m, row, count).array(); };
      auto to_gate = detail::rows_of(dgate, row, count), to_up = detail::rows_of(dup, row, count);
      auto sigmoid = detail::rows_of(scratch, row, count);
      sigmoid = Scalar(1) / (Scalar(1) + (-rows(tape.gate)).exp());
      to_gate = to_up.array() * rows(tape.up) * sigmoid.array() *
                (Scalar(1) + rows(tape.gate) * (Scalar(1) - sigmoid.array()));
      to_up.array() *= rows(tape.gate) * sigmoid.array();
    });
  }

 public:
  Linear<Scalar, Weight> gate_proj{0, 0};  ///< hidden_dim x embed_dim, of SwiGLU; else empty
  Linear<Scalar, Weight> up_proj;          ///< hidden_dim x embed_dim
  Linear<Scalar, Weight> down_proj;        ///< embed_dim x hidden_dim

 private:
  Activation activation_;
};

}  // namespace diffattn::inline v0_1
