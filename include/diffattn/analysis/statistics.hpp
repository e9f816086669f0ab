#pragma once

// What an attention map says, in one number a row: how spread out a query's attention is, how much of it is negative,
// and how much of it goes to the keys that matter.
//
//   row_entropy         in nats: 0 on one key, log n spread evenly over n
//   effective_support   exp of it: how many keys that is
//   negative_mass       what a differential map takes away
//   attention_share     what some queries give to some keys
//
// Maps     (n_q x n_k), a query a row: any dense expression of float, double or long double, such as a block of a map
//          or p1 − λ·p2. P = softmax(…) has rows that sum to 1; a differential map P1 − λ·P2 has signed ones that sum
//          to 1 − λ; a query that sees no key has a row of zeros. Nothing is assumed of a row.
// NaN      in a row makes that row's number NaN.
// Memory   a value a row; an expression without memory of its own is evaluated once, any other map is read in place.
// Cost     O(n_q·n_k), and a logarithm for every weight where there is an entropy. Sums are in double or wider.

#include <cmath>
#include <concepts>
#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// f(row, number of the row) for every row of a map, as a view: a vector of what it returns.
template <typename Map, typename F>
Vector<typename Map::Scalar> for_each_map_row(const Eigen::DenseBase<Map>& map, F&& f) {
  using Scalar = typename Map::Scalar;
  static_assert(std::is_floating_point_v<Scalar>, "diffattn: a map is a matrix of float, double or long double");
  const Readable<Map> map_read(map.derived());
  const StridedView<const Scalar> view = view_of(map_read);
  Vector<Scalar> values(view.rows);
  for (Index i = 0; i < view.rows; ++i) values(i) = static_cast<Scalar>(f(view.middle_rows(i, 1)));
  return values;
}

/// The entropy in nats of |a| / Σ|a| for a row a, and whether there is anything in it.
template <typename Scalar>
struct RowEntropy {
  using Wide = std::common_type_t<Scalar, double>;

  explicit RowEntropy(const StridedView<const Scalar>& row) {
    Wide largest = 0;
    for (Index j = 0; j < row.cols; ++j) {
      const Wide weight = std::abs(static_cast<Wide>(row(0, j)));
      if (weight > largest || std::isnan(weight)) largest = weight;
    }
    is_zero = largest == 0;
    if (is_zero) return;
    // With p = |a| / max|a| the entropy is log Σp − Σ p·log p / Σp: nothing overflows, and both terms are 0 or more.
    Wide sum = 0, moment = 0;
    for (Index j = 0; j < row.cols; ++j) {
      const Wide p = std::abs(static_cast<Wide>(row(0, j))) / largest;
      sum += p;
      if (p != 0) moment -= p * std::log(p);
    }
    nats = std::log(sum) + moment / sum;
  }

  Wide nats = 0;
  bool is_zero = false;
};

/// The value, once it is known to be a row or column of a map that has `count` of them.
template <std::integral Integer>
Index checked_place(const char* what, const char* of_which, Integer value, Index count) {
  const auto place = static_cast<Index>(value);
  if (place < 0 || place >= count) {
    throw_invalid({"attention_share: ", what, " ", place, " is out of range: the map has ", count, " ", of_which});
  }
  return place;
}

}  // namespace detail

/// The entropy of every row, in nats: −Σ p·log p, with 0·log 0 = 0. A row a that is no distribution, such as one of a
/// differential map, has that of p = |a| / Σ|a|; one of zeros has 0. n_q values; NaN for a row with NaN or infinity.
template <typename Map>
Vector<typename Map::Scalar> row_entropy(const Eigen::DenseBase<Map>& map) {
  using Scalar = typename Map::Scalar;
  return detail::for_each_map_row(map, [](const auto& row) { return detail::RowEntropy<Scalar>(row).nats; });
}

/// How many keys every row attends to: exp of row_entropy, from 1 for all weight on one key to n for equal weights, or
/// weights of equal size, on n. A row of zeros attends to none and has 0. n_q values.
template <typename Map>
Vector<typename Map::Scalar> effective_support(const Eigen::DenseBase<Map>& map) {
  using Scalar = typename Map::Scalar;
  using Wide = std::common_type_t<Scalar, double>;
  return detail::for_each_map_row(map, [](const auto& row) {
    const detail::RowEntropy<Scalar> entropy(row);
    return entropy.is_zero ? Wide(0) : std::exp(entropy.nats);
  });
}

/// Σ max(−a, 0) of every row a, in the units of the map: 0 for a softmax; at most λ for P1 − λ·P2, whose positive
/// weights then sum to 1 − λ plus this. Not divided by anything. n_q values, 0 or more.
template <typename Map>
Vector<typename Map::Scalar> negative_mass(const Eigen::DenseBase<Map>& map) {
  using Wide = std::common_type_t<typename Map::Scalar, double>;
  return detail::for_each_map_row(map, [](const auto& row) {
    Wide mass = 0;
    for (Index j = 0; j < row.cols; ++j) {
      const auto weight = static_cast<Wide>(row(0, j));
      if (weight < 0 || std::isnan(weight)) mass -= weight;
    }
    return mass;
  });
}

/// The weight that the queries of `query_rows` give to the keys of `key_columns`: the sum over those columns, a mean
/// over those rows. Of a softmax, whose rows sum to 1, it is the share of all attention, from 0 to 1. The weights of a
/// differential map count with their signs and are not divided by anything: all columns together have 1 − λ.
///
/// Rows and columns are ranges of integers, also in braces: attention_share(map, {3, 5}, {0}). A row that is named
/// twice counts twice. Throws std::invalid_argument for a row or column that the map does not have, for one column
/// named twice, and for no rows at all; no columns have 0.
template <typename Map, typename Rows = std::initializer_list<Index>, typename Columns = std::initializer_list<Index>>
typename Map::Scalar attention_share(const Eigen::DenseBase<Map>& map, const Rows& query_rows,
                                     const Columns& key_columns) {
  using Scalar = typename Map::Scalar;
  using Wide = std::common_type_t<Scalar, double>;
  static_assert(std::is_floating_point_v<Scalar>, "diffattn: a map is a matrix of float, double or long double");
  std::vector<Index> columns;
  std::vector<bool> named(static_cast<std::size_t>(map.cols()));
  for (const auto key : key_columns) {
    const Index column = detail::checked_place("key column", "columns", key, map.cols());
    const auto at = static_cast<std::size_t>(column);
    if (named[at]) detail::throw_invalid({"attention_share: key column ", column, " is named twice"});
    named[at] = true;
    columns.push_back(column);
  }
  for (const auto query : query_rows) detail::checked_place("query row", "rows", query, map.rows());
  if (std::begin(query_rows) == std::end(query_rows)) {
    detail::throw_invalid({"attention_share: there are no query rows, and no mean over them"});
  }

  const detail::Readable<Map> map_read(map.derived());
  const StridedView<const Scalar> view = detail::view_of(map_read);
  Wide sum = 0, rows = 0;
  for (const auto query : query_rows) {
    for (const Index column : columns) sum += static_cast<Wide>(view(static_cast<Index>(query), column));
    ++rows;
  }
  return static_cast<Scalar>(sum / rows);
}

}  // namespace diffattn::inline v0_1
