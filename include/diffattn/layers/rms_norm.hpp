#pragma once

// RmsNorm: y = x / sqrt(mean(x²) + eps) · w for every row, as the official rms_norm.py has it: eps inside the root, no
// mean subtracted, w learned or absent.

#include <algorithm>
#include <cmath>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/simd.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/layers/detail/packed_rows.hpp"
#include "diffattn/layers/parameters.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar>
class RmsNorm {
 public:
  /// Weight 1. Throws std::invalid_argument for a width that is negative or that no memory holds.
  explicit RmsNorm(Index width, double norm_eps = 1e-5, bool with_weight = true)
      : eps(norm_eps), width_(detail::checked_product("RmsNorm", "width", {width})) {
    if (with_weight) weight.setOnes(width);
  }

  /// How many columns it norms.
  Index width() const { return width_; }

  /// Normalises one row of `width()` contiguous values in place and multiplies it by `factor`.
  void apply(Scalar* row, Scalar factor = Scalar(1)) const {
    constexpr Index kLanes = simd::kLanes<Scalar>;
    auto packet_sum = simd::broadcast(Scalar(0));
    Index c = 0;
    for (; c + kLanes <= width_; c += kLanes) {
      const auto x = simd::loadu(row + c);
      packet_sum = simd::fma(x, x, packet_sum);
    }
    Scalar sum = simd::reduce_add(packet_sum);
    for (; c < width_; ++c) sum += row[c] * row[c];

    const Scalar scale = factor / std::sqrt(sum / static_cast<Scalar>(width_) + static_cast<Scalar>(eps));
    if (weight.size() == 0) {
      for (Index i = 0; i < width_; ++i) row[i] *= scale;
    } else {
      const Scalar* const w = weight.data();
      for (Index i = 0; i < width_; ++i) row[i] *= scale * w[i];
    }
  }

  /// y = norm(x) · factor for `rows` rows, one after another in memory; y may be x.
  template <Executor E>
  void forward_rows(Scalar* y, const Scalar* x, Index rows, E& executor, Scalar factor = Scalar(1)) const {
    executor.run((rows + kTaskRows - 1) / kTaskRows, [&](Index task, Index /*worker*/) {
      for (Index row = task * kTaskRows; row < std::min(rows, (task + 1) * kTaskRows); ++row) {
        if (y != x) std::copy_n(x + row * width_, width_, y + row * width_);
        apply(y + row * width_, factor);
      }
    });
  }

  /// sum += x, y = norm(sum), for `rows` rows, one after another in memory: a residual connection and the norm behind
  /// it. y may be sum.
  template <Executor E>
  void add_forward_rows(Scalar* y, Scalar* sum, const Scalar* x, Index rows, E& executor) const {
    executor.run((rows + kTaskRows - 1) / kTaskRows, [&](Index task, Index /*worker*/) {
      for (Index row = task * kTaskRows; row < std::min(rows, (task + 1) * kTaskRows); ++row) {
        const Index at = row * width_;
        for (Index c = at; c < at + width_; ++c) y[c] = sum[c] += x[c];
        apply(y + at);
      }
    });
  }

  /// The gradient of apply on one row: from dy and the x that it was given, dx, which may be dy, and dweight += … where
  /// there is a weight.
  ///
  ///   y = c·x∘w,  c = factor / sqrt(m),  m = mean(x²) + eps
  ///   dx = c·(w∘dy − x·Σ(w∘dy∘x) / (width·m)),  dw = c·dy∘x
  void apply_backward(Scalar* dx, const Scalar* dy, const Scalar* x, Scalar* dweight, Scalar factor = Scalar(1),
                      Store store = Store::overwrite) const {
    constexpr Index kLanes = simd::kLanes<Scalar>;
    const Scalar* const w = weight.size() == 0 ? nullptr : weight.data();
    auto squares = simd::broadcast(Scalar(0)), products = squares;
    Index c = 0;
    for (; c + kLanes <= width_; c += kLanes) {
      const auto x_c = simd::loadu(x + c);
      auto dy_c = simd::loadu(dy + c);
      if (w != nullptr) dy_c = simd::mul(dy_c, simd::loadu(w + c));
      squares = simd::fma(x_c, x_c, squares);
      products = simd::fma(x_c, dy_c, products);
    }
    Scalar sum = simd::reduce_add(squares), dot = simd::reduce_add(products);
    for (; c < width_; ++c) {
      sum += x[c] * x[c];
      dot += x[c] * (w == nullptr ? dy[c] : dy[c] * w[c]);
    }
    const Scalar mean = sum / static_cast<Scalar>(width_) + static_cast<Scalar>(eps);
    const Scalar scale = factor / std::sqrt(mean), along = scale * dot / (static_cast<Scalar>(width_) * mean);
    for (Index i = 0; i < width_; ++i) {
      const Scalar dy_i = dy[i], x_i = x[i], dx_i = scale * (w == nullptr ? dy_i : w[i] * dy_i) - along * x_i;
      dx[i] = store == Store::add ? dx[i] + dx_i : dx_i;
      if (w != nullptr) dweight[i] += scale * dy_i * x_i;
    }
  }

