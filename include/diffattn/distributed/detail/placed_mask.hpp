#pragma once

// The mask of a whole sequence, as the rows of one rank and some of the heads meet it.

#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/distributed/collective_check.hpp"
#include "diffattn/distributed/sequence_placement.hpp"
#include "diffattn/kernels/bias.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

/// A learned bias likewise; its table has a row for each of the heads of the call.
template <typename Bias>
struct PlacedBias {
  const Bias& bias;
  const SequencePlacement& placement;
  Index first_head;
  Index num_heads;

  Index table_rows() const { return num_heads; }
  Index table_cols() const { return bias.table_cols(); }
  void add_gradient(double* dtable, const double* dscores, const BiasRow& of) const {
    bias.add_gradient(
        dtable, dscores,
        {first_head + of.head, placement.position(of.query), of.first_key, of.count, placement.rows(), of.n_k});
  }
};

/// `mask`, for queries that are this rank's rows and keys that are those of all, in the order of the sequence. Rows of
/// a rank stand in that order, too, so that what they see does not decrease.
template <typename Mask>
struct PlacedMask {
  const Mask& mask;
  const SequencePlacement& placement;
  Index first_head;
  Index num_heads;

  KeyRange visible_keys(Index query, Index /*n_q*/, Index n_k) const {
    return mask.visible_keys(placement.position(query), placement.rows(), n_k);
  }

  auto bias(Index head, Index query, Index key, Index /*n_q*/, Index n_k) const requires HasBias<Mask> {
    return mask.bias(first_head + head, placement.position(query), key, placement.rows(), n_k);
  }

  bool same_for_all_heads(Index /*n_q*/) const { return detail::same_for_all_heads(mask, placement.rows()); }

  template <typename T>
  void fill_bias(T* row, const BiasRow& of) const requires HasBias<Mask> {
    fill_biases(BiasOfMask<Mask>{mask}, row,
                {first_head + of.head, placement.position(of.query), of.first_key, of.count, placement.rows(), of.n_k});
  }

  static constexpr int kLearnedBiases = count_learned_biases<Mask>();
  auto learned_bias() const requires(kLearnedBiases == 1) {
    return PlacedBias<std::remove_cvref_t<decltype(mask.learned_bias())>>{mask.learned_bias(), placement, first_head,
                                                                          num_heads};
  }
};

/// What a mask of this library consists of has to be the same on all ranks; of others nothing is known.
template <typename Mask>
void add_mask(Agreed& /*agreed*/, const Mask& /*mask*/) {}
inline void add_mask(Agreed& agreed, const SlidingWindowMask& mask) {
  agreed.add("the window of the mask", mask.window);
}
inline void add_mask(Agreed& agreed, const PrefixMask& mask) { agreed.add("the prefix of the mask", mask.prefix); }
inline void add_mask(Agreed& agreed, const PaddingMask& mask) { agreed.add("num_valid of the mask", mask.num_valid); }
template <typename First, typename Second>
void add_mask(Agreed& agreed, const BothMasks<First, Second>& mask);
template <typename Mask, typename Bias>
void add_mask(Agreed& agreed, const BiasedMask<Mask, Bias>& mask) {
  add_mask(agreed, mask.mask);
}
template <typename First, typename Second>
void add_mask(Agreed& agreed, const BothMasks<First, Second>& mask) {
  add_mask(agreed, mask.first);
  add_mask(agreed, mask.second);
}

}  // namespace diffattn::inline v0_1::detail
