#pragma once

// Linear: y = x Wᵀ + b, with W (out x in) and b (out) as PyTorch's nn.Linear stores them.
//
// The weight is a Matrix<Scalar>, which can be trained; or a Matrix<Eigen::bfloat16> or Matrix<Eigen::half>, or a
// FrozenMatrix, which is read-only and can be a mapped file. Whatever it holds, arithmetic is done in Scalar: 16-bit
// weights are widened as they are read, so that decoding, which is bound by reading them, takes half the time. With
// Arithmetic::bfloat16 and weights of bfloat16, x is rounded to it once, and CPUs that multiply it take half the time
// for many rows, too (arithmetic.hpp); a FrozenMatrix can keep W as they read it: linear.weight.pack().
//
// Shapes   x (n x in) → y (n x out), n >= 0. Any strides; contiguous rows are fastest.
// Errors   ShapeError before any work; std::invalid_argument for an arithmetic that the weight is not for.
// Memory   from the workspace: a packed copy of x and, for each thread, 1 MB at most for a block of y and of W; nothing
//          for up to 4 rows, which read W once where it is, as up to 64 do.

#include <cmath>
#include <span>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/simd_pairs.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/layers/arithmetic.hpp"
#include "diffattn/layers/frozen_matrix.hpp"
#include "diffattn/layers/initialization.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/product/bfloat16_product.hpp"
#include "diffattn/product/matmul.hpp"
#include "diffattn/product/product_tasks.hpp"

namespace diffattn::inline v0_1 {

namespace detail {
/// Calls f with a view of a weight's values, in the type that they have.
template <typename Weight, typename F>
void visit_weight(const Weight& weight, F&& f) {
  if constexpr (std::is_same_v<Weight, FrozenMatrix>) {
    weight.visit(f);
  } else {
    f(view_of(weight));
  }
}

/// The packed copy that a weight keeps, or null.
template <typename Weight>
const simd::Pair* packed_of(const Weight& weight) {
  if constexpr (std::is_same_v<Weight, FrozenMatrix>) return weight.packed();
  return nullptr;
}
}  // namespace detail

/// y (n x out) = x (n x in) · weight (out x in)ᵀ, shapes already checked: for a weight without a Linear of its own,
/// such as an embedding that is a head too. Throws std::invalid_argument for an arithmetic that the weight is not for.
template <typename Scalar, typename Y, typename X, typename Weight, Executor E>
void linear_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Weight& weight,
                 Workspace& workspace, E& executor, const Scalar* bias = nullptr,
                 Arithmetic arithmetic = Arithmetic::scalar) {
  const detail::Readable<X> x_read(x.derived());
  const auto y_view = detail::writable_view_of(y);
  const auto x_view = detail::view_of(x_read);
  detail::visit_weight(weight, [&]<typename Stored>(const StridedView<const Stored>& view) {
    detail::check_arithmetic<Scalar, Stored>("Linear", arithmetic);
    if constexpr (std::is_same_v<Scalar, float>) {  // by itself: clang looks at what does not depend on Stored
      if constexpr (detail::kMultipliesBfloat16<Scalar, Stored>) {
        if (arithmetic == Arithmetic::bfloat16) {
          const detail::Bfloat16Output output{y_view, view, bias, detail::packed_of(weight)};
          return detail::multiply_bfloat16(std::span<const detail::Bfloat16Output>(&output, 1), x_view, workspace,
                                           executor);
        }
      }
    }
    if constexpr (sizeof(Stored) <= sizeof(Scalar)) {
      detail::matmul_transposed<Scalar>(y_view, x_view, view, bias, workspace, executor);
    } else {
      detail::throw_invalid({"Linear: the weight is of a wider type than the arithmetic; convert it once"});
    }
  });
}

/// The gradients of linear_into: dx = dy · weight, or dx += …, and dweight += dyᵀ · x. Shapes already checked.
template <typename Scalar, typename DX, typename DY, typename X, typename Weight, Executor E>
void linear_backward_into(const Eigen::MatrixBase<DX>& dx, Weight& dweight, const Eigen::MatrixBase<DY>& dy,
                          const Eigen::MatrixBase<X>& x, const Weight& weight, Store store, Workspace& workspace,
                          E& executor) {
  const detail::Readable<DY> dy_read(dy.derived());
  const detail::Readable<X> x_read(x.derived());
  const auto dy_view = detail::view_of(dy_read);
  const detail::Product<Scalar> products[] = {
      {detail::writable_view_of(dx), dy_view, detail::view_of(weight), nullptr, store},
      {detail::writable_view_of(dweight), dy_view.transposed(), detail::view_of(x_read), nullptr, Store::add}};
  detail::multiply_all(std::span<const detail::Product<Scalar>>(products), workspace, executor);
}

