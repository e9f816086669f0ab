#pragma once

// LayerNorm: y = (x − mean(x)) / sqrt(var(x) + eps) ∘ w + b for every row, as PyTorch's nn.LayerNorm has it: the
// variance is Σ(x − mean)² / width, eps stands inside the root. (Ba, Kiros, Hinton, arXiv 1607.06450.)
//
// Parameters (visit_parameters): weight and bias, each (width), each present or absent.
// Shapes   x, y (n x width), n >= 0. Any strides; y may be x.
// Errors   ShapeError before any work.
// Memory   nothing where rows lie one after another, else a copy of x and one of y from the workspace; backward takes
//          2·width values more for every 64 rows.
// Accuracy the mean is subtracted before anything is squared, and then what rounding has left of it: errors are those
//          of x less its mean, however large the mean is, and a row of equal values gives b.
// Results are the same bits for any executor. NaN or infinity in a row makes that row NaN and no other.

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
class LayerNorm {
 public:
  /// Weight 1 and bias 0, as far as there are any. Throws std::invalid_argument for a width that is negative or that no
  /// memory holds.
  explicit LayerNorm(Index width, double norm_eps = 1e-5, bool with_weight = true, bool with_bias = true)
      : eps(norm_eps), width_(detail::checked_product(kName, "width", {width})) {
    if (with_weight) weight.setOnes(width);
    if (with_bias) bias.setZero(width);
  }

  /// How many columns it norms.
  Index width() const { return width_; }

