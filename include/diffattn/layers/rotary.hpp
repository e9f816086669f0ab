#pragma once

// Rotary position embedding (Su et al., arXiv 2104.09864), as the official kernel/rotary.py and Hugging Face apply it:
// pair i of a head, at position p, turns by the angle p · base^(−2i/dim).
//
//   interleaved   pairs (2i, 2i + 1)         the official code
//   half          pairs (i, i + dim/2)       Hugging Face's rotate_half
//
// Models that are to read further than they were trained change the frequencies f_i = base^(−2i/dim) as Hugging Face
// names it (modeling_rope_utils.py):
//
//   linear        f_i / factor
//   dynamic       a sequence of n > context tokens has base · (factor · n / context − factor + 1)^(dim / (dim − 2))
//   llama3        waves longer than context / low_freq_factor have f_i / factor, those shorter than
//                 context / high_freq_factor have f_i, and those between a mean of the two, linear in context /
//                 wavelength
//   yarn          f_i up to the pair that turns beta_fast times in the context, f_i / factor from the one that turns
//                 beta_slow times, and between the two a mean, linear in i (Peng et al., arXiv 2309.00071)
//   longrope      f_i / short_factors[i], and in a sequence of more than context tokens f_i / long_factors[i]
//                 (Ding et al., arXiv 2402.13753)
//   proportional  f_i / factor for the first floor(proportion · dim / 2) pairs, the others do not turn
//
// yarn and longrope also multiply every turned head by attention_factor, so that scores grow by its square.
//
// With `dynamic` and `longrope` the angles depend on the length of the sequence as of the call: keys that were turned
// in an earlier call keep their angles, as they do in Hugging Face's cache.
//
// Only the first `dim` columns of a head turn, the rest passes through. Angles are computed in double; the first
// `table_positions` positions are tabulated at construction, later ones are computed when they come.

#include <algorithm>
#include <cmath>
#include <numbers>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

enum class RotaryPairing { interleaved, half };

/// A rotation, or its transpose, which turns gradients: the inverse but for attention_factor.
enum class Turn { forward, back };

struct RotaryScaling {
  enum class Kind { none, linear, dynamic, llama3, yarn, longrope, proportional };

