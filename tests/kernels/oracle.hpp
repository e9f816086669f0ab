#pragma once

// What a kernel must return: reference.hpp in long double, with the mask as a dense matrix of biases that is filled in
// here from the definition of each mask, element by element, and not by the mask's own code.

#include <limits>
#include <variant>

#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/reference.hpp"
#include "kernels/operands.hpp"

namespace support {

inline constexpr Exact kHidden = -std::numeric_limits<Exact>::infinity();

/// Whether the query at position p sees key j: the definitions, written out once more.
inline bool sees(const FullMask&, Index, Index) { return true; }
inline bool sees(const CausalMask&, Index p, Index j) { return j <= p; }
inline bool sees(const SlidingWindowMask& mask, Index p, Index j) { return j <= p && p - j < mask.window; }
inline bool sees(const PrefixMask& mask, Index p, Index j) { return j <= p || j < mask.prefix; }
inline bool sees(const PaddingMask& mask, Index, Index j) { return j < mask.num_valid; }
template <typename First, typename Second>
bool sees(const diffattn::BothMasks<First, Second>& mask, Index p, Index j) {
  return sees(mask.first, p, j) && sees(mask.second, p, j);
}

/// Query i stands at position i + n_k − n_q.
inline Matrix<Exact> dense(const RangeMask& mask, Index n_q, Index n_k) {
  Matrix<Exact> bias(n_q, n_k);
  for (Index i = 0; i < n_q; ++i) {
    for (Index j = 0; j < n_k; ++j) {
      const bool visible = std::visit([&](const auto& one) { return sees(one, i + n_k - n_q, j); }, mask.any);
      bias(i, j) = visible ? 0 : kHidden;
    }
  }
  return bias;
}

template <typename Scalar>
Matrix<Exact> dense(const AnyBias<Scalar>& added, Index n_q, Index n_k, Index head = 0) {
  Matrix<Exact> bias(n_q, n_k);
  for (Index i = 0; i < n_q; ++i) {
    for (Index j = 0; j < n_k; ++j) {
      if (const auto* alibi = std::get_if<AlibiBias>(&added.any)) {
        bias(i, j) = -static_cast<Exact>(alibi->slope(head)) * static_cast<Exact>(std::abs(i + n_k - n_q - j));
      } else if (const auto* hiding = std::get_if<HidingBias>(&added.any)) {
        bias(i, j) = j < hiding->shown ? 0 : kHidden;
      } else {
        bias(i, j) = static_cast<Exact>(added(head, i, j, n_q, n_k));
      }
    }
  }
  return bias;
}

struct Expected {
  Matrix<Exact> value;
  Matrix<Exact> magnitude;  // Σ P1|V| + |λ| Σ P2|V|
};

/// The exact result for λ row by row; a bias of -inf hides a key.
template <typename Scalar>
Expected expect(const Operands<Scalar>& x, const Vector<Exact>& lambda, const Matrix<Exact>& bias,
                const AttentionOptions& options = {}) {
  const auto mask = with_bias(FullMask{}, MatrixBias(bias));
  const Matrix<Exact> v = x.v.template cast<Exact>();
  const auto one_map = [&](const Matrix<Scalar>& q, const Matrix<Scalar>& k) -> Expected {
    const Matrix<Exact> p = diffattn::reference::attention_map(q.template cast<Exact>().eval(),
                                                               k.template cast<Exact>().eval(), mask, options);
    return {diffattn::reference::apply_map(p, v, mask), diffattn::reference::apply_map(p, v.cwiseAbs(), mask)};
  };
  Expected result = one_map(x.q1, x.k1);
  if (!lambda.isZero(0)) {
    const Expected second = one_map(x.q2, x.k2);
    result.value -= lambda.asDiagonal() * second.value;
    result.magnitude += lambda.cwiseAbs().asDiagonal() * second.magnitude;
  }
  return result;
}

template <typename Scalar>
Expected expect_full(const Operands<Scalar>& x, const Vector<Exact>& lambda, const AttentionOptions& options = {}) {
  return expect(x, lambda, Matrix<Exact>::Zero(x.n_q(), x.n_k()), options);
}

template <typename Scalar>
Expected expect_causal(const Operands<Scalar>& x, const Vector<Exact>& lambda) {
  return expect(x, lambda, dense(RangeMask{CausalMask{}}, x.n_q(), x.n_k()));
}

}  // namespace support
