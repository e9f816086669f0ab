#pragma once

// The matrices that the library takes and returns.
//
// A sequence is a matrix with one token per row, row-major: the memory order of PyTorch, NumPy and safetensors.
// Functions take any dense Eigen expression. One that has memory of its own (Matrix, Map, Ref, Block; either storage
// order, any strides) is read in place through a StridedView; anything else (a sum, a product) is evaluated once.

#include <Eigen/Core>

#include <type_traits>

namespace diffattn::inline v0_1 {

using Index = Eigen::Index;

template <typename Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <typename Scalar>
using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

/// A rows x cols matrix in somebody else's memory: element (i, j) is data[i * row_stride + j * col_stride].
template <typename T>
struct StridedView {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index row_stride = 0;
  Index col_stride = 1;

  T& operator()(Index i, Index j) const { return data[i * row_stride + j * col_stride]; }

  StridedView block(Index row, Index col, Index num_rows, Index num_cols) const {
    return {data + row * row_stride + col * col_stride, num_rows, num_cols, row_stride, col_stride};
  }
  StridedView middle_rows(Index row, Index num_rows) const { return block(row, 0, num_rows, cols); }
  StridedView middle_cols(Index col, Index num_cols) const { return block(0, col, rows, num_cols); }
  StridedView transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

/// Whether a result replaces what its matrix holds or is added to it.
enum class Store { overwrite, add };

/// Memory seen as a matrix with contiguous rows.
template <typename Scalar>
using MatrixMap = Eigen::Map<Matrix<Scalar>>;

namespace detail {

template <typename Derived>
inline constexpr bool has_direct_access = (int(Derived::Flags) & int(Eigen::DirectAccessBit)) != 0;

/// Holds a reference to an expression with memory of its own, or the evaluated value of one without.
template <typename Derived>
using Readable = std::conditional_t<has_direct_access<Derived>, const Derived&, const Matrix<typename Derived::Scalar>>;

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

/// Rows [first, first + count), as the same type: Eigen's middleRows is another, and every type costs compile time.
template <typename Scalar>
MatrixMap<Scalar> rows_of(MatrixMap<Scalar>& matrix, Index first, Index count) {
  return MatrixMap<Scalar>(matrix.data() + first * matrix.cols(), count, matrix.cols());
}

template <typename Scalar>
Eigen::Map<const Matrix<Scalar>> rows_of(const Matrix<Scalar>& matrix, Index first, Index count) {
  return {matrix.data() + first * matrix.cols(), count, matrix.cols()};
}

/// to = from, unless it stands there already.
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