  /// y (n x width) = norm(x) for x (n x width), row by row. Throws ShapeError.
  template <typename X>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> y(x.rows(), width_);
    forward_into(y, x, workspace);
    return y;
  }

  /// The same into y, which may be x. Throws ShapeError before any work.
  template <typename Y, typename X, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Workspace& workspace,
                    E&& executor = {}) const {
    detail::check_shape(kName, "x", x, x.rows(), width_);
    detail::check_shape(kName, "y", y, x.rows(), width_);
    const detail::Readable<X> x_read(x.derived());
    const auto frame = workspace.frame();
    const Scalar* const from = detail::packed_rows(detail::view_of(x_read), workspace);
    detail::write_packed_rows(detail::writable_view_of(y), workspace,
                              [&](Scalar* to) { forward_rows(to, from, x.rows(), executor); });
  }

  /// The same for `rows` rows, one after another in memory; y may be x.
  template <Executor E>
  void forward_rows(Scalar* y, const Scalar* x, Index rows, E& executor) const {
    for_each_task(rows, executor, [&](Index row) { apply(y + row * width_, x + row * width_); });
  }

  /// sum += x, y = norm(sum), for `rows` rows, one after another in memory: a residual connection and the norm behind
  /// it. y may be sum.
  template <Executor E>
  void add_forward_rows(Scalar* y, Scalar* sum, const Scalar* x, Index rows, E& executor) const {
    for_each_task(rows, executor, [&](Index row) {
      const Index at = row * width_;
      for (Index c = at; c < at + width_; ++c) sum[c] += x[c];
      apply(y + at, sum + at);
    });
  }

  /// The same for one row of `width()` values; y may be x.
  void apply(Scalar* y, const Scalar* x) const {
    constexpr Index kLanes = simd::kLanes<Scalar>;
    const Moments m = moments(x);
    const Scalar* const w = weight.size() == 0 ? nullptr : weight.data();
    const Scalar* const b = bias.size() == 0 ? nullptr : bias.data();
    const auto mean = simd::broadcast(m.mean), rest = simd::broadcast(m.rest), scale = simd::broadcast(m.scale);
    Index c = 0;
    for (; c + kLanes <= width_; c += kLanes) {
      auto y_c = simd::mul(simd::sub(simd::sub(simd::loadu(x + c), mean), rest), scale);
      if (w != nullptr) y_c = simd::mul(y_c, simd::loadu(w + c));
      if (b != nullptr) y_c = simd::add(y_c, simd::loadu(b + c));
      simd::storeu(y + c, y_c);
    }
    for (; c < width_; ++c) {
      Scalar y_c = m.normalized(x[c]);
      if (w != nullptr) y_c *= w[c];
      if (b != nullptr) y_c += b[c];
      y[c] = y_c;
    }
  }

  /// What backward(dy, tape, grad) needs of forward(x, tape).
  struct Tape {
    Matrix<Scalar> x;
    bool filled = false;
  };

  /// The same y, bit for bit; fills the tape.
  Matrix<Scalar> forward(const Matrix<Scalar>& x, Tape& tape) const {
    Matrix<Scalar> y = forward(x);
    tape.x = x;
    tape.filled = true;
    return y;
  }

  /// dx from dy, the gradient of y; the gradients of weight and bias are added to those of `grad`. Throws
  /// std::invalid_argument for a tape that no forward has filled, ShapeError for a dy, tape or grad of another shape.
  Matrix<Scalar> backward(const Matrix<Scalar>& dy, const Tape& tape, LayerNorm& grad) const {
    if (!tape.filled) detail::throw_invalid({kName, ": backward needs a tape that forward(x, tape) has filled"});
    detail::check_shape(kName, "the tape's x", tape.x, tape.x.rows(), width_);
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> dx(tape.x.rows(), width_);
    backward_into(dx, dy, tape.x, grad, workspace);
    return dx;
  }

  /// From dy, the gradient of y, and the x that forward was given: dx (n x width), which may be dy, and into `grad`, a
  /// norm with the same parameters, weight += … and bias += …. Throws ShapeError before any work.
  template <typename DX, typename DY, typename X, Executor E = Serial>
  void backward_into(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Eigen::MatrixBase<X>& x,
                     LayerNorm& grad, Workspace& workspace, E&& executor = {}) const {
    detail::check_shape(kName, "x", x, x.rows(), width_);
    detail::check_shape(kName, "dy", dy, x.rows(), width_);
    detail::check_shape(kName, "dx", dx, x.rows(), width_);
    const detail::Readable<X> x_read(x.derived());
    const detail::Readable<DY> dy_read(dy.derived());
    const auto frame = workspace.frame();
    const Scalar* const x_rows = detail::packed_rows(detail::view_of(x_read), workspace);
    const Scalar* const dy_rows = detail::packed_rows(detail::view_of(dy_read), workspace);
    detail::write_packed_rows(detail::writable_view_of(dx), workspace, [&](Scalar* to) {
      backward_rows(to, dy_rows, x_rows, x.rows(), grad, Store::overwrite, workspace, executor);
    });
  }

  /// The same for `rows` rows, one after another in memory; with Store::add it is dx += ….
  template <Executor E>
  void backward_rows(Scalar* dx, const Scalar* dy, const Scalar* x, Index rows, LayerNorm& grad, Store store,
                     Workspace& workspace, E& executor) const {
    check_gradient(grad);
    const Index tasks = (rows + kTaskRows - 1) / kTaskRows;
    const auto frame = workspace.frame();
    auto* const sums = workspace.take<Scalar>(tasks * 2 * width_);  // of each task, the weight's and the bias's
    std::fill_n(sums, tasks * 2 * width_, Scalar(0));
    for_each_task(rows, executor, [&](Index row) {
      const Index at = row * width_;
      Scalar* const dweight = sums + row / kTaskRows * 2 * width_;
      apply_backward(dx + at, dy + at, x + at, dweight, dweight + width_, store);
    });
    for (Index task = 0; task < tasks; ++task) {
      const Eigen::Map<const Vector<Scalar>> dweight(sums + task * 2 * width_, width_);
      const Eigen::Map<const Vector<Scalar>> dbias(sums + (task * 2 + 1) * width_, width_);
      if (weight.size() != 0) grad.weight += dweight;
      if (bias.size() != 0) grad.bias += dbias;
    }
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    if (self.weight.size() != 0) visitor("weight", self.weight);
    if (self.bias.size() != 0) visitor("bias", self.bias);
  }

  double eps;
  Vector<Scalar> weight;  ///< width, or empty
  Vector<Scalar> bias;    ///< width, or empty

 private:
  static constexpr const char* kName = "LayerNorm";
  static constexpr Index kTaskRows = 64;  // also of what backward_rows adds up at a time: changing it changes roundings

  /// Of a row: its mean is mean + rest, of which `mean` is what can be told at once, and `rest` its rounding error.
  struct Moments {
    Scalar mean, rest, scale;

    /// x without the mean, divided by the deviation.
    Scalar normalized(Scalar x) const { return (x - mean - rest) * scale; }
  };

  Moments moments(const Scalar* x) const {
    constexpr Index kLanes = simd::kLanes<Scalar>;
    const auto width = static_cast<Scalar>(width_);
    auto packet_sum = simd::broadcast(Scalar(0));
    Index c = 0;
    for (; c + kLanes <= width_; c += kLanes) packet_sum = simd::add(packet_sum, simd::loadu(x + c));
    Scalar sum = simd::reduce_add(packet_sum);
    for (; c < width_; ++c) sum += x[c];
    const Scalar mean = sum / width;

    const auto packet_mean = simd::broadcast(mean);
    auto packet_rest = simd::broadcast(Scalar(0)), packet_squares = packet_rest;
    for (c = 0; c + kLanes <= width_; c += kLanes) {
      const auto deviation = simd::sub(simd::loadu(x + c), packet_mean);
      packet_rest = simd::add(packet_rest, deviation);
      packet_squares = simd::fma(deviation, deviation, packet_squares);
    }
    Scalar rest = simd::reduce_add(packet_rest), squares = simd::reduce_add(packet_squares);
    for (; c < width_; ++c) {
      const Scalar deviation = x[c] - mean;
      rest += deviation;
      squares += deviation * deviation;
    }
    rest /= width;
    const Scalar difference = squares / width - rest * rest;
    const Scalar variance = difference < 0 ? Scalar(0) : difference;  // rounding's; NaN stays
    return {mean, rest, Scalar(1) / std::sqrt(variance + static_cast<Scalar>(eps))};
  }

  /// One row. With z = (x − mean)·scale and g = w∘dy:
  ///
  ///   dx = scale·(g − mean(g) − z·mean(g∘z)),  dw += dy∘z,  db += dy
  void apply_backward(Scalar* dx, const Scalar* dy, const Scalar* x, Scalar* dweight, Scalar* dbias,
                      Store store) const {
    const Moments m = moments(x);
    const Scalar* const w = weight.size() == 0 ? nullptr : weight.data();
    Scalar mean_g = 0, mean_gz = 0;
    for (Index c = 0; c < width_; ++c) {
      const Scalar g = w == nullptr ? dy[c] : w[c] * dy[c];
      mean_g += g;
      mean_gz += g * m.normalized(x[c]);
    }
    mean_g /= static_cast<Scalar>(width_);
    mean_gz /= static_cast<Scalar>(width_);
    for (Index c = 0; c < width_; ++c) {
      const Scalar dy_c = dy[c], z = m.normalized(x[c]), g = w == nullptr ? dy_c : w[c] * dy_c;
      const Scalar dx_c = m.scale * (g - mean_g - z * mean_gz);
      dx[c] = store == Store::add ? dx[c] + dx_c : dx_c;
      dweight[c] += dy_c * z;
      dbias[c] += dy_c;
    }
  }

  /// Calls f(row) for every row, kTaskRows of them a task.
  template <Executor E, typename F>
  static void for_each_task(Index rows, E& executor, F&& f) {
    executor.run((rows + kTaskRows - 1) / kTaskRows, [&](Index task, Index /*worker*/) {
      for (Index row = task * kTaskRows; row < std::min(rows, (task + 1) * kTaskRows); ++row) f(row);
    });
  }

  void check_gradient(const LayerNorm& grad) const {
    detail::check_shape(kName, "the gradient's weight", grad.weight, weight.rows(), 1);
    detail::check_shape(kName, "the gradient's bias", grad.bias, bias.rows(), 1);
  }

  Index width_;
};

}  // namespace diffattn::inline v0_1
