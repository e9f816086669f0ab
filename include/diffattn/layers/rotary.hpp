#pragma once

// Rotary position embedding (Su et al., arXiv 2104.09864), as the official kernel/rotary.py and Hugging Face apply it:
// pair i of a head, at position p, turns by the angle p · base^(−2i/dim).
//
//   interleaved   pairs (2i, 2i + 1)         the official code
//   half          pairs (i, i + dim/2)       Hugging Face's rotate_half
//
// Only the first `dim` columns of a head turn, the rest passes through. Angles are computed in double; the first
// `table_positions` positions are tabulated at construction, later ones are computed when they come.

#include <cmath>
#include <string>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

enum class RotaryPairing { interleaved, half };

struct RotaryConfig {
  double base = 10000;
  RotaryPairing pairing = RotaryPairing::interleaved;
  Index dim = 0;  ///< columns of a head that turn; 0 = all
  Index table_positions = 4096;
};

template <typename Scalar>
class Rotary {
 public:
  /// Throws std::invalid_argument unless dim is even, at least 2 and at most head_dim, and base is positive.
  Rotary(const RotaryConfig& config, Index head_dim)
      : pairing_(config.pairing), head_dim_(head_dim), pairs_((config.dim == 0 ? head_dim : config.dim) / 2) {
    const Index dim = config.dim == 0 ? head_dim : config.dim;
    if (dim < 2 || dim % 2 != 0 || dim > head_dim) {
      detail::throw_invalid({"Rotary: dim must be even and between 2 and the head_dim ", head_dim, ", got ", dim});
    }
    if (!(config.base > 0))
      detail::throw_invalid({"Rotary: base must be positive, got ", std::to_string(config.base).c_str()});
    for (Index i = 0; i < pairs_; ++i) {
      frequencies_.push_back(std::pow(config.base, -2.0 * static_cast<double>(i) / static_cast<double>(dim)));
    }
    table_.resize(std::max<Index>(config.table_positions, 0), 2 * pairs_);
    for (Index position = 0; position < table_.rows(); ++position) {
      for (Index i = 0; i < pairs_; ++i) {
        table_(position, i) = static_cast<Scalar>(std::cos(angle(position, i)));
        table_(position, pairs_ + i) = static_cast<Scalar>(std::sin(angle(position, i)));
      }
    }
  }

  /// Turns `heads` heads in every row of x (rows x at least heads·head_dim, contiguous rows) in place. Row i stands at
  /// position first_position + i.
  void apply(const detail::StridedView<Scalar>& x, Index heads, Index first_position = 0) const {
    for (Index row = 0; row < x.rows; ++row) {
      const Index position = first_position + row;
      if (position < table_.rows()) {
        const Scalar* const cos = table_.data() + position * table_.cols();
        const Scalar* const sin = cos + pairs_;
        for (Index head = 0; head < heads; ++head) {
          for (Index i = 0; i < pairs_; ++i) turn_pair(&x(row, head * head_dim_), i, cos[i], sin[i]);
        }
      } else {
        for (Index i = 0; i < pairs_; ++i) {
          const auto cos = static_cast<Scalar>(std::cos(angle(position, i)));
          const auto sin = static_cast<Scalar>(std::sin(angle(position, i)));
          for (Index head = 0; head < heads; ++head) turn_pair(&x(row, head * head_dim_), i, cos, sin);
        }
      }
    }
  }

 private:
  double angle(Index position, Index pair) const {
    return static_cast<double>(position) * frequencies_[static_cast<std::size_t>(pair)];
  }

  void turn_pair(Scalar* head, Index i, Scalar cos, Scalar sin) const {
    const bool interleaved = pairing_ == RotaryPairing::interleaved;
    Scalar& a = head[interleaved ? 2 * i : i];
    Scalar& b = head[interleaved ? 2 * i + 1 : i + pairs_];
    const Scalar turned = a * cos - b * sin;
    b = b * cos + a * sin;
    a = turned;
  }

  RotaryPairing pairing_;
  Index head_dim_;
  Index pairs_;
  std::vector<double> frequencies_;  // one a pair
  Matrix<Scalar> table_;             // position x (cos of every pair, sin of every pair)
};

}  // namespace diffattn::inline v0_1
