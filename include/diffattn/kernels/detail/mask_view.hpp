#pragma once

// What the kernels see of a mask: a type for all masks without a bias and one for all with a bias, so that the kernels
// are compiled for these and not for every mask that a program uses. They ask a mask a row at a time, which is little
// beside their work. FullMask and CausalMask, which most calls have, stand for themselves: the smallest calls ask as
// often for less.

#include <concepts>
#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/bias_row.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

/// A mask of any type, which must outlive it, with biases as Scalar; kBiased: whether it has some.
template <typename Scalar, bool kBiased>
class MaskView {
  struct Questions {
    KeyRange (*visible_keys)(const void* mask, Index query, Index n_q, Index n_k);
    bool (*same_for_all_heads)(const void* mask, Index n_q);
    void (*fill_bias)(const void* mask, Scalar* row, const BiasRow& of);
  };

  template <typename Mask>
  static constexpr Questions kQuestions = {[](const void* mask, Index query, Index n_q, Index n_k) -> KeyRange {
                                             return static_cast<const Mask*>(mask)->visible_keys(query, n_q, n_k);
                                           },
                                           [](const void* mask, Index n_q) -> bool {
                                             return detail::same_for_all_heads(*static_cast<const Mask*>(mask), n_q);
                                           },
                                           [](const void* mask, Scalar* row, const BiasRow& of) {
                                             if constexpr (kBiased)
                                               fill_biases(BiasOfMask<Mask>{*static_cast<const Mask*>(mask)}, row, of);
                                           }};

 public:
  template <typename Mask>
  requires(HasBias<Mask> == kBiased && !std::same_as<Mask, MaskView>) explicit MaskView(const Mask& mask)
      : mask_(&mask), ask_(&kQuestions<Mask>) {}

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const { return ask_->visible_keys(mask_, query, n_q, n_k); }

  Scalar bias(Index head, Index query, Index key, Index n_q, Index n_k) const requires kBiased {
    Scalar bias;
    fill_bias(&bias, {head, query, key, 1, n_q, n_k});
    return bias;
  }

  void fill_bias(Scalar* row, const BiasRow& of) const requires kBiased { ask_->fill_bias(mask_, row, of); }

  bool same_for_all_heads(Index n_q) const { return ask_->same_for_all_heads(mask_, n_q); }

 private:
  const void* mask_;
  const Questions* ask_;
};

template <typename Scalar, typename Mask>
struct MaskOfKernels {
  using type = MaskView<Scalar, HasBias<Mask>>;
};
template <typename Scalar, bool kBiased>
struct MaskOfKernels<Scalar, MaskView<Scalar, kBiased>> {
  using type = const MaskView<Scalar, kBiased>&;
};
template <typename Scalar>
struct MaskOfKernels<Scalar, FullMask> {
  using type = const FullMask&;
};
template <typename Scalar>
struct MaskOfKernels<Scalar, CausalMask> {
  using type = const CausalMask&;
};

/// What a kernel of this scalar takes for a mask of this type, made from it: a view, or the mask itself.
template <typename Scalar, typename Mask>
using ViewedMask = typename MaskOfKernels<Scalar, Mask>::type;

/// The same for the backward kernels, which ask a learned bias for its gradient: its mask stands for itself.
template <typename Scalar, typename Mask>
using ViewedMaskOfBackward = std::conditional_t<HasLearnedBias<Mask>, const Mask&, ViewedMask<Scalar, Mask>>;

}  // namespace diffattn::inline v0_1::detail
