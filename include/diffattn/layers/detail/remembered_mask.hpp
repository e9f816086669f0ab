#pragma once

// A mask of any type, kept from a forward pass for its backward pass. Behind it stand two types, one with a bias and
// one without, so that the backward kernels are compiled twice and not once for every mask; what they ask of a mask is
// little beside their work.

#include <memory>
#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

class RememberedMask {
  struct Holder {
    virtual ~Holder() = default;
    virtual KeyRange visible_keys(Index query, Index n_q, Index n_k) const = 0;
    virtual double bias(Index head, Index query, Index key, Index n_q, Index n_k) const = 0;
    virtual bool same_for_all_heads(Index n_q) const = 0;
    virtual void fill_bias(double* row, const BiasRow& of) const = 0;
    // Of the learned bias, if there is one.
    virtual Index table_rows() const = 0;
    virtual Index table_cols() const = 0;
    virtual void add_gradient(double* dtable, const double* dscores, const BiasRow& of) const = 0;
    const void* type = nullptr;
    bool has_bias = false;
    int learned_biases = 0;
  };

  template <typename Mask>
  struct HolderOf final : Holder {
    explicit HolderOf(const Mask& m) : mask(m) {
      type = &kType<Mask>;
      has_bias = HasBias<Mask>;
      learned_biases = count_learned_biases<Mask>();
    }
    KeyRange visible_keys(Index query, Index n_q, Index n_k) const override {
      return mask.visible_keys(query, n_q, n_k);
    }
    double bias(Index head, Index query, Index key, Index n_q, Index n_k) const override {
      if constexpr (HasBias<Mask>) {
        return static_cast<double>(mask.bias(head, query, key, n_q, n_k));
      } else {
        return 0;
      }
    }
    bool same_for_all_heads(Index n_q) const override { return detail::same_for_all_heads(mask, n_q); }
    void fill_bias(double* row, const BiasRow& of) const override {
      if constexpr (HasBias<Mask>) fill_biases(BiasOfMask<Mask>{mask}, row, of);
    }
    Index table_rows() const override {
      if constexpr (HasLearnedBias<Mask>) return mask.learned_bias().table_rows();
      return 0;
    }
    Index table_cols() const override {
      if constexpr (HasLearnedBias<Mask>) return mask.learned_bias().table_cols();
      return 0;
    }
    void add_gradient(double* dtable, const double* dscores, const BiasRow& of) const override {
      if constexpr (HasLearnedBias<Mask>) mask.learned_bias().add_gradient(dtable, dscores, of);
    }
    Mask mask;
  };

  template <typename Mask>
  static constexpr char kType = 0;  // its address tells the types apart

  struct Range {
    const Holder& held;
    KeyRange visible_keys(Index query, Index n_q, Index n_k) const { return held.visible_keys(query, n_q, n_k); }
  };
  struct Biased : Range {
    double bias(Index head, Index query, Index key, Index n_q, Index n_k) const {
      return this->held.bias(head, query, key, n_q, n_k);
    }
    bool same_for_all_heads(Index n_q) const { return this->held.same_for_all_heads(n_q); }
    void fill_bias(double* row, const BiasRow& of) const { this->held.fill_bias(row, of); }

    static constexpr int kLearnedBiases = 1;  // for all that the type knows: see learned_biases()
    const Holder& learned_bias() const { return this->held; }
  };

 public:
  /// Keeps a copy; no allocation if the last one was of the same type and size. What a bias reads in place must live
  /// on.
  template <typename Mask>
  void remember(const Mask& mask) {
    // A copy that throws half way must not leave a destroyed mask in the holder; one that is assigned may reuse memory.
    constexpr bool constructs = std::is_nothrow_copy_constructible_v<Mask>;
    if constexpr (constructs || std::is_copy_assignable_v<Mask>) {
      if (holder_ != nullptr && holder_->type == &kType<Mask>) {
        Mask& old = static_cast<HolderOf<Mask>&>(*holder_).mask;
        if constexpr (constructs) {
          std::destroy_at(&old);
          std::construct_at(&old, mask);
        } else {
          old = mask;
        }
        return;
      }
    }
    holder_ = std::make_unique<HolderOf<Mask>>(mask);
  }

  /// How many learned biases the mask has.
  int learned_biases() const { return holder_->learned_biases; }
  /// The shape of the learned bias's table, if there is one.
  Index table_rows() const { return holder_->table_rows(); }
  Index table_cols() const { return holder_->table_cols(); }

  /// Calls f(mask).
  template <typename F>
  void visit(F&& f) const {
    if (holder_->has_bias) {
      f(Biased{{*holder_}});
    } else {
      f(Range{*holder_});
    }
  }

 private:
  std::unique_ptr<Holder> holder_;
};

}  // namespace diffattn::inline v0_1::detail