  Kind kind = Kind::none;
  double factor = 1;            ///< how much further than `context`
  double context = 0;           ///< tokens that the model was trained on: all but linear and proportional
  double low_freq_factor = 1;   ///< llama3
  double high_freq_factor = 4;  ///< llama3
  double beta_fast = 32;        ///< yarn
  double beta_slow = 1;         ///< yarn
  bool truncate = true;         ///< yarn: the two pairs are rounded to whole ones, outwards
  /// yarn and longrope; left out, what their papers advise: 0.1 · ln(factor) + 1 and √(1 + ln(factor) / ln(context)),
  /// and 1 for a factor up to 1.
  std::optional<double> attention_factor{};
  std::vector<double> short_factors{};  ///< longrope: dim / 2
  std::vector<double> long_factors{};   ///< longrope: dim / 2
  double proportion = 1;                ///< proportional: 0 to 1
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
  /// has numbers that its kind can be computed with.
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
    attention_factor_ = attention_factor();
    const bool longrope = scaling_.kind == Kind::longrope;
    fill(usual_, frequencies(longrope ? &scaling_.short_factors : nullptr), config.table_positions);
    if (longrope) fill(long_, frequencies(&scaling_.long_factors), config.table_positions);
  }

  /// Turns `heads` heads in every row of x (rows x at least heads·head_dim, the columns of a row one after another in
  /// memory) in place. Row i stands at position first_position + i. Only dynamic and longrope ask how many tokens the
  /// whole sequence has: as many as to the last row, or `sequence` if that is more. With Turn::back, the gradient of
  /// the result becomes that of x. Throws ShapeError.
  template <typename X>
  void apply(const Eigen::MatrixBase<X>& x, Index heads, Index first_position = 0, Index sequence = 0,
             Turn turn = Turn::forward) const {
    const StridedView<Scalar> view = detail::writable_view_of(x);
    if (view.cols < heads * head_dim_) {
      detail::throw_shape({"Rotary: x must have ", heads, " heads of ", head_dim_, " columns, got ", view.cols});
    }
    if (view.col_stride != 1 && view.cols > 1) {
      detail::throw_shape({"Rotary: the columns of a row of x must lie one after another (row-major), got a stride of ",
                           view.col_stride});
    }
    apply(view, heads, first_position, sequence, turn);
  }

  /// The same for a view, unchecked.
  void apply(const StridedView<Scalar>& x, Index heads, Index first_position = 0, Index sequence = 0,
             Turn turn = Turn::forward) const {
    sequence = std::max(sequence, first_position + x.rows);
    const double base = dynamic_base(sequence);
    const bool beyond = scaling_.kind == Kind::longrope && static_cast<double>(sequence) > scaling_.context;
    const Angles& angles = beyond ? long_ : usual_;
    const Scalar sign = turn == Turn::forward ? Scalar(1) : Scalar(-1);
    for (Index row = 0; row < x.rows; ++row) {
      const Index position = first_position + row;
      if (position < angles.table.rows() && base == base_) {
        const Scalar* const cos = angles.table.data() + position * angles.table.cols();
        const Scalar* const sin = cos + pairs_;
        for (Index head = 0; head < heads; ++head) {
          for (Index i = 0; i < pairs_; ++i) turn_pair(&x(row, head * head_dim_), i, cos[i], sign * sin[i]);
        }
      } else {
        for (Index i = 0; i < pairs_; ++i) {
          const double frequency = base == base_ ? angles.frequencies[static_cast<std::size_t>(i)] : power(base, i);
          const double angle = static_cast<double>(position) * frequency;
          const auto cos = scaled(std::cos(angle)), sin = scaled(std::sin(angle));
          for (Index head = 0; head < heads; ++head) turn_pair(&x(row, head * head_dim_), i, cos, sign * sin);
        }
      }
    }
  }

 private:
  using Kind = RotaryScaling::Kind;

  struct Angles {
    std::vector<double> frequencies;  // one a pair
    Matrix<Scalar> table;             // position x (cos of every pair, sin of every pair)
  };

  void check_scaling(Index dim) const {
    const RotaryScaling& s = scaling_;
    if (s.kind == Kind::none) return;
    check_number("factor", s.factor, s.factor > 0, "positive");
    if (s.kind == Kind::linear) return;
    if (s.kind == Kind::proportional) {
      check_number("proportion", s.proportion, s.proportion >= 0 && s.proportion <= 1, "from 0 to 1");
      return;
    }
    check_number("context", s.context, s.context >= 1, "at least 1");
    if (s.kind == Kind::dynamic && dim == 2) {
      detail::throw_invalid({"Rotary: dynamic scaling needs a dim of at least 4, got 2"});
    } else if (s.kind == Kind::llama3) {
      check_number("low_freq_factor", s.low_freq_factor, s.low_freq_factor > 0, "positive");
      check_number("high_freq_factor", s.high_freq_factor, s.high_freq_factor > 0, "positive");
    } else if (s.kind == Kind::yarn) {
      check_number("beta_fast", s.beta_fast, s.beta_fast > 0, "positive");
      check_number("beta_slow", s.beta_slow, s.beta_slow > 0, "positive");
      if (base_ == 1) detail::throw_invalid({"Rotary: yarn scaling needs a base other than 1"});
    } else if (s.kind == Kind::longrope) {
      check_factors("short_factors", s.short_factors);
      check_factors("long_factors", s.long_factors);
    }
    check_number("attention_factor", attention_factor(), true, "a number");
  }

  static void check_number(const char* field, double value, bool holds, const char* rule) {
    if (!holds || !std::isfinite(value)) {
      detail::throw_invalid({"Rotary: scaling.", field, " must be ", rule, ", got ", std::to_string(value).c_str()});
    }
  }
  void check_factors(const char* field, const std::vector<double>& factors) const {
    if (static_cast<Index>(factors.size()) != pairs_) {
      detail::throw_invalid(
          {"Rotary: scaling.", field, " must be one a pair, ", pairs_, ", got ", static_cast<Index>(factors.size())});
    }
    for (const double factor : factors) check_number(field, factor, factor > 0, "positive");
  }

  double power(double base, Index pair) const {
    return std::pow(base, -2.0 * static_cast<double>(pair) / static_cast<double>(2 * pairs_));
  }

  /// What the kind makes of every pair's frequency; `divisors`, if any, one a pair.
  std::vector<double> frequencies(const std::vector<double>* divisors) const {
    std::vector<double> result;
    for (Index i = 0; i < pairs_; ++i) {
      const double plain = power(base_, i);
      result.push_back(divisors != nullptr ? plain / (*divisors)[static_cast<std::size_t>(i)] : scaled(plain, i));
    }
    return result;
  }

  void fill(Angles& angles, std::vector<double> frequencies, Index positions) const {
    angles.frequencies = std::move(frequencies);
    angles.table.resize(std::max<Index>(positions, 0), 2 * pairs_);
    for (Index position = 0; position < angles.table.rows(); ++position) {
      for (Index i = 0; i < pairs_; ++i) {
        const double angle = static_cast<double>(position) * angles.frequencies[static_cast<std::size_t>(i)];
        angles.table(position, i) = scaled(std::cos(angle));
        angles.table(position, pairs_ + i) = scaled(std::sin(angle));
      }
    }
  }

  double scaled(double frequency, Index pair) const {
    const RotaryScaling& s = scaling_;
    switch (s.kind) {
      case Kind::linear:
        return frequency / s.factor;
      case Kind::llama3: {
        const double waves = s.context * frequency / (2 * std::numbers::pi);  // that fit into the context
        if (waves < s.low_freq_factor) return frequency / s.factor;
        if (waves >= s.high_freq_factor) return frequency;
        return mean(frequency, (waves - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor));
      }
      case Kind::yarn: {
        const double last = static_cast<double>(2 * pairs_ - 1);
        const double fast = pair_turning(s.beta_fast), slow = pair_turning(s.beta_slow);
        const double from = std::max(s.truncate ? std::floor(fast) : fast, 0.0);
        const double to = std::min(s.truncate ? std::ceil(slow) : slow, last);
        const double ramp = (static_cast<double>(pair) - from) / (from == to ? 0.001 : to - from);
        return mean(frequency, 1 - std::clamp(ramp, 0.0, 1.0));
      }
      case Kind::proportional:
        return pair < static_cast<Index>(std::floor(s.proportion * static_cast<double>(2 * pairs_) / 2))
                   ? frequency / s.factor
                   : 0;
      default:
        return frequency;
    }
  }

  /// `weight` of the frequency and the rest of it divided by the factor.
  double mean(double frequency, double weight) const {
    return (1 - weight) * frequency / scaling_.factor + weight * frequency;
  }

  /// Which pair, in fractions of one, turns `times` in the context.
  double pair_turning(double times) const {
    return static_cast<double>(2 * pairs_) * std::log(scaling_.context / (times * 2 * std::numbers::pi)) /
           (2 * std::log(base_));
  }

  double attention_factor() const {
    const RotaryScaling& s = scaling_;
    if (s.kind != Kind::yarn && s.kind != Kind::longrope) return 1;
    if (s.attention_factor) return *s.attention_factor;
    if (s.factor <= 1) return 1;
    return s.kind == Kind::yarn ? 0.1 * std::log(s.factor) + 1
                                : std::sqrt(1 + std::log(s.factor) / std::log(s.context));
  }

  Scalar scaled(double cos_or_sin) const { return static_cast<Scalar>(cos_or_sin * attention_factor_); }

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
  double attention_factor_ = 1;
  Angles usual_, long_;  // long_: longrope's beyond the context
};

}  // namespace diffattn::inline v0_1
