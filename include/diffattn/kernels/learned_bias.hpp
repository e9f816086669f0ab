#pragma once

// Biases that are learned: each pair of query and key reads an entry of a table, which has a row for every query head.
//
//   with_bias(mask, RelativeBias(table))                 an entry for each key − query, as far as the table reaches
//   with_bias(mask, IndexedBias(table, column))          column(query, key, n_q, n_k) says which entry
//
// The second makes buckets of T5 (Raffel et al., arXiv 1910.10683) and windows of images (Swin, Liu et al.,
// arXiv 2103.14030) of the same table. Scores have the bias added behind their scale, in a differential head those of
// both maps. An entry of -inf masks.
//
// Gradient   dtable(h, c) = Σ dS(query, key) over the pairs of head h that read column c; dS1 + dS2 in a differential
//            head. The backward kernels return it as .dbias where the mask has a learned bias (gradients.hpp), the
//            layers add it to a matrix of yours: layer.backward(dy, tape, grad, dbias). The same bits for any number of
//            threads; it is added up in double. A mask has at most one learned bias that gradients are asked of.
//            What is nested with it, and joined by both(), stays as it is.
// Table      a Matrix, Map, Ref or Block of float or double, read in place: it must outlive the mask and, where a tape
//            keeps the mask, the backward pass; and it must not be resized meanwhile. A temporary Matrix is refused.
// Errors     ShapeError for a table of another number of rows than there are query heads, before any work.

#include <algorithm>
#include <type_traits>
#include <utility>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/simd.hpp"
#include "diffattn/kernels/bias_row.hpp"

namespace diffattn::inline v0_1 {

/// A bias with a table and its gradient: add_gradient() adds the gradients of a row of scores to the table's row of the
/// head.
template <typename Bias>
concept LearnedBias = requires(const Bias& bias, double* dtable, const double* dscores, const BiasRow& of) {
  bias.table_rows();
  bias.table_cols();
  bias.add_gradient(dtable, dscores, of);
};

namespace detail {

/// How many learned biases a mask has.
template <typename Mask>
constexpr int count_learned_biases() {
  if constexpr (requires { Mask::kLearnedBiases; }) {
    return Mask::kLearnedBiases;
  } else {
    return 0;
  }
}

/// Whether a mask has a learned bias: mask.learned_bias().
template <typename Mask>
concept HasLearnedBias = count_learned_biases<Mask>()
== 1;

}  // namespace detail

/// Whether a mask has a learned bias, of which backward then gives the gradient.
template <typename Mask>
inline constexpr bool has_learned_bias = detail::HasLearnedBias<Mask>;

namespace detail {

/// Throws ShapeError unless a table has a row for every head.
inline void check_bias_table(const char* where, const char* bias, Index num_heads, Index rows, Index cols) {
  if (rows == num_heads) return;
  throw_shape({where, ": the table of ", bias, " must have ", num_heads, " rows, one for every head, got ", rows, " x ",
               cols, cols == num_heads ? "; did you mean table.transpose()?" : ""});
}

inline double sum_of(const double* values, Index count) {
  constexpr Index kLanes = simd::kLanes<double>;
  simd::Packet<double> sums[4];
  for (auto& sum : sums) sum = simd::broadcast(0.0);
  Index i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (Index p = 0; p < 4; ++p) sums[p] = simd::add(sums[p], simd::loadu(values + i + p * kLanes));
  }
  double sum = simd::reduce_add(simd::add(simd::add(sums[0], sums[1]), simd::add(sums[2], sums[3])));
  for (; i < count; ++i) sum += values[i];
  return sum;
}

inline void add_to(double* to, const double* values, Index count) {
  constexpr Index kLanes = simd::kLanes<double>;
  Index i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    simd::storeu(to + i, simd::add(simd::loadu(to + i), simd::loadu(values + i)));
  }
  for (; i < count; ++i) to[i] += values[i];
}

}  // namespace detail

/// A bias for each distance of key and query. table: H x (2·reach + 1), one row for each query head; the pair of query
/// i and key j reads the column of j − p, p = i + n_k − n_q being the query's own position, clamped to
/// [−reach, reach]. So decoding behind a cache reads what the whole sequence would. Throws ShapeError for an even
/// number of columns.
template <typename Scalar>
class RelativeBias {
 public:
  template <typename Derived>
  explicit RelativeBias(const Eigen::DenseBase<Derived>& table) : table_(detail::view_of(table)) {
    if (table_.cols % 2 == 1) return;
    detail::throw_shape({"RelativeBias: the table must have 2·reach + 1 columns, an odd number, got ", table_.rows,
                         " x ", table_.cols, table_.rows % 2 == 1 ? "; did you mean table.transpose()?" : ""});
  }
  /// Would be gone before it is read: give the table a name.
  template <typename Derived>
  explicit RelativeBias(const Eigen::PlainObjectBase<Derived>&& temporary) = delete;

  /// The largest distance that has an entry of its own.
  Index reach() const { return table_.cols / 2; }
  /// Rows of the table, and of its gradient.
  Index table_rows() const { return table_.rows; }
  /// Columns of the table, and of its gradient.
  Index table_cols() const { return table_.cols; }

  /// The column of the table that a pair reads.
  Index column(Index query, Index key, Index n_q, Index n_k) const {
    return std::clamp<Index>(key - (query - n_q + n_k) + reach(), 0, table_.cols - 1);
  }

