#pragma once

// Operands of products and what plain loops make of them. All values are small whole numbers: their sums are exact in
// any order, so a result is right to the last bit or wrong.

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/workspace.hpp"
#include "support/random.hpp"

namespace support {

using diffattn::Index;
using diffattn::Matrix;
using diffattn::StridedView;

/// Whole numbers from -8 to 8, which every storage type has.
template <typename T>
Matrix<T> whole_numbers(Index rows, Index cols, Rng& rng) {
  std::uniform_int_distribution<int> numbers(-8, 8);
  Matrix<T> matrix(rows, cols);
  for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = static_cast<T>(static_cast<float>(numbers(rng)));
  return matrix;
}

/// How a matrix lies in memory.
enum class Layout { rows, rows_apart, columns, columns_apart, scattered };
inline constexpr Layout kLayouts[] = {Layout::rows, Layout::rows_apart, Layout::columns, Layout::columns_apart,
                                      Layout::scattered};

inline std::string describe(Layout layout) {
  constexpr const char* kNames[] = {"rows", "rows apart", "columns", "columns apart", "scattered"};
  return kNames[static_cast<std::size_t>(layout)];
}

/// A matrix in memory of a layout. What lies between its elements and around them is NaN: a result that has read it is
/// NaN, too, and whether it has been written to can be asked.
template <typename T>
class Laid {
 public:
  Laid(const Matrix<T>& matrix, Layout layout)
      : memory_(static_cast<std::size_t>(2 * kMargin + (matrix.rows() + 3) * (2 * matrix.cols() + 3)),
                std::numeric_limits<T>::quiet_NaN()) {
    const Index rows = matrix.rows(), cols = matrix.cols();
    const bool by_rows = layout == Layout::rows || layout == Layout::rows_apart;
    const Index gap = layout == Layout::rows || layout == Layout::columns ? 0 : 3;
    view_ = {memory_.data() + kMargin, rows, cols, by_rows ? cols + gap : 1, by_rows ? 1 : rows + gap};
    if (layout == Layout::scattered) view_ = {view_.data, rows, cols, 2 * cols + 1, 2};
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < cols; ++j) view_(i, j) = matrix(i, j);
    }
  }
  Laid(const Laid&) = delete;
  Laid& operator=(const Laid&) = delete;

  const StridedView<T>& view() const { return view_; }
  StridedView<const T> read() const { return {view_.data, view_.rows, view_.cols, view_.row_stride, view_.col_stride}; }

  Matrix<T> matrix() const {
    Matrix<T> result(view_.rows, view_.cols);
    for (Index i = 0; i < view_.rows; ++i) {
      for (Index j = 0; j < view_.cols; ++j) result(i, j) = view_(i, j);
    }
    return result;
  }

  /// Whether there is as much NaN as in the beginning, the matrix itself having none.
  bool surroundings_untouched() const {
    const auto others = std::count_if(memory_.begin(), memory_.end(), [](T x) { return x != x; });
    return others == static_cast<std::ptrdiff_t>(memory_.size()) - view_.rows * view_.cols;
  }

 private:
  static constexpr Index kMargin = 64;
  std::vector<T> memory_;
  StridedView<T> view_;
};

/// a b + bias, or start + a b + bias: whichever of bias (one value a column) and start is empty is 0.
template <typename Scalar, typename T>
Matrix<Scalar> plain_product(const Matrix<Scalar>& a, const Matrix<T>& b, const std::vector<Scalar>& bias = {},
                             const Matrix<Scalar>& start = {}) {
  Matrix<Scalar> y(a.rows(), b.cols());
  for (Index i = 0; i < y.rows(); ++i) {
    for (Index j = 0; j < y.cols(); ++j) {
      Scalar sum = start.size() == 0 ? Scalar(0) : start(i, j);
      for (Index k = 0; k < a.cols(); ++k) sum += a(i, k) * static_cast<Scalar>(b(k, j));
      y(i, j) = bias.empty() ? sum : sum + bias[static_cast<std::size_t>(j)];
    }
  }
  return y;
}

/// `size` values aligned to a packet, all of them `value`, and some after them, which ought to stay so.
template <typename Scalar>
class Aligned {
 public:
  Aligned(Index size, Scalar value)
      : value_(value), size_(size), frame_(workspace_), data_(workspace_.take<Scalar>(size + kMargin)) {
    std::fill(data_, data_ + size + kMargin, value);
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;

  Scalar* data() const { return data_; }
  Scalar operator[](Index i) const { return data_[i]; }
  bool end_untouched() const { return std::count(data_ + size_, data_ + size_ + kMargin, value_) == kMargin; }

 private:
  static constexpr Index kMargin = 64;
  Scalar value_;
  Index size_;
  diffattn::Workspace workspace_;
  diffattn::Workspace::Frame frame_;
  Scalar* data_;
};

}  // namespace support