  /// The same on `rows` rows, one after another in memory, the weight's gradient added to `grad`: the same bits for any
  /// executor.
  template <Executor E>
  void backward_rows(Scalar* dx, const Scalar* dy, const Scalar* x, Index rows, RmsNorm& grad, Scalar factor,
                     Store store, Workspace& workspace, E& executor) const {
    detail::check_shape("RmsNorm", "the gradient's weight", grad.weight, weight.rows(), 1);
    const Index blocks = (rows + kTaskRows - 1) / kTaskRows;
    const auto frame = workspace.frame();
    auto* const sums = workspace.take<Scalar>(blocks * width_);
    executor.run(blocks, [&](Index task, Index /*worker*/) {
      std::fill_n(sums + task * width_, width_, Scalar(0));
      for (Index row = task * kTaskRows; row < std::min(rows, (task + 1) * kTaskRows); ++row) {
        const Index at = row * width_;
        apply_backward(dx + at, dy + at, x + at, sums + task * width_, factor, store);
      }
    });
    for (Index block = 0; weight.size() != 0 && block < blocks; ++block) {
      grad.weight += Eigen::Map<const Vector<Scalar>>(sums + block * width_, width_);
    }
  }

  /// The same for norm(x) without a factor.
  template <Executor E>
  void backward_rows(Scalar* dx, const Scalar* dy, const Scalar* x, Index rows, RmsNorm& grad, Store store,
                     Workspace& workspace, E& executor) const {
    backward_rows(dx, dy, x, rows, grad, Scalar(1), store, workspace, executor);
  }

  /// y (n x width) = norm(x) for x (n x width), row by row. Throws ShapeError.
  template <typename X>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> y(x.rows(), width_);
    forward_into(y, x, workspace);
    return y;
  }

  /// y (n x width) = norm(x) · factor for x (n x width) of any strides; y may be x. Throws ShapeError before any work.
  /// Takes a copy from the workspace where rows do not lie one after another in memory.
  template <typename Y, typename X, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Workspace& workspace,
                    E&& executor = {}, Scalar factor = Scalar(1)) const {
    detail::check_shape("RmsNorm", "x", x, x.rows(), width_);
    detail::check_shape("RmsNorm", "y", y, x.rows(), width_);
    const detail::Readable<X> x_read(x.derived());
    const auto frame = workspace.frame();
    const Scalar* const from = detail::packed_rows(detail::view_of(x_read), workspace);
    detail::write_packed_rows(detail::writable_view_of(y), workspace,
                              [&](Scalar* to) { forward_rows(to, from, x.rows(), executor, factor); });
  }

  /// From dy, the gradient of y, and the x that forward_into was given: dx (n x width), which may be dy, and into
  /// `grad`, a norm of the same width, the gradient of the weight. Throws ShapeError before any work.
  template <typename DX, typename DY, typename X, Executor E = Serial>
  void backward_into(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Eigen::MatrixBase<X>& x,
                     RmsNorm& grad, Workspace& workspace, E&& executor = {}, Scalar factor = Scalar(1)) const {
    detail::check_shape("RmsNorm", "x", x, x.rows(), width_);
    detail::check_shape("RmsNorm", "dy", dy, x.rows(), width_);
    detail::check_shape("RmsNorm", "dx", dx, x.rows(), width_);
    const detail::Readable<X> x_read(x.derived());
    const detail::Readable<DY> dy_read(dy.derived());
    const auto frame = workspace.frame();
    const Scalar* const from_x = detail::packed_rows(detail::view_of(x_read), workspace);
    const Scalar* const from_dy = detail::packed_rows(detail::view_of(dy_read), workspace);
    detail::write_packed_rows(detail::writable_view_of(dx), workspace, [&](Scalar* to) {
      backward_rows(to, from_dy, from_x, x.rows(), grad, factor, Store::overwrite, workspace, executor);
    });
  }

  /// What backward(dy, tape, grad) needs of forward(x, tape).
  struct Tape {
    Matrix<Scalar> x;
    bool filled = false;
  };

  /// y = norm(x); fills the tape.
  Matrix<Scalar> forward(const Matrix<Scalar>& x, Tape& tape) const {
    const Matrix<Scalar> y = forward(x);
    tape.x = x;
    tape.filled = true;
    return y;
  }

  /// dx from dy, the gradient of y; the gradient of the weight is added to that of `grad`. Throws
  /// std::invalid_argument for a tape that no forward has filled, ShapeError for a dy, tape or grad of another shape.
  Matrix<Scalar> backward(const Matrix<Scalar>& dy, const Tape& tape, RmsNorm& grad) const {
    if (!tape.filled) detail::throw_invalid({"RmsNorm: backward needs a tape that forward(x, tape) has filled"});
    detail::check_shape("RmsNorm", "the tape's x", tape.x, tape.x.rows(), width_);
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> dx(tape.x.rows(), tape.x.cols());
    backward_into(dx, dy, tape.x, grad, workspace);
    return dx;
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    if (self.weight.size() != 0) visitor("weight", self.weight);
  }

  double eps;
  Vector<Scalar> weight;  ///< width, or empty

 private:
  static constexpr Index kTaskRows = 64;  // also of what backward_rows adds up at a time: changing it changes roundings

  Index width_;
};

}  // namespace diffattn::inline v0_1