/// Weight is the matrix type of the weight. A FrozenMatrix has no initial values: it is assigned.
template <typename Scalar, typename Weight = Matrix<Scalar>>
class Linear {
 public:
  /// All 0. Throws std::invalid_argument for sizes that are negative or that no memory holds, and for an arithmetic
  /// that a Matrix of its type is not for; std::bad_alloc.
  Linear(Index in, Index out, bool with_bias = false, Arithmetic what = Arithmetic::scalar)
      : weight(checked(out, in), in), bias(with_bias ? out : 0), arithmetic(what) {
    if constexpr (!kFrozen) {
      detail::check_arithmetic<Scalar, typename Weight::Scalar>("Linear", arithmetic);
      weight.setZero();
    }
    bias.setZero();
  }

  /// The default of nn.Linear: weight and bias from U(-1/sqrt(in), 1/sqrt(in)).
  void initialize(Initializer& random) {
    const double bound = 1 / std::sqrt(static_cast<double>(weight.cols()));
    if constexpr (!kFrozen) random.uniform(weight, bound);
    random.uniform(bias, bound);
  }

  /// y (n x out) = x Wᵀ + b for x (n x in), any strides. Throws ShapeError before any work.
  template <typename Y, typename X, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Workspace& workspace,
                    E&& executor = {}) const {
    detail::check_shape("Linear", "x", x, x.rows(), weight.cols());
    detail::check_shape("Linear", "y", y, x.rows(), weight.rows());
    linear_into<Scalar>(y, x, weight, workspace, executor, bias_data(), arithmetic);
  }

  /// What backward(dy, tape, grad) needs of forward(x, tape).
  struct Tape {
    Matrix<Scalar> x;
    bool filled = false;
  };

  /// y (n x out) = x Wᵀ + b for x (n x in). Throws ShapeError.
  Matrix<Scalar> forward(const Matrix<Scalar>& x) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> y(x.rows(), weight.rows());
    forward_into(y, x, workspace);
    return y;
  }
  /// y = x Wᵀ + b; fills the tape.
  Matrix<Scalar> forward(const Matrix<Scalar>& x, Tape& tape) const {
    const Matrix<Scalar> y = forward(x);
    tape.x = x;
    tape.filled = true;
    return y;
  }

  /// dx from dy, the gradient of y; the gradients of weight and bias are added to those of `grad`. Throws
  /// std::invalid_argument for a tape that no forward has filled, ShapeError for a dy, tape or grad of another shape.
  Matrix<Scalar> backward(const Matrix<Scalar>& dy, const Tape& tape, Linear& grad) const {
    if (!tape.filled) detail::throw_invalid({"Linear: backward needs a tape that forward(x, tape) has filled"});
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> dx(tape.x.rows(), tape.x.cols());
    backward_into(dx, dy, tape.x, grad, workspace);
    return dx;
  }

  /// From dy, the gradient of y, and the x that forward was given: dx = dy W, or dx += dy W, and into `grad`, a layer
  /// of the same shape, weight += dyᵀ x and bias += the sum of dy's rows. dx must not overlap dy or x.
  template <typename DX, typename DY, typename X, Executor E = Serial>
  void backward_into(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Eigen::MatrixBase<X>& x,
                     Linear& grad, Workspace& workspace, E&& executor = {}, Store store = Store::overwrite) const {
    const Index n = x.rows();
    detail::check_shape("Linear", "x", x, n, weight.cols());
    detail::check_shape("Linear", "dy", dy, n, weight.rows());
    detail::check_shape("Linear", "dx", dx, n, weight.cols());
    check_gradient(grad);
    linear_backward_into<Scalar>(dx, grad.weight, dy, x, weight, store, workspace, executor);
    add_bias_gradient(grad, dy);
  }

  /// grad.bias += the sum of dy's rows, if there is a bias.
  template <typename DY>
  void add_bias_gradient(Linear& grad, const Eigen::MatrixBase<DY>& dy) const {
    for (Index i = 0; bias.size() != 0 && i < dy.rows(); ++i) grad.bias += dy.row(i).transpose();
  }

  /// Throws ShapeError unless `grad` has the shape of this layer.
  void check_gradient(const Linear& grad) const {
    detail::check_shape("Linear", "the gradient's weight", grad.weight, weight.rows(), weight.cols());
    detail::check_shape("Linear", "the gradient's bias", grad.bias, bias.rows(), 1);
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visitor("weight", self.weight);
    if (self.bias.size() != 0) visitor("bias", self.bias);
  }

  static constexpr bool kFrozen = std::is_same_v<Weight, FrozenMatrix>;

  /// The bias, or null if there is none.
  const Scalar* bias_data() const { return bias.size() == 0 ? nullptr : bias.data(); }

 private:
  /// out, once it is known that out x in values can be.
  static Index checked(Index out, Index in) {
    detail::checked_product("Linear", "the weight", {out, in});
    return out;
  }

 public:
  Weight weight;        ///< out x in
  Vector<Scalar> bias;  ///< out, or empty
  Arithmetic arithmetic = Arithmetic::scalar;
};

}  // namespace diffattn::inline v0_1
