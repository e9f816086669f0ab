// Views: where element (i, j) of somebody else's matrix is.

#include "diffattn/core/matrix.hpp"

#include <type_traits>
#include <vector>

#include "support/catch.hpp"

using diffattn::Index;
using diffattn::Matrix;
using diffattn::StridedView;
using diffattn::Vector;
using diffattn::detail::view_of;
using diffattn::detail::writable_view_of;

static_assert(Matrix<float>::IsRowMajor);
static_assert(std::is_same_v<Index, Eigen::Index>);

namespace {

/// The view has the shape and the numbers of the matrix, in its memory.
template <typename Derived>
void check_view(const Eigen::DenseBase<Derived>& matrix) {
  const auto view = view_of(matrix);
  REQUIRE(view.rows == matrix.rows());
  REQUIRE(view.cols == matrix.cols());
  for (Index i = 0; i < view.rows; ++i) {
    for (Index j = 0; j < view.cols; ++j) CHECK(&view(i, j) == &matrix.derived().coeffRef(i, j));
  }
}

}  // namespace

TEST_CASE("A view reads any dense matrix in place") {
  Matrix<double> rows = Matrix<double>::Random(5, 7);
  Eigen::MatrixXd cols = Eigen::MatrixXd::Random(5, 7);
  check_view(rows);
  check_view(cols);
  check_view(rows.block(1, 2, 3, 4));
  check_view(cols.block(1, 2, 3, 4));
  check_view(rows.transpose());
  check_view(rows.row(2));
  check_view(rows.col(2));
  check_view(cols.row(2));
  check_view(cols.col(2));
  check_view(rows.middleRows(2, 0));

  Eigen::VectorXd vector = Eigen::VectorXd::Random(6);
  Eigen::RowVectorXd row_vector = Eigen::RowVectorXd::Random(6);
  check_view(vector);
  check_view(row_vector);
  check_view(vector.segment(1, 3));
  check_view(vector.transpose());

  Eigen::Matrix<double, 3, 4> fixed = Eigen::Matrix<double, 3, 4>::Random();
  check_view(fixed);
  check_view(fixed.block<2, 2>(1, 1));

  std::vector<double> memory(100);
  using Stride = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
  check_view(Eigen::Map<Matrix<double>, 0, Stride>(memory.data(), 4, 5, Stride(17, 3)));
  check_view(Eigen::Map<Eigen::MatrixXd, 0, Stride>(memory.data(), 4, 5, Stride(17, 3)));
  check_view(Eigen::Map<Eigen::VectorXd, 0, Eigen::InnerStride<>>(memory.data(), 9, Eigen::InnerStride<>(4)));
  check_view(Eigen::Ref<Matrix<double>>(rows));
}

TEST_CASE("A view has parts") {
  const Matrix<double> m = Matrix<double>::Random(6, 8);
  const StridedView<const double> part = view_of(m).block(1, 2, 4, 5);
  CHECK(part.rows == 4);
  CHECK(part.cols == 5);
  CHECK(&part(3, 4) == &m(4, 6));
  CHECK(&part.middle_rows(1, 2)(1, 0) == &m(3, 2));
  CHECK(&part.middle_cols(2, 3)(0, 2) == &m(1, 6));
}

TEST_CASE("A writable view writes to the matrix it was made from") {
  Eigen::MatrixXf m = Eigen::MatrixXf::Zero(4, 6);
  writable_view_of(m.block(1, 2, 2, 3))(1, 2) = 5;
  writable_view_of(m.transpose())(0, 3) = 7;
  CHECK(m(2, 4) == 5);
  CHECK(m(3, 0) == 7);
  CHECK(m.sum() == 12);
}

TEST_CASE("What has no memory of its own is evaluated, and what has is not copied") {
  using Sum = decltype(Matrix<float>() + Matrix<float>());
  static_assert(std::is_same_v<diffattn::detail::Readable<Sum>, const Matrix<float>>);
  static_assert(std::is_same_v<diffattn::detail::Readable<Eigen::MatrixXf>, const Eigen::MatrixXf&>);
  const Matrix<float> a = Matrix<float>::Random(2, 3);
  diffattn::detail::Readable<Matrix<float>> read(a);
  CHECK(read.data() == a.data());
}
