#pragma once

// Rotary position embedding (Su et al., arXiv 2104.09864), as the official kernel/rotary.py and Hugging Face apply it:
// pair i of a head, at position p, turns by the angle p · base^(−2i/dim).
//
//   interleaved   pairs (2i, 2i + 1)         the official code
//   half          pairs (i, i + dim/2)       Hugging Face's rotate_half
//
// Models that are to read further than they were trained change the frequencies f_i = base^(−2i/dim) as Hugging Face
// names it:
//
//   linear    f_i / factor
//   dynamic   a sequence of n > context tokens has base · (factor · n / context − factor + 1)^(dim / (dim − 2))
//   llama3    waves longer than context / low_freq_factor have f_i / factor, those shorter than
//             context / high_freq_factor have f_i, and those between a mean of the two, linear in context / wavelength
//
// With `dynamic` the angles depend on the length of the sequence as of the call: keys that were turned in an earlier
// call keep their angles, as they do in Hugging Face's cache.
//
// Only the first `dim` columns of a head turn, the rest passes through. Angles are computed in double; the first
// `table_positions` positions are tabulated at construction, later ones are computed when they come.

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

enum class RotaryPairing { interleaved, half };

/// A rotation, or its inverse: which is its transpose, and so turns gradients.
enum class Turn { forward, back };

struct RotaryScaling {
  enum class Kind { none, linear, dynamic, llama3 };

  Kind kind = Kind::none;
  double factor = 1;            ///< how much further than `context`
  double context = 0;           ///< tokens that the model was trained on: dynamic and llama3
  double low_freq_factor = 1;   ///< llama3
  double high_freq_factor = 4;  ///< llama3
};

struct RotaryConfig {
  double base = 10000;
  RotaryPairing pairing = RotaryPairing::interleaved;
  Index dim = 0;  ///< columns of a head that turn; 0 = all
  Index table_positions = 4096;
  RotaryScaling scaling{};
};

template <typename Scalar>
class Rotary {
 public:
  /// Throws std::invalid_argument unless dim is even, at least 2 and at most head_dim, base is positive and the scaling
  /// is one.
  Rotary(const RotaryConfig& config, Index head_dim)
      : pairing_(config.pairing),
        head_dim_(head_dim),
        pairs_((config.dim == 0 ? head_dim : config.dim) / 2),
        base_(config.base),
        scaling_(config.scaling) {
    const Index dim = config.dim == 0 ? head_dim : config.dim;
    if (dim < 2 || dim % 2 != 0 || dim > head_dim) {
      detail::throw_invalid({"Rotary: dim must be even and between 2 and the head_dim ", head_dim, ", got ", dim});
    }
    if (!(config.base > 0))
      detail::throw_invalid({"Rotary: base must be positive, got ", std::to_string(config.base).c_str()});
    check_scaling(dim);
    for (Index i = 0; i < pairs_; ++i) frequencies_.push_back(scaled(power(base_, i)));
    table_.resize(std::max<Index>(config.table_positions, 0), 2 * pairs_);
    for (Index position = 0; position < table_.rows(); ++position) {
      for (Index i = 0; i < pairs_; ++i) {
        const double angle = static_cast<double>(position) * frequencies_[static_cast<std::size_t>(i)];
        table_(position, i) = static_cast<Scalar>(std::cos(angle));
        table_(position, pairs_ + i) = static_cast<Scalar>(std::sin(angle));
      }
    }
  }

  /// Turns `heads` heads in every row of x (rows x at least heads·head_dim, contiguous rows) in place. Row i stands at
  /// position first_position + i. Only dynamic scaling asks how many tokens the whole sequence has: as many as to the
  /// last row, or `sequence` if that is more. With Turn::back, the gradient of the result becomes the gradient of x.
  void apply(const detail::StridedView<Scalar>& x, Index heads, Index first_position = 0, Index sequence = 0,
             Turn turn = Turn::forward) const {
    const double base = dynamic_base(std::max(sequence, first_position + x.rows));
    const Scalar sign = turn == Turn::forward ? Scalar(1) : Scalar(-1);
    for (Index row = 0; row < x.rows; ++row) {
      const Index position = first_position + row;
      if (position < table_.rows() && base == base_) {
        const Scalar* const cos = table_.data() + position * table_.cols();
        const Scalar* const sin = cos + pairs_;
        for (Index head = 0; head < heads; ++head) {
          for (Index i = 0; i < pairs_; ++i) turn_pair(&x(row, head * head_dim_), i, cos[i], sign * sin[i]);
        }
      } else {
        for (Index i = 0; i < pairs_; ++i) {
          const double frequency = base == base_ ? frequencies_[static_cast<std::size_t>(i)] : power(base, i);
          const double angle = static_cast<double>(position) * frequency;
          const auto cos = static_cast<Scalar>(std::cos(angle)), sin = static_cast<Scalar>(std::sin(angle));
          for (Index head = 0; head < heads; ++head) turn_pair(&x(row, head * head_dim_), i, cos, sign * sin);
        }
      }
    }
  }

 private:
  using Kind = RotaryScaling::Kind;

  void check_scaling(Index dim) const {
    if (scaling_.kind == Kind::none) return;
    check_number("factor", scaling_.factor, scaling_.factor >= 1, "at least 1");
    if (scaling_.kind == Kind::linear) return;
    check_number("context", scaling_.context, scaling_.context >= 1, "at least 1");
    if (scaling_.kind == Kind::dynamic) {
      if (dim == 2) detail::throw_invalid({"Rotary: dynamic scaling needs a dim of at least 4, got 2"});
      return;
    }
    check_number("low_freq_factor", scaling_.low_freq_factor, scaling_.low_freq_factor > 0, "positive");
    check_number("high_freq_factor", scaling_.high_freq_factor, scaling_.high_freq_factor > scaling_.low_freq_factor,
                 "more than low_freq_factor");
  }

  static void check_number(const char* field, double value, bool holds, const char* rule) {
    if (!holds || !std::isfinite(value)) {
      detail::throw_invalid({"Rotary: scaling.", field, " must be ", rule, ", got ", std::to_string(value).c_str()});
    }
  }

  double power(double base, Index pair) const {
    return std::pow(base, -2.0 * static_cast<double>(pair) / static_cast<double>(2 * pairs_));
  }

  double scaled(double frequency) const {
    if (scaling_.kind == Kind::linear) return frequency / scaling_.factor;
    if (scaling_.kind != Kind::llama3) return frequency;
    const double waves = scaling_.context * frequency / (2 * std::numbers::pi);  // that fit into the context
    const double low = scaling_.low_freq_factor, high = scaling_.high_freq_factor;
    if (waves < low) return frequency / scaling_.factor;
    if (waves > high) return frequency;
    const double smooth = (waves - low) / (high - low);
    return (1 - smooth) * frequency / scaling_.factor + smooth * frequency;
  }

  double dynamic_base(Index sequence) const {
    const auto tokens = static_cast<double>(sequence), dim = static_cast<double>(2 * pairs_);
    if (scaling_.kind != Kind::dynamic || tokens <= scaling_.context) return base_;
    return base_ * std::pow(scaling_.factor * tokens / scaling_.context - (scaling_.factor - 1), dim / (dim - 2));
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
  double base_;
  RotaryScaling scaling_;
  std::vector<double> frequencies_;  // one a pair
  Matrix<Scalar> table_;             // position x (cos of every pair, sin of every pair)
};

}  // namespace diffattn::inline v0_1
