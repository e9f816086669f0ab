// Operands and outputs of any storage order and stride, and expressions: the same numbers, the same result.

#include <vector>

#include "kernels/oracle.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"
#include "support/tolerances.hpp"

using namespace support;

namespace {

// Each layout holds the numbers of a matrix in its own way; what lies between them is NaN, and must not be read.

template <typename Scalar>
constexpr Scalar kGap = std::numeric_limits<Scalar>::quiet_NaN();

template <typename Scalar>
struct ColumnMajor {
  explicit ColumnMajor(const Matrix<Scalar>& m) : matrix(m) {}
  const auto& view() const { return matrix; }
  Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic> matrix;
};

template <typename Scalar, typename Storage>
struct BlockOf {
  explicit BlockOf(const Matrix<Scalar>& m)
      : around(Storage::Constant(m.rows() + 3, m.cols() + 5, kGap<Scalar>)), rows(m.rows()), cols(m.cols()) {
    around.block(2, 3, rows, cols) = m;
  }
  auto view() const { return around.block(2, 3, rows, cols); }
  Storage around;
  Index rows, cols;
};
template <typename Scalar>
using RowMajorBlock = BlockOf<Scalar, Matrix<Scalar>>;
template <typename Scalar>
using ColumnMajorBlock = BlockOf<Scalar, Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic>>;

template <typename Scalar>
struct InnerStride {
  explicit InnerStride(const Matrix<Scalar>& m)
      : rows(m.rows()), cols(m.cols()), memory(static_cast<std::size_t>(rows * row_stride()), kGap<Scalar>) {
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < cols; ++j) memory[static_cast<std::size_t>(i * row_stride() + j * 3)] = m(i, j);
    }
  }
  Index row_stride() const { return cols * 3 + 1; }
  auto view() const {
    using Stride = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
    return Eigen::Map<const Matrix<Scalar>, 0, Stride>(memory.data(), rows, cols, Stride(row_stride(), 3));
  }
  Index rows, cols;
  std::vector<Scalar> memory;
};

template <typename Scalar>
struct Transposed {
  explicit Transposed(const Matrix<Scalar>& m) : matrix(m.transpose()) {}
  auto view() const { return matrix.transpose(); }
  Matrix<Scalar> matrix;
};

template <typename Scalar>
struct Reference {
  explicit Reference(const Matrix<Scalar>& m) : matrix(m) {}
  Eigen::Ref<const Matrix<Scalar>> view() const { return matrix; }
  Matrix<Scalar> matrix;
};

/// No memory of its own: evaluated.
template <typename Scalar>
struct Expression {
  explicit Expression(const Matrix<Scalar>& m) : half(m / Scalar(2)) {}
  auto view() const { return Scalar(2) * half; }
  Matrix<Scalar> half;
};

template <template <typename> typename Layout, typename Scalar>
void check_layout(const std::string& name) {
  for (const Shape& shape : {Shape{37, 70, 9, 21}, Shape{2, 70, 9, 21}, Shape{30, 1, 1, 1}}) {
    INFO(name << ", " << describe(shape));
    Rng rng = make_rng();
    const auto x = random_operands<Scalar>(shape, rng);
    const Layout<Scalar> q1(x.q1), k1(x.k1), q2(x.q2), k2(x.k2), v(x.v), lambda(x.lambda);
    const RangeMask mask{CausalMask{}};
    const Matrix<Scalar> standard = diffattn::attention(q1.view(), k1.view(), v.view(), mask);
    const Matrix<Scalar> differential =
        diffattn::diff_attention(q1.view(), k1.view(), q2.view(), k2.view(), v.view(), lambda.view(), mask);
    if (shape.n_q > 8) {
      CHECK(identical(standard, Attention{}(x, mask)));
      CHECK(identical(differential, DiffAttentionPerRow{}(x, mask)));
    } else {  // a few rows may be read in place or packed, whichever the layout allows
      const Expected first = expect_causal(x, Attention{}.lambda(x));
      const Expected both = expect_causal(x, DiffAttentionPerRow{}.lambda(x));
      CHECK(worst_error<Scalar>(standard, first.value, first.magnitude) <= kErrorFactor);
      CHECK(worst_error<Scalar>(differential, both.value, both.magnitude) <= kErrorFactor);
    }
  }
}