  Scalar operator()(Index head, Index query, Index key, Index n_q, Index n_k) const {
    return table_(head, column(query, key, n_q, n_k));
  }

  /// The biases of a row of keys (bias_row.hpp).
  template <typename T>
  void fill(T* row, const BiasRow& of) const {
    const Run run = run_of(of);
    std::fill_n(row, run.begin, detail::converted_bias<T>(table_(of.head, 0)));
    detail::convert_biases(row + run.begin, table_.block(of.head, run.column, 1, run.end - run.begin));
    std::fill_n(row + run.end, of.count - run.end, detail::converted_bias<T>(table_(of.head, table_.cols - 1)));
  }

  /// dtable[c] += the gradients of the keys that read column c of row of.head.
  void add_gradient(double* dtable, const double* dscores, const BiasRow& of) const {
    const Run run = run_of(of);
    dtable[0] += detail::sum_of(dscores, run.begin);
    detail::add_to(dtable + run.column, dscores + run.begin, run.end - run.begin);
    dtable[table_.cols - 1] += detail::sum_of(dscores + run.end, of.count - run.end);
  }

  void check(const char* where, Index num_heads, Index /*n_q*/, Index /*n_k*/) const {
    detail::check_bias_table(where, "RelativeBias", num_heads, table_.rows, table_.cols);
  }

 private:
  /// Keys [begin, end) of a row read consecutive columns from `column` on; those before read the first of the table,
  /// those behind the last.
  struct Run {
    Index begin, end, column;
  };

  Run run_of(const BiasRow& of) const {
    const Index first = of.first_key - (of.query - of.n_q + of.n_k) + reach();  // the column, were it not clamped
    const Index begin = std::clamp<Index>(-first, 0, of.count), end = std::clamp(table_.cols - first, begin, of.count);
    return {begin, end, std::clamp<Index>(first + begin, 0, table_.cols - 1)};
  }

  StridedView<const Scalar> table_;
};

template <typename Derived>
RelativeBias(const Eigen::DenseBase<Derived>&) -> RelativeBias<typename Derived::Scalar>;

/// A bias from any table. table: H x columns, one row for each query head; the pair of query i and key j reads column
/// column(i, j, n_q, n_k), an integer from 0 on: the bucket of a distance, or the place of one patch of a window
/// relative to another. A column that the table does not have throws ShapeError when it is met. `column` is copied and
/// called for every pair and head, from several threads at once: what is expensive is best looked up.
template <typename Scalar, typename Column>
class IndexedBias {
  static_assert(std::is_invocable_r_v<Index, const Column&, Index, Index, Index, Index>,
                "diffattn: the column of an IndexedBias is called with (query, key, n_q, n_k) and returns an integer");

 public:
  template <typename Derived>
  IndexedBias(const Eigen::DenseBase<Derived>& table, Column column_of)
      : table_(detail::view_of(table)), column_(std::move(column_of)) {}
  /// Would be gone before it is read: give the table a name.
  template <typename Derived>
  IndexedBias(const Eigen::PlainObjectBase<Derived>&& temporary, Column column_of) = delete;

  /// Rows of the table, and of its gradient.
  Index table_rows() const { return table_.rows; }
  /// Columns of the table, and of its gradient.
  Index table_cols() const { return table_.cols; }

  /// The column of the table that a pair reads. Throws ShapeError if the table does not have it.
  Index column(Index query, Index key, Index n_q, Index n_k) const {
    const auto read = static_cast<Index>(column_(query, key, n_q, n_k));
    if (read < 0 || read >= table_.cols) throw_column(read, query, key);
    return read;
  }

  Scalar operator()(Index head, Index query, Index key, Index n_q, Index n_k) const {
    return table_(head, column(query, key, n_q, n_k));
  }

  /// The biases of a row of keys (bias_row.hpp).
  template <typename T>
  void fill(T* row, const BiasRow& of) const {
    const StridedView<const Scalar> entries = table_.middle_rows(of.head, 1);
    for (Index i = 0; i < of.count; ++i) {
      row[i] = detail::converted_bias<T>(entries(0, column(of.query, of.first_key + i, of.n_q, of.n_k)));
    }
  }

  /// dtable[c] += the gradients of the keys that read column c of row of.head.
  void add_gradient(double* dtable, const double* dscores, const BiasRow& of) const {
    for (Index i = 0; i < of.count; ++i) dtable[column(of.query, of.first_key + i, of.n_q, of.n_k)] += dscores[i];
  }

  void check(const char* where, Index num_heads, Index /*n_q*/, Index /*n_k*/) const {
    detail::check_bias_table(where, "IndexedBias", num_heads, table_.rows, table_.cols);
  }

 private:
  [[noreturn, gnu::cold, gnu::noinline]] void throw_column(Index read, Index query, Index key) const {
    detail::throw_shape({"IndexedBias: query ", query, " and key ", key, " were to read column ", read,
                         " of a table that has ", table_.cols});
  }

  StridedView<const Scalar> table_;
  Column column_;
};

template <typename Derived, typename Column>
IndexedBias(const Eigen::DenseBase<Derived>&, Column) -> IndexedBias<typename Derived::Scalar, Column>;

}  // namespace diffattn::inline v0_1
