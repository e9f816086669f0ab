#pragma once

// The SwiGLU feed-forward layer (Shazeer, arXiv 2002.05202), eq. (5) of the paper and Llama's:
//
//   y = (silu(x W_gateᵀ) ∘ x W_upᵀ) W_downᵀ,   silu(a) = a / (1 + exp(−a))
//
// Parameters (visit_parameters): gate_proj, up_proj, down_proj, none with a bias.
// Shapes   x, y (n x embed_dim), n >= 0.
// Errors   std::invalid_argument for a width below 1, ShapeError for an x or y that does not fit; before any work.
// Memory   2 · n · hidden_dim values of the workspace, beside what linear.hpp takes; three times that for backward.
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
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"

namespace diffattn::inline v0_1 {

/// Weight: the matrix type of the weights, as linear.hpp says.
template <typename Scalar, typename Weight = Matrix<Scalar>>
class FeedForward {
 public:
  /// Weights are not set: initialize() or load them. Throws std::invalid_argument for a width below 1.
  FeedForward(Index embed_dim, Index hidden_dim)
      : gate_proj(detail::checked_positive(kName, "embed_dim", embed_dim),
                  detail::checked_positive(kName, "hidden_dim", hidden_dim)),
        up_proj(embed_dim, hidden_dim),
        down_proj(hidden_dim, embed_dim) {}

  /// The default of nn.Linear.
  void initialize(Initializer& random) {
    for (Linear<Scalar, Weight>* projection : {&gate_proj, &up_proj, &down_proj}) projection->initialize(random);
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
    const Index n = x.rows(), hidden_dim = gate_proj.weight.rows();
    detail::check_shape(kName, "x", x, n, gate_proj.weight.cols());
    detail::check_shape(kName, "y", y, n, gate_proj.weight.cols());
    const auto frame = workspace.frame();
    MatrixMap<Scalar> gate(workspace.take<Scalar>(n * hidden_dim), n, hidden_dim);
    MatrixMap<Scalar> up(workspace.take<Scalar>(n * hidden_dim), n, hidden_dim);
    project(gate, up, x, workspace, executor);
    detail::for_each_row_block(n, executor, [&](Index row, Index count) {
      auto g = detail::rows_of(gate, row, count);
      g.array() *= detail::rows_of(up, row, count).array() / (Scalar(1) + (-g.array()).exp());
    });
    down_proj.forward_into(y, gate, workspace, executor);
  }

  /// What backward needs of a forward pass.
  struct Tape {
    Matrix<Scalar> x;         ///< n x embed_dim
    Matrix<Scalar> gate, up;  ///< n x hidden_dim, before silu
    bool filled = false;
  };

  /// The same y, bit for bit, and what backward needs into `tape`.
  template <typename Y, typename X, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Tape& tape, Workspace& workspace,
                    E&& executor = {}) const {
    const Index n = x.rows(), hidden_dim = gate_proj.weight.rows();
    detail::check_shape(kName, "x", x, n, gate_proj.weight.cols());
    detail::check_shape(kName, "y", y, n, gate_proj.weight.cols());
    tape.filled = false;  // until forward has come to its end
    detail::keep(tape.x, x);
    tape.gate.resize(n, hidden_dim);
    tape.up.resize(n, hidden_dim);
    const auto frame = workspace.frame();
    MatrixMap<Scalar> activated(workspace.take<Scalar>(n * hidden_dim), n, hidden_dim);
    project(map_of(tape.gate), map_of(tape.up), tape.x, workspace, executor);
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
    const Index n = dy.rows(), hidden_dim = gate_proj.weight.rows();
    if (!tape.filled) detail::throw_invalid({kName, ": backward needs a tape that forward(x, tape) has filled"});
    detail::check_shape(kName, "dy", dy, n, gate_proj.weight.cols());
    detail::check_shape(kName, "dx", dx, n, gate_proj.weight.cols());
    detail::check_shape(kName, "the tape's x", tape.x, n, gate_proj.weight.cols());
    detail::check_shape(kName, "the tape's gate", tape.gate, n, hidden_dim);
    check_gradient(grad);
    const auto frame = workspace.frame();
    const auto scratch = [&] { return MatrixMap<Scalar>(workspace.take<Scalar>(n * hidden_dim), n, hidden_dim); };
    auto activated = scratch(), dgate = scratch(), dup = scratch();
    activate(activated, tape, executor);
    down_proj.backward_into(dup, dy, activated, grad.down_proj, workspace, executor);
    detail::for_each_row_block(n, executor, [&](Index row, Index count) {
      const auto rows = [&](const Matrix<Scalar>& m) {
        return Eigen::Map<const Matrix<Scalar>>(m.data() + row * m.cols(), count, m.cols()).array();
      };
      auto to_gate = detail::rows_of(dgate, row, count), to_up = detail::rows_of(dup, row, count);
      auto sigmoid = detail::rows_of(activated, row, count);
      sigmoid = Scalar(1) / (Scalar(1) + (-rows(tape.gate)).exp());
      to_gate = to_up.array() * rows(tape.up) * sigmoid.array() *
                (Scalar(1) + rows(tape.gate) * (Scalar(1) - sigmoid.array()));
      to_up.array() *= rows(tape.gate) * sigmoid.array();
    });
    using Gradient = detail::LinearGradient<Scalar, Weight>;
    const std::array gradients{Gradient{gate_proj, dgate, grad.gate_proj}, Gradient{up_proj, dup, grad.up_proj}};
    detail::linear_backward_all(dx, gradients, tape.x, workspace, executor);
  }
  /// backward_into, with a dx and scratch of its own.
  Matrix<Scalar> backward(const Matrix<Scalar>& dy, const Tape& tape, FeedForward& grad) const {
    Workspace workspace;
    Matrix<Scalar> dx(dy.rows(), gate_proj.weight.cols());
    backward_into(dx, dy, tape, grad, workspace);
    return dx;
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("gate_proj", self.gate_proj, visitor);
    visit_part("up_proj", self.up_proj, visitor);
    visit_part("down_proj", self.down_proj, visitor);
  }

 private:
  static constexpr const char* kName = "FeedForward";

  void check_gradient(const FeedForward& grad) const {
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

  /// silu(gate) ∘ up, in the order of operations of forward_into without a tape.
  template <Executor E>
  void activate(MatrixMap<Scalar>& activated, const Tape& tape, E& executor) const {
    detail::for_each_row_block(activated.rows(), executor, [&](Index row, Index count) {
      const Index at = row * activated.cols(), size = count * activated.cols();
      const Eigen::Map<const Eigen::Array<Scalar, Eigen::Dynamic, 1>> gate(tape.gate.data() + at, size),
          up(tape.up.data() + at, size);
      Eigen::Map<Eigen::Array<Scalar, Eigen::Dynamic, 1>>(activated.data() + at, size) =
          gate * (up / (Scalar(1) + (-gate).exp()));
    });
  }

 public:
  Linear<Scalar, Weight> gate_proj;  ///< hidden_dim x embed_dim
  Linear<Scalar, Weight> up_proj;    ///< hidden_dim x embed_dim
  Linear<Scalar, Weight> down_proj;  ///< embed_dim x hidden_dim
};

}  // namespace diffattn::inline v0_1
