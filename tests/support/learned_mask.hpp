#pragma once

// Any mask with a learned bias behind one type, so that tests compile kernels and layers once for them all.

#include <memory>

#include "diffattn/kernels/mask.hpp"

namespace support {

class LearnedMask {
  using Index = diffattn::Index;

  struct Held {
    virtual ~Held() = default;
    virtual diffattn::KeyRange visible_keys(Index query, Index n_q, Index n_k) const = 0;
    virtual double bias(Index head, Index query, Index key, Index n_q, Index n_k) const = 0;
    virtual void check(const char* where, Index num_heads, Index n_q, Index n_k) const = 0;
    virtual void fill_bias(double* row, const diffattn::BiasRow& of) const = 0;
    virtual Index table_rows() const = 0;
    virtual Index table_cols() const = 0;
    virtual void add_gradient(double* dtable, const double* dscores, const diffattn::BiasRow& of) const = 0;
  };

  template <typename Mask>
  struct HeldMask final : Held {
    explicit HeldMask(const Mask& m) : mask(m) {}
    diffattn::KeyRange visible_keys(Index query, Index n_q, Index n_k) const override {
      return mask.visible_keys(query, n_q, n_k);
    }
    double bias(Index head, Index query, Index key, Index n_q, Index n_k) const override {
      return static_cast<double>(mask.bias(head, query, key, n_q, n_k));
    }
    void check(const char* where, Index num_heads, Index n_q, Index n_k) const override {
      diffattn::detail::check_mask(where, mask, num_heads, n_q, n_k);
    }
    void fill_bias(double* row, const diffattn::BiasRow& of) const override { mask.fill_bias(row, of); }
    Index table_rows() const override { return mask.learned_bias().table_rows(); }
    Index table_cols() const override { return mask.learned_bias().table_cols(); }
    void add_gradient(double* dtable, const double* dscores, const diffattn::BiasRow& of) const override {
      mask.learned_bias().add_gradient(dtable, dscores, of);
    }
    Mask mask;
  };

 public:
  static constexpr int kLearnedBiases = 1;

  template <typename Mask>
  requires(Mask::kLearnedBiases == 1) LearnedMask(const Mask& mask)  // NOLINT(google-explicit-constructor)
      : held_(std::make_shared<HeldMask<Mask>>(mask)) {}

  diffattn::KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    return held_->visible_keys(query, n_q, n_k);
  }
  double bias(Index head, Index query, Index key, Index n_q, Index n_k) const {
    return held_->bias(head, query, key, n_q, n_k);
  }
  void check(const char* where, Index num_heads, Index n_q, Index n_k) const {
    held_->check(where, num_heads, n_q, n_k);
  }
  void fill_bias(double* row, const diffattn::BiasRow& of) const { held_->fill_bias(row, of); }
  const Held& learned_bias() const { return *held_; }

 private:
  std::shared_ptr<const Held> held_;
};

}  // namespace support
