#pragma once

// The SwiGLU feed-forward layer (Shazeer, arXiv 2002.05202), eq. (5) of the paper and Llama's:
//
//   y = (silu(x W_gateᵀ) ∘ x W_upᵀ) W_downᵀ,   silu(a) = a / (1 + exp(−a))
//
// Parameters (visit_parameters): gate_proj, up_proj, down_proj, none with a bias.
// Shapes   x, y (n x embed_dim), n >= 0.
// Errors   std::invalid_argument for a width below 1, ShapeError for an x or y that does not fit; before any work.
// Memory   2 · n · hidden_dim values of the workspace, beside what linear.hpp takes.

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/parameters.hpp"

namespace diffattn::inline v0_1 {

/// Weight: the matrix type of the weights, as linear.hpp says.
template <typename Scalar, typename Weight = Matrix<Scalar>>
class FeedForward {
 public:
  FeedForward(Index embed_dim, Index hidden_dim)
      : gate_proj(detail::checked_positive(kName, "embed_dim", embed_dim),
                  detail::checked_positive(kName, "hidden_dim", hidden_dim)),
        up_proj(embed_dim, hidden_dim),
        down_proj(hidden_dim, embed_dim) {}

  /// The default of nn.Linear.
  void initialize(Initializer& random) {
    for (Linear<Scalar, Weight>* projection : {&gate_proj, &up_proj, &down_proj}) projection->initialize(random);
  }

  Matrix<Scalar> forward(const Matrix<Scalar>& x) const {
    Workspace workspace;
    Matrix<Scalar> y(x.rows(), down_proj.weight.rows());
    forward_into(y, x, workspace);
    return y;
  }

  /// y may be x.
  template <typename Y, typename X, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Workspace& workspace,
                    E&& executor = {}) const {
    const Index n = x.rows(), hidden_dim = gate_proj.weight.rows();
    detail::check_shape(kName, "x", x, n, gate_proj.weight.cols());
    detail::check_shape(kName, "y", y, n, gate_proj.weight.cols());
    const auto frame = workspace.frame();
    detail::MatrixMap<Scalar> gate(workspace.take<Scalar>(n * hidden_dim), n, hidden_dim);
    detail::MatrixMap<Scalar> up(workspace.take<Scalar>(n * hidden_dim), n, hidden_dim);
    gate_proj.forward_into(gate, x, workspace, executor);
    up_proj.forward_into(up, x, workspace, executor);
    detail::for_each_row_block(n, executor, [&](Index row, Index count) {
      auto g = detail::rows_of(gate, row, count);
      g.array() *= detail::rows_of(up, row, count).array() / (Scalar(1) + (-g.array()).exp());
    });
    down_proj.forward_into(y, gate, workspace, executor);
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    detail::visit_part("gate_proj", self.gate_proj, visitor);
    detail::visit_part("up_proj", self.up_proj, visitor);
    detail::visit_part("down_proj", self.down_proj, visitor);
  }

 private:
  static constexpr const char* kName = "FeedForward";

 public:
  Linear<Scalar, Weight> gate_proj;  ///< hidden_dim x embed_dim
  Linear<Scalar, Weight> up_proj;    ///< hidden_dim x embed_dim
  Linear<Scalar, Weight> down_proj;  ///< embed_dim x hidden_dim
};

}  // namespace diffattn::inline v0_1
