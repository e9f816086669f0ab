#pragma once

// Gradients of the attention layers, as far as they share them.
//
//   Layer::Tape tape;
//   y = layer.forward(x, mask, tape);              or (x, mask, lengths, tape) for stacked sequences
//   dx = layer.backward(dy, tape, grad);           from dy, the gradient of y
//
// forward leaves on the tape what backward needs: x, the rotated queries and keys, values and what each head attended
// to; about five times the size of x. Scores are computed again. `grad` is a layer of the same configuration whose
// parameters the gradients are added to: `Layer grad = zeros_like(layer)`. Several calls of backward on one tape add
// up. λ_init is a constant and has no gradient.
//
// A tape may be used again, for any shape; it allocates only when it grows. The parameters must not change between
// forward and backward, and what a mask's bias reads in place must live until then. dx must not overlap dy.
// Errors, before any work: std::invalid_argument for a tape that no forward has filled, or the forward of a layer of
// another configuration, and for a `grad` of another configuration; ShapeError for a dy that is not of y's shape.

#include <span>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/detail/remembered_mask.hpp"
#include "diffattn/layers/detail/sequences.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar>
struct AttentionTape {
  Matrix<Scalar> x, q, k, v;  // q and k turned
  Matrix<Scalar> attended;    // what the heads give, before the head norm
  Matrix<Scalar> lambda;      // one a token and head, in DIFF V2
  std::vector<Index> lengths;
  RememberedMask mask;
  Index num_heads = 0;  // of the layer that filled it
  Index num_kv_heads = 0;
  bool filled = false;
};

/// The public functions above, for a Layer that has config(), kName, same_shape(its own config, another),
/// forward_sequences(y, x, mask, lengths, tape or null, workspace, executor) and
/// differentiate(dx, dy, tape, grad, workspace, executor).
template <typename Layer, typename Scalar>
class TrainableAttention {
 public:
  struct Tape : AttentionTape<Scalar> {};

  /// y (n x embed_dim) for x (n x embed_dim), one sequence; fills the tape.
  template <AttentionMask Mask>
  Matrix<Scalar> forward(const Matrix<Scalar>& x, const Mask& mask, Tape& tape) const {
    const Index whole[] = {x.rows()};
    return forward(x, mask, whole, tape);
  }

  /// Several sequences stacked in the rows of x: `lengths` says how many rows each has.
  template <AttentionMask Mask>
  Matrix<Scalar> forward(const Matrix<Scalar>& x, const Mask& mask, std::span<const Index> lengths, Tape& tape) const {
    Workspace workspace;
    Matrix<Scalar> y(x.rows(), layer().config().embed_dim);
    forward_into(y, x, mask, lengths, tape, workspace);
    return y;
  }

  /// The same into a matrix of yours, with scratch from `workspace` and work spread over `executor`.
  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask, Tape& tape,
                    Workspace& workspace, E&& executor = {}) const {
    const Index whole[] = {x.rows()};
    forward_into(y, x, mask, whole, tape, workspace, executor);
  }

  template <typename Y, typename X, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                    std::span<const Index> lengths, Tape& tape, Workspace& workspace, E&& executor = {}) const {
    layer().forward_sequences(y, x, mask, lengths, &tape, workspace, executor);
    tape.filled = true;
  }

  /// dx; the gradients of the parameters are added to those of `grad`.
  Matrix<Scalar> backward(const Matrix<Scalar>& dy, const Tape& tape, Layer& grad) const {
    Workspace workspace;
    Matrix<Scalar> dx(tape.x.rows(), tape.x.cols());
    backward_into(dx, dy, tape, grad, workspace);
    return dx;
  }

  template <typename DX, typename DY, Executor E = Serial>
  void backward_into(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape, Layer& grad,
                     Workspace& workspace, E&& executor = {}) const {
    constexpr const char* where = Layer::kName;
    if (!tape.filled) throw_invalid({where, ": backward needs a tape that forward(x, mask, tape) has filled"});
    const auto& config = layer().config();
    const auto& other = grad.config();
    if (tape.x.cols() != config.embed_dim || tape.q.cols() != layer().q_proj.weight.rows() ||
        tape.num_heads != config.num_heads || tape.num_kv_heads != config.num_kv_heads) {
      throw_invalid({where, ": the tape was filled by a layer of another configuration"});
    }
    if (other.embed_dim != config.embed_dim || other.num_heads != config.num_heads ||
        other.num_kv_heads != config.num_kv_heads || other.bias != config.bias || !Layer::same_shape(config, other)) {
      throw_invalid({where, ": grad must be a layer of the same configuration"});
    }
    check_shape(where, "dy", dy, tape.x.rows(), config.embed_dim);
    check_shape(where, "dx", dx, tape.x.rows(), tape.x.cols());
    layer().differentiate(dx, dy, tape, grad, workspace, executor);
  }

 protected:
  /// Notes what backward needs to know of a call of forward; what forward computes it writes on the tape itself.
  template <typename X, typename Mask>
  void begin(Tape* tape, const Eigen::MatrixBase<X>& x, const Mask& mask, std::span<const Index> lengths) const {
    if (tape == nullptr) return;
    tape->filled = false;  // until forward has come to its end
    tape->x = x;
    tape->lengths.assign(lengths.begin(), lengths.end());
    tape->mask.remember(mask);
    tape->num_heads = layer().config().num_heads;
    tape->num_kv_heads = layer().config().num_kv_heads;
  }

  /// A matrix of n x cols on the tape or, without one, in the workspace.
  static MatrixMap<Scalar> part(Tape* tape, Matrix<Scalar> AttentionTape<Scalar>::*member, Index n, Index cols,
                                Workspace& workspace) {
    if (tape == nullptr) return MatrixMap<Scalar>(workspace.take<Scalar>(n * cols), n, cols);
    (tape->*member).resize(n, cols);
    return MatrixMap<Scalar>((tape->*member).data(), n, cols);
  }

 private:
  const Layer& layer() const { return static_cast<const Layer&>(*this); }
};

}  // namespace diffattn::inline v0_1::detail
