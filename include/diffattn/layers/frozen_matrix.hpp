#pragma once

// FrozenMatrix: a weight that is read and never changed, whose element type is known only at run time: double, float,
// bfloat16 or half. It owns its values, or shares somebody else's, such as a file that is mapped into memory; a copy
// shares them too. Linear<float, FrozenMatrix> multiplies with it in float, whatever it holds: 16-bit weights are
// widened as they are read, so that decoding reads half the bytes.
//
//   FrozenMatrix w(weights.cast<Eigen::bfloat16>().eval());          owns
//   FrozenMatrix w(file.mapped<float>("name"), rows, cols);          shares, and keeps the file alive
//   w.pack();                                                        values of bfloat16: a packed copy beside them
//
// Packed   products in bfloat16 (arithmetic.hpp) of more than 4 rows pack W as they go: 5 % of the time of 512 rows, 12 %
//          of that of 64, a third of that of 8 to 16. A packed copy, of as many bytes again, saves it. Copies of the
//          matrix share it; what is assigned later has its own, or none.
// Layout   row-major, rows without a gap between them.
// Errors   std::invalid_argument for rows and columns that are negative or that no memory holds, and from what reads a
//          FrozenMatrix that has a shape but no values yet.

#include <cstddef>
#include <memory>
#include <type_traits>
#include <utility>
#include <variant>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/simd_pairs.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/product/bfloat16_product.hpp"

namespace diffattn::inline v0_1 {

class FrozenMatrix {
 public:
  /// A shape whose values are given later, by assignment.
  explicit FrozenMatrix(Index rows = 0, Index cols = 0) : rows_(rows), cols_(cols) { check_size(); }

  template <typename T>
  explicit FrozenMatrix(Matrix<T> values) : rows_(values.rows()), cols_(values.cols()) {
    auto owner = std::make_shared<Matrix<T>>(std::move(values));
    values_ = std::shared_ptr<const T>(owner, owner->data());
  }

  /// Shares rows · cols values with whoever holds them.
  template <typename T>
  FrozenMatrix(std::shared_ptr<const T> values, Index rows, Index cols)
      : rows_(rows), cols_(cols), values_(std::move(values)) {
    check_size();
  }

  /// Rows: of a linear layer, what goes out.
  Index rows() const { return rows_; }
  /// Columns: of a linear layer, what comes in.
  Index cols() const { return cols_; }
  /// Rows times columns.
  Index size() const { return rows_ * cols_; }

  /// Calls f with a view of the values in the type that they have.
  template <typename F>
  decltype(auto) visit(F&& f) const {
    return std::visit(
        [&]<typename T>(const std::shared_ptr<const T>& values) -> decltype(auto) {
          if (values == nullptr && size() != 0) detail::throw_invalid({"FrozenMatrix: has no values yet"});
          return f(StridedView<const T>{values.get(), rows_, cols_, cols_, 1});
        },
        values_);
  }

  /// Bytes of the values, and of their packed copy.
  std::size_t memory_bytes() const {
    const std::size_t packed = packed_ == nullptr ? 0 : detail::packed_weight_bytes(rows_, cols_);
    return packed +
           visit([&]<typename T>(const StridedView<const T>&) { return static_cast<std::size_t>(size()) * sizeof(T); });
  }

  /// Makes the packed copy, if the values are of bfloat16 and the target multiplies pairs of it; else, or if it is there,
  /// does nothing. Not to be called while others read the matrix. Throws std::invalid_argument without values,
  /// std::bad_alloc.
  void pack() {
    visit([&]<typename T>(const StridedView<const T>& view) {
      if constexpr (std::is_same_v<T, Eigen::bfloat16>) {
        if (packed_ == nullptr) packed_ = detail::packed_weight(view);
      }
    });
  }
  /// The packed copy, or null.
  const simd::Pair* packed() const { return packed_.get(); }

  /// Row `row`, converted.
  template <typename Scalar>
  void copy_row(Index row, Scalar* to) const {
    visit([&](const auto& view) {
      for (Index c = 0; c < cols_; ++c) to[c] = static_cast<Scalar>(view(row, c));
    });
  }

  /// A copy, in Scalar.
  template <typename Scalar>
  Matrix<Scalar> to_matrix() const {
    Matrix<Scalar> result(rows_, cols_);
    for (Index row = 0; row < rows_; ++row) copy_row(row, result.data() + row * cols_);
    return result;
  }

 private:
  template <typename T>
  using Values = std::shared_ptr<const T>;

  void check_size() const { detail::checked_product("FrozenMatrix", "its size", {rows_, cols_}); }

  Index rows_;
  Index cols_;
  std::variant<Values<float>, Values<double>, Values<Eigen::bfloat16>, Values<Eigen::half>> values_;
  std::shared_ptr<const simd::Pair> packed_;
};

}  // namespace diffattn::inline v0_1
