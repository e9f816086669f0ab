#pragma once

// A call cut into disjoint sets of keys: what partial_attention_test.cpp and attention_in_phases_test.cpp put together
// again.

#include <algorithm>
#include <limits>
#include <vector>

#include "diffattn/kernels/options.hpp"
#include "kernels/oracle.hpp"

namespace support {

using diffattn::Heads;

/// Keys [first_key, first_key + n_k of the part) of all, as a mask over all of them shows them.
template <typename Mask>
struct MaskOfPart {
  Mask mask;
  Index first_key;
  Index all_keys;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    const KeyRange seen = mask.visible_keys(query, n_q, all_keys);
    return {std::clamp<Index>(seen.begin - first_key, 0, n_k), std::clamp<Index>(seen.end - first_key, 0, n_k)};
  }
  double bias(Index head, Index query, Index key, Index n_q,
              Index /*n_k*/) const requires diffattn::detail::HasBias<Mask> {
    return static_cast<double>(mask.bias(head, query, first_key + key, n_q, all_keys));
  }
};

/// A bias that is another one for every head, and hides some.
struct BiasOfHeads {
  double operator()(Index head, Index query, Index key, Index n_q, Index n_k) const {
    if ((query + n_k - n_q + key) % 7 == 3) return -std::numeric_limits<double>::infinity();
    return 0.25 * static_cast<double>((3 * head + query + 2 * key) % 5);
  }
};

/// The operands of a call with several heads, N(0, 1).
struct ManyHeads {
  ManyHeads(Index n_q, Index n_k, const Heads& of, Index key_maps, Rng& rng, Index query_maps = 2)
      : heads(of),
        q(random_matrix<float>(n_q, of.query_heads(query_maps) * kD, rng)),
        k(random_matrix<float>(n_k, of.num_kv_heads * key_maps * kD, rng)),
        v(random_matrix<float>(n_k, of.num_kv_heads * kDv, rng)),
        lambda(random_matrix<float>(n_q, of.num_heads, rng)) {}

  static constexpr Index kD = 8, kDv = 12;
  Heads heads;
  Matrix<float> q, k, v, lambda;

  Index kv_head(Index head) const { return head / (heads.num_heads / heads.num_kv_heads); }
  Matrix<float> queries(Index head, Index map, Index maps = 2) const {
    return q.middleCols(heads.query_head(head, map, maps) * kD, kD);
  }
  /// Those of both maps, if they share them.
  Matrix<float> keys(Index head, Index map) const {
    const Index maps = k.cols() / (heads.num_kv_heads * kD);
    return k.middleCols((kv_head(head) * maps + std::min(map, maps - 1)) * kD, kD);
  }
  Matrix<float> values(Index head) const { return v.middleCols(kv_head(head) * kDv, kDv); }

  /// What one head of the whole call must be.
  template <typename Mask>
  Expected expected(Index head, const Mask& mask, bool differential) const {
    const Index maps = differential ? 2 : 1;
    const Operands<float> x{queries(head, 0, maps), keys(head, 0), queries(head, maps - 1, maps),
                            keys(head, maps - 1),   values(head),  {}};
    Matrix<Exact> bias(q.rows(), k.rows());
    for (Index i = 0; i < q.rows(); ++i) {
      const KeyRange seen = mask.visible_keys(i, q.rows(), k.rows());
      for (Index j = 0; j < k.rows(); ++j) {
        bias(i, j) = seen.begin <= j && j < seen.end ? 0 : kHidden;
        if constexpr (diffattn::detail::HasBias<Mask>) {
          bias(i, j) += static_cast<Exact>(mask.bias(head, i, j, q.rows(), k.rows()));
        }
      }
    }
    Vector<Exact> of_head = Vector<Exact>::Zero(q.rows());
    if (differential) of_head = lambda.col(head).cast<Exact>();
    return expect(x, of_head, bias);
  }
};

/// The ends of the parts that n_k keys are cut into: some of them empty.
inline std::vector<Index> ends_of_parts(Index n_k) { return {n_k / 3, n_k / 3, n_k - n_k / 4, n_k}; }

/// f(first_key, count) for each part.
template <typename F>
void for_each_part(Index n_k, const F& f) {
  Index first = 0;
  for (const Index end : ends_of_parts(n_k)) {
    f(first, end - first);
    first = end;
  }
}

}  // namespace support
