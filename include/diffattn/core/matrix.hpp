#pragma once

// The matrices that the library takes and returns.
//
// A sequence is a matrix with one token per row, row-major: the memory order of PyTorch, NumPy and safetensors.
// Functions take any dense Eigen expression. One that has memory of its own (Matrix, Map, Ref, Block; either storage
// order, any strides) is read in place through a StridedView; anything else (a sum, a product) is evaluated once.

#include <Eigen/Core>

#include <type_traits>

#include "diffattn/core/version.hpp"

namespace diffattn::inline v0_1 {

/// Sizes and positions: signed, as in Eigen.
using Index = Eigen::Index;

/// A row-major matrix of any size: one token per row.
template <typename Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// A column vector of any size.
template <typename Scalar>
using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

/// A rows x cols matrix in memory that belongs to somebody else. Element (i, j) is at
/// data[i * row_stride + j * col_stride]. Nothing is checked: positions and sizes must lie inside.
template <typename T>
struct StridedView {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index row_stride = 0;
  Index col_stride = 1;

  /// Element (i, j).
  T& operator()(Index i, Index j) const { return data[i * row_stride + j * col_stride]; }

  /// The num_rows x num_cols part that begins at (row, col), in the same memory.
  StridedView block(Index row, Index col, Index num_rows, Index num_cols) const {
    return {data + row * row_stride + col * col_stride, num_rows, num_cols, row_stride, col_stride};
  }
  /// Rows [row, row + num_rows).
  StridedView middle_rows(Index row, Index num_rows) const { return block(row, 0, num_rows, cols); }
  /// Columns [col, col + num_cols).
  StridedView middle_cols(Index col, Index num_cols) const { return block(0, col, rows, num_cols); }
  /// The transpose, in the same memory.
  StridedView transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

/// Whether a result replaces what the output matrix holds or is added to it.
enum class Store { overwrite, add };

/// Memory that belongs to somebody else, as a row-major matrix whose rows follow each other without gaps.
template <typename Scalar>
using MatrixMap = Eigen::Map<Matrix<Scalar>>;

namespace detail {

/// Whether an expression has memory of its own that can be read in place.
template <typename Derived>
inline constexpr bool has_direct_access = (int(Derived::Flags) & int(Eigen::DirectAccessBit)) != 0;

/// The type that holds an argument while it is read: a reference if it has memory of its own, else its value,
/// evaluated.
template <typename Derived>
using Readable = std::conditional_t<has_direct_access<Derived>, const Derived&, const Matrix<typename Derived::Scalar>>;

/// The read-only view of an argument with memory of its own.
template <typename Derived>
StridedView<const typename Derived::Scalar> view_of(const Eigen::DenseBase<Derived>& matrix) {
  static_assert(has_direct_access<Derived>, "evaluate the expression first: detail::Readable does");
  const Derived& m = matrix.derived();
  // A vector has only one stride that means anything; Eigen gives the other whatever is convenient.
  const Index row_stride = Derived::IsRowMajor ? m.outerStride() : m.innerStride();
  const Index col_stride = Derived::IsRowMajor ? m.innerStride() : m.outerStride();
  return {m.data(), m.rows(), m.cols(), row_stride, col_stride};
}

/// The writable view of an output argument. Eigen passes temporaries such as `out.middleRows(0, n)` as const&, so the
/// const is Eigen's idiom and not a promise; an expression that is read-only does not compile.
template <typename Derived>
StridedView<typename Derived::Scalar> writable_view_of(const Eigen::DenseBase<Derived>& matrix) {
  static_assert(has_direct_access<Derived> && (int(Derived::Flags) & int(Eigen::LvalueBit)) != 0,
                "diffattn: the output must be a writable Matrix, Map, Ref or Block");
  Derived& m = const_cast<Derived&>(matrix.derived());
  const Index row_stride = Derived::IsRowMajor ? m.outerStride() : m.innerStride();
  const Index col_stride = Derived::IsRowMajor ? m.innerStride() : m.outerStride();
  return {m.data(), m.rows(), m.cols(), row_stride, col_stride};
}

/// Rows [first, first + count), of the same type: Eigen's middleRows has another type, and every type costs compile
/// time.
template <typename Scalar>
MatrixMap<Scalar> rows_of(MatrixMap<Scalar>& matrix, Index first, Index count) {
  return MatrixMap<Scalar>(matrix.data() + first * matrix.cols(), count, matrix.cols());
}

/// Rows [first, first + count) of a matrix, to read.
template <typename Scalar>
Eigen::Map<const Matrix<Scalar>> rows_of(const Matrix<Scalar>& matrix, Index first, Index count) {
  return {matrix.data() + first * matrix.cols(), count, matrix.cols()};
}

/// to = from; nothing is copied if `from` is `to` itself.
template <typename Scalar, typename From>
void keep(Matrix<Scalar>& to, const Eigen::MatrixBase<From>& from) {
  if constexpr (has_direct_access<From>) {
    const auto view = view_of(from);
    const bool same_rows = view.data == to.data() && view.row_stride == to.cols() && view.col_stride == 1;
    if (same_rows && view.rows == to.rows() && view.cols == to.cols()) return;
  }
  to = from;
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
