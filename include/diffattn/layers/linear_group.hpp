#pragma once

// Several Linears that read the same x: the same values as of each by itself, with x packed and threads woken once.

#include <array>
#include <cstddef>
#include <span>
#include <type_traits>

#include "diffattn/core/executor_view.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/layers/arithmetic.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/product/bfloat16_product.hpp"
#include "diffattn/product/matmul.hpp"
#include "diffattn/product/product_tasks.hpp"
#include "diffattn/product/thin_product.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// A Linear and the matrix that it fills: one of several that read the same x.
template <typename Scalar, typename Weight>
struct LinearOutput {
  const Linear<Scalar, Weight>& linear;
  MatrixMap<Scalar> y;  ///< n x out
};

/// The same in bfloat16, of those that ask for it; x is rounded and packed once. Returns which they are.
template <typename Weight, std::size_t kCount, typename X, Executor E>
std::array<bool, kCount> bfloat16_forward_all(const std::array<LinearOutput<float, Weight>, kCount>& outputs,
                                              const Eigen::MatrixBase<X>& x, Workspace& workspace, E& executor) {
  std::array<Bfloat16Output, kCount> all;
  std::array<bool, kCount> done{};
  std::size_t count = 0;
  for (std::size_t i = 0; i < kCount; ++i) {
    const auto& linear = outputs[i].linear;
    if (linear.arithmetic != Arithmetic::bfloat16) continue;
    done[i] = true;
    visit_weight(linear.weight, [&]<typename Stored>(const StridedView<const Stored>& view) {
      check_arithmetic<float, Stored>("Linear", linear.arithmetic);
      if constexpr (kMultipliesBfloat16<float, Stored>) {
        all[count++] = {writable_view_of(outputs[i].y), view, linear.bias_data(), packed_of(linear.weight)};
      }
    });
  }
  if (count != 0) {
    const Readable<X> x_read(x.derived());
    multiply_bfloat16(std::span<const Bfloat16Output>(all).first(count), view_of(x_read), workspace, executor);
  }
  return done;
}

/// Linear::forward_into of all of them: the same values, with x packed and threads woken once. Shapes already checked.
template <typename Scalar, typename Weight, std::size_t kCount, typename X, Executor E>
void linear_forward_all(const std::array<LinearOutput<Scalar, Weight>, kCount>& outputs, const Eigen::MatrixBase<X>& x,
                        Workspace& workspace, E& executor) {
  if constexpr (std::is_same_v<Weight, Matrix<Scalar>>) {
    const Readable<X> x_read(x.derived());
    const StridedView<const Scalar> x_view = view_of(x_read);
    if (x.rows() > RowByRowProduct<Scalar, Scalar>::kMostRows) {
      if (ThinProduct<Scalar, Scalar>::fits(x_view, view_of(outputs[0].linear.weight))) {
        std::array<ThinOutput<Scalar, Scalar>, kCount> thin;
        for (std::size_t i = 0; i < kCount; ++i) {
          const auto& [linear, y] = outputs[i];
          thin[i] = {writable_view_of(y), view_of(linear.weight), linear.bias_data()};
        }
        ViewedExecutor<E> viewed(executor);
        return multiply_thin(std::span<const ThinOutput<Scalar, Scalar>>(thin), x_view, workspace, viewed);
      }
      if (executor.concurrency() > 1) {
        std::array<Product<Scalar>, kCount> products;
        for (std::size_t i = 0; i < kCount; ++i) {
          const auto& [linear, y] = outputs[i];
          products[i] = {writable_view_of(y), x_view, view_of(linear.weight).transposed(), linear.bias_data()};
        }
        return multiply_all(std::span<const Product<Scalar>>(products), workspace, executor);
      }
    }
  }
  std::array<bool, kCount> done{};
  if constexpr (!std::is_same_v<Weight, Matrix<Scalar>> && std::is_same_v<Scalar, float>) {
    done = bfloat16_forward_all(outputs, x, workspace, executor);
  }
  for (std::size_t i = 0; i < kCount; ++i) {
    if (!done[i]) outputs[i].linear.forward_into(outputs[i].y, x, workspace, executor);
  }
}

/// A Linear, the gradient of its y, and where its parameters' gradients are added to.
template <typename Scalar, typename Weight>
struct LinearGradient {
  const Linear<Scalar, Weight>& linear;
  MatrixMap<Scalar> dy;  ///< n x out
  Linear<Scalar, Weight>& grad;
};

/// Linear::backward_into of all of them, which have read the same x; dx is the sum of what each gives, in their order.
/// The same values, with threads woken once. Shapes already checked.
template <typename Scalar, typename Weight, std::size_t kCount, typename DX, typename X, Executor E>
void linear_backward_all(const Eigen::MatrixBase<DX>& dx,
                         const std::array<LinearGradient<Scalar, Weight>, kCount>& gradients,
                         const Eigen::MatrixBase<X>& x, Workspace& workspace, E& executor) {
  const Readable<X> x_read(x.derived());
  std::array<Product<Scalar>, 2 * kCount> products;
  for (std::size_t i = 0; i < kCount; ++i) {
    const auto& [linear, dy, grad] = gradients[i];
    const StridedView<const Scalar> dy_view = view_of(dy);
    products[i] = {writable_view_of(dx), dy_view, view_of(linear.weight), nullptr,
                   i == 0 ? Store::overwrite : Store::add};
    products[kCount + i] = {writable_view_of(grad.weight), dy_view.transposed(), view_of(x_read), nullptr, Store::add};
    linear.check_gradient(grad);
  }
  multiply_all(std::span<const Product<Scalar>>(products), workspace, executor);
  for (const auto& [linear, dy, grad] : gradients) linear.add_bias_gradient(grad, dy);
}

}  // namespace detail

}  // namespace diffattn::inline v0_1
