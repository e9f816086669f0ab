#pragma once

// Where the rows of an attention map that ask for something put their weight.

#include <cmath>
#include <diffattn/core/matrix.hpp>

namespace example {

struct Share {
  double answer = 0;         ///< weight on the column that holds the answer
  double rest_positive = 0;  ///< sum of the positive weights on all other columns
  double rest_negative = 0;  ///< sum of the negative ones
  double entropy = 0;        ///< of |weights| / Σ|weights|, in nats: of the row itself where none is negative
};

/// Means over rows[r], whose answer stands in column answers[r].
inline Share mean_share(const diffattn::Matrix<double>& map, const diffattn::Vector<diffattn::Index>& rows,
                        const diffattn::Vector<diffattn::Index>& answers) {
  Share share;
  const double part = 1 / static_cast<double>(rows.size());
  for (diffattn::Index r = 0; r < rows.size(); ++r) {
    const double total = map.row(rows[r]).cwiseAbs().sum();
    for (diffattn::Index j = 0; j < map.cols(); ++j) {
      const double weight = map(rows[r], j), p = std::abs(weight) / total;
      double& where = j == answers[r] ? share.answer : weight > 0 ? share.rest_positive : share.rest_negative;
      where += part * weight;
      if (p > 0) share.entropy -= part * p * std::log(p);
    }
  }
  return share;
}

}  // namespace example
