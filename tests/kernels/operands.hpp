#pragma once

// The operands of one call, and the kernels under test behind one call operator: a test written for a Kernel runs for
// attention and for diff_attention, λ a scalar or one for every row.

#include <limits>
#include <string>

#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "kernels/masks.hpp"
#include "support/random.hpp"

namespace support {

using diffattn::AttentionOptions;
using diffattn::Matrix;
using diffattn::Vector;
using Exact = long double;

template <typename Scalar>
inline constexpr Scalar kNaN = std::numeric_limits<Scalar>::quiet_NaN();
template <typename Scalar>
inline constexpr Scalar kInf = std::numeric_limits<Scalar>::infinity();

struct Shape {
  Index n_q, n_k, d, dv;
};

inline std::string describe(const Shape& shape) {
  return "n_q " + std::to_string(shape.n_q) + ", n_k " + std::to_string(shape.n_k) + ", d " + std::to_string(shape.d) +
         ", dv " + std::to_string(shape.dv);
}

template <typename Scalar>
struct Operands {
  Matrix<Scalar> q1, k1, q2, k2, v;
  Vector<Scalar> lambda;  // one for every query

  Index n_q() const { return q1.rows(); }
  Index n_k() const { return k1.rows(); }
};

/// Everything N(0, 1): scores have that scale too, and the largest of a few hundred is about 4.
template <typename Scalar>
Operands<Scalar> random_operands(const Shape& shape, Rng& rng) {
  return {random_matrix<Scalar>(shape.n_q, shape.d, rng),  random_matrix<Scalar>(shape.n_k, shape.d, rng),
          random_matrix<Scalar>(shape.n_q, shape.d, rng),  random_matrix<Scalar>(shape.n_k, shape.d, rng),
          random_matrix<Scalar>(shape.n_k, shape.dv, rng), random_matrix<Scalar>(shape.n_q, 1, rng)};
}

struct Attention {
  static constexpr bool kDifferential = false;

  template <typename Scalar>
  Vector<Exact> lambda(const Operands<Scalar>& x) const {
    return Vector<Exact>::Zero(x.n_q());
  }

  template <typename Scalar, typename Mask = diffattn::FullMask>
  Matrix<Scalar> operator()(const Operands<Scalar>& x, const Mask& mask = {},
                            const AttentionOptions& options = {}) const {
    return diffattn::attention(x.q1, x.k1, x.v, erase<Scalar>(mask), options);
  }

  template <typename Out, typename Scalar, typename Mask, typename E = diffattn::Serial>
  void into(const Out& out, const Operands<Scalar>& x, const Mask& mask, diffattn::Workspace& workspace,
            E&& executor = {}) const {
    diffattn::attention_into(out, x.q1, x.k1, x.v, erase<Scalar>(mask), AttentionOptions{}, workspace, executor);
  }
};

struct DiffAttention {
  static constexpr bool kDifferential = true;
  double value = 0.75;

  template <typename Scalar>
  Vector<Exact> lambda(const Operands<Scalar>& x) const {
    return Vector<Exact>::Constant(x.n_q(), static_cast<Exact>(value));
  }

  template <typename Scalar, typename Mask = diffattn::FullMask>
  Matrix<Scalar> operator()(const Operands<Scalar>& x, const Mask& mask = {},
                            const AttentionOptions& options = {}) const {
    return diffattn::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, value, erase<Scalar>(mask), options);
  }

  template <typename Out, typename Scalar, typename Mask, typename E = diffattn::Serial>
  void into(const Out& out, const Operands<Scalar>& x, const Mask& mask, diffattn::Workspace& workspace,
            E&& executor = {}) const {
    diffattn::diff_attention_into(out, x.q1, x.k1, x.q2, x.k2, x.v, value, erase<Scalar>(mask), AttentionOptions{},
                                  workspace, executor);
  }
};

struct DiffAttentionPerRow {
  static constexpr bool kDifferential = true;

  template <typename Scalar>
  Vector<Exact> lambda(const Operands<Scalar>& x) const {
    return x.lambda.template cast<Exact>();
  }

  template <typename Scalar, typename Mask = diffattn::FullMask>
  Matrix<Scalar> operator()(const Operands<Scalar>& x, const Mask& mask = {},
                            const AttentionOptions& options = {}) const {
    return diffattn::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, x.lambda, erase<Scalar>(mask), options);
  }

  template <typename Out, typename Scalar, typename Mask, typename E = diffattn::Serial>
  void into(const Out& out, const Operands<Scalar>& x, const Mask& mask, diffattn::Workspace& workspace,
            E&& executor = {}) const {
    diffattn::diff_attention_into(out, x.q1, x.k1, x.q2, x.k2, x.v, x.lambda, erase<Scalar>(mask), AttentionOptions{},
                                  workspace, executor);
  }
};

}  // namespace support