/// Calls both kernels with `out` and checks that it got the result; the caller checks what is around it.
template <typename Scalar, typename Out>
void check_output(const Operands<Scalar>& x, Out&& out) {
  const RangeMask mask{FullMask{}};
  diffattn::attention_into(out, x.q1, x.k1, x.v, mask);
  CHECK(identical(out, Attention{}(x)));
  diffattn::diff_attention_into(out, x.q1, x.k1, x.q2, x.k2, x.v, x.lambda, mask);
  CHECK(identical(out, DiffAttentionPerRow{}(x)));
}

template <typename Storage>
void check_output_block(const Operands<typename Storage::Scalar>& x) {
  using Scalar = typename Storage::Scalar;
  const Index rows = x.n_q(), cols = x.v.cols();
  Storage around = Storage::Constant(rows + 3, cols + 5, Scalar(7));
  check_output(x, around.block(2, 3, rows, cols));
  around.block(2, 3, rows, cols).setConstant(Scalar(7));
  CHECK((around.array() == Scalar(7)).all());
}

}  // namespace

TEMPLATE_TEST_CASE("Operands of any layout give the same result", "", DIFFATTN_TEST_SCALARS) {
  check_layout<ColumnMajor, TestType>("column-major");
  check_layout<RowMajorBlock, TestType>("block of a row-major matrix");
  check_layout<ColumnMajorBlock, TestType>("block of a column-major matrix");
  check_layout<InnerStride, TestType>("map with an inner stride");
  check_layout<Transposed, TestType>("transpose");
  check_layout<Reference, TestType>("Ref");
  check_layout<Expression, TestType>("expression");
}

TEMPLATE_TEST_CASE("Vectors and matrices of fixed size are operands", "", DIFFATTN_TEST_SCALARS) {
  using Column = Vector<TestType>;
  using Row = Eigen::Matrix<TestType, 1, Eigen::Dynamic>;
  const RangeMask mask{FullMask{}};
  Rng rng = make_rng();
  const auto thin = random_operands<TestType>({20, 30, 1, 1}, rng);
  const Column q = thin.q1, k = thin.k1, v = thin.v;
  CHECK(identical(diffattn::attention(q, k, v, mask), Attention{}(thin)));

  const auto one = random_operands<TestType>({1, 1, 6, 9}, rng);
  const Row q_row = one.q1, k_row = one.k1, v_row = one.v;
  CHECK(identical(diffattn::attention(q_row, k_row, v_row, mask), Attention{}(one)));

  const auto fixed = random_operands<TestType>({10, 7, 4, 3}, rng);
  const Eigen::Matrix<TestType, 10, 4> q_fixed = fixed.q1;
  const Eigen::Matrix<TestType, 7, 4, Eigen::RowMajor> k_fixed = fixed.k1;
  const Eigen::Matrix<TestType, 7, 3> v_fixed = fixed.v;
  Eigen::Matrix<TestType, 10, 3> out;
  diffattn::attention_into(out, q_fixed, k_fixed, v_fixed, mask);
  CHECK(identical(out, Attention{}(fixed)));
}

TEMPLATE_TEST_CASE("A view as output gets the result, and its surroundings nothing", "", DIFFATTN_TEST_SCALARS) {
  using ColumnMajorMatrix = Eigen::Matrix<TestType, Eigen::Dynamic, Eigen::Dynamic>;
  for (const Shape& shape : {Shape{37, 70, 9, 21}, Shape{3, 12, 8, 16}, Shape{50, 9, 4, 1}, Shape{9, 0, 4, 5}}) {
    INFO(describe(shape));
    Rng rng = make_rng();
    const auto x = random_operands<TestType>(shape, rng);
    check_output_block<Matrix<TestType>>(x);
    check_output_block<ColumnMajorMatrix>(x);

    const Index stride = shape.dv * 3 + 2;
    std::vector<TestType> memory(static_cast<std::size_t>(shape.n_q * stride), TestType(7));
    using Stride = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
    Eigen::Map<Matrix<TestType>, 0, Stride> map(memory.data(), shape.n_q, shape.dv, Stride(stride, 3));
    check_output(x, map);
    map.setConstant(TestType(7));
    CHECK(std::all_of(memory.begin(), memory.end(), [](TestType value) { return value == TestType(7); }));

    Matrix<TestType> transposed(shape.dv, shape.n_q);
    check_output(x, transposed.transpose());
    Matrix<TestType> owner(shape.n_q, shape.dv);
    check_output(x, Eigen::Ref<Matrix<TestType>>(owner));
  }
}
