#pragma once

// What an attention layer does with a KvCache, whichever variant it is: x behind the tokens that it holds, a memory
// written to it, x with the memory that it keeps. AttentionLayer and CrossAttention have checked what comes here.

#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/layers/attention_variant.hpp"
#include "diffattn/layers/detail/attention_passes.hpp"
#include "diffattn/layers/detail/rounded_rows.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/kv_cache.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Variant>
class CachedAttention : public AttentionPasses<Variant> {
  using Passes = AttentionPasses<Variant>;

 public:
  using typename Passes::Scalar;

 protected:
  using Passes::Passes;
  using typename Passes::Input, typename Passes::Output, typename Passes::Parts;

  /// y = layer(x) behind what the cache holds, in the cache's three steps: prepare, write, commit. What throws before
  /// the last leaves it as it was. The mask is that of all tokens ever fed and of x's, in one piece.
  template <typename Storage, typename Mask, typename E>
  void attend_to_cache(const Output& y, const Input& x, KvCache<Storage>& cache, const Mask& mask, Workspace& workspace,
                       E& executor) const {
    const Index n = x.rows(), kept = kept_of(executor, n);
    prepare(cache, kept);
    const auto frame = workspace.frame();
    Parts parts = this->room_for(n, n, nullptr, workspace);
    this->project(x, parts, workspace, executor);
    this->turn(parts, {0, 0, n, 0, n}, position_of(executor, cache), executor);
    if (kept > 0) cache.write(view_of(parts.k), view_of(parts.v), executor);
    if constexpr (std::is_same_v<Mask, CausalMask>) {
      decode(parts, cache, kept, cache.window_mask(), workspace, executor);  // the same, and compiled once
    } else if (cache.options().window) {
      decode(parts, cache, kept, both(MaskReference<Mask>{mask}, cache.window_mask()), workspace, executor);
    } else {
      decode(parts, cache, kept, mask, workspace, executor);
    }
    this->finish(y, parts.attended, false, workspace, executor);
    cache.commit(kept);
  }

  /// y = layer(x) for this rank's rows of a sequence that ranks share, whose keys and values the cache, which is empty,
  /// keeps. All attend to what a cache would give them: as it is stored, and what its window leaves.
  template <typename Storage, typename Mask, typename E>
  void prefill(const Output& y, const Input& x, KvCache<Storage>& cache, const Mask& mask, Workspace& workspace,
               E& executor) const {
    const SequenceRows all{0, 0, x.rows(), 0, x.rows()};
    prepare(cache, x.rows());
    const auto frame = workspace.frame();
    Parts parts = this->room_for(x.rows(), x.rows(), nullptr, workspace);
    this->project(x, parts, workspace, executor);
    this->turn(parts, all, 0, executor);
    cache.write(view_of(parts.k), view_of(parts.v), executor);
    if constexpr (!std::is_same_v<Storage, Scalar>) {
      for (auto* part : {&parts.k, &parts.v}) *part = part->template cast<Storage>().template cast<Scalar>();
    }
    if constexpr (std::is_same_v<Mask, CausalMask>) {
      this->attend_rows(parts, all, cache.window_mask(), workspace, executor);  // the same, and compiled once
    } else if (cache.options().window) {
      this->attend_rows(parts, all, both(mask, cache.window_mask()), workspace, executor);
    } else {
      this->attend_rows(parts, all, mask, workspace, executor);
    }
    this->finish(y, parts.attended, false, workspace, executor);
    cache.commit(x.rows());
  }

  /// How many of n tokens this cache keeps, and where the first of them stands: all of them and behind those it has,
  /// unless ranks share them.
  template <typename E>
  static Index kept_of(E& executor, Index n) {
    if constexpr (spreads_caches<E>) {
      return executor.keeps() ? n : 0;
    } else {
      return n;
    }
  }
  template <typename E, typename Storage>
  static Index position_of(E& executor, const KvCache<Storage>& cache) {
    if constexpr (spreads_caches<E>) {
      return executor.position();
    } else {
      return cache.position();
    }
  }

  /// y = layer(x, memory) with the keys and values of a memory that the cache holds.
  template <typename Storage, typename Mask, typename E>
  void attend_to_kept(const Output& y, const Input& x, const KvCache<Storage>& cache, const Mask& mask,
                      Workspace& workspace, E& executor) const {
    const auto frame = workspace.frame();
    Parts parts = this->room_for(x.rows(), 0, nullptr, workspace);
    this->project_queries(x, parts, workspace, executor);
    this->turn(parts, {0, 0, x.rows(), 0, 0}, 0, executor);
    if (cache.empty()) {
      parts.attended.setZero();  // its pages may have any shape
    } else {
      decode(parts, cache, 0, mask, workspace, executor);
    }
    this->finish(y, parts.attended, false, workspace, executor);
  }

  /// The keys and values of a memory, behind those that the cache holds.
  template <typename Storage, typename E>
  void append_memory(const Input& memory, KvCache<Storage>& cache, Workspace& workspace, E& executor) const {
    const Index n = memory.rows();
    prepare(cache, n);
    const auto frame = workspace.frame();
    Parts parts = this->room_for(0, n, nullptr, workspace);
    this->project_memory(memory, parts, workspace, executor);
    this->turn(parts, {0, 0, 0, 0, n}, cache.position(), executor);
    cache.write(view_of(parts.k), view_of(parts.v), executor);
    cache.commit(n);
  }

  /// Room in the cache for as many tokens of this layer.
  template <typename Storage>
  void prepare(KvCache<Storage>& cache, Index tokens) const {
    const auto& config = this->config_;
    cache.template prepare<Scalar>(Variant::kName, config.num_kv_heads, Variant::kKeyMaps, config.head_dim,
                                   Variant::value_dim(config), tokens);
  }

  /// Fills parts.attended from what the cache holds and the tokens that have been written behind it. In bfloat16 the
  /// pages must hold it; or all keys and values are those of x, as in the first chunk of a text.
  template <typename Storage, typename Mask, typename E>
  void decode(Parts& parts, const KvCache<Storage>& cache, Index written, const Mask& mask, Workspace& workspace,
              E& executor) const {
    const Index n = parts.q.rows();
    if constexpr (Passes::template may_attend_in_bfloat16<E>) {
      if (this->template attends_in_bfloat16<E>(n)) {
        if constexpr (std::is_same_v<Storage, Eigen::bfloat16>) {
          const auto frame = workspace.frame();
          return decode_heads(parts, rounded_rows(parts.q, workspace, executor), cache, written, mask, workspace,
                              executor);
        } else if (cache.empty()) {
          return this->attend_rows(parts, {0, 0, n, 0, n}, mask, workspace, executor);
        }
      }
    }
    decode_heads(parts, parts.q, cache, written, mask, workspace, executor);
  }

 private:
  /// The same, with queries that are multiplied as they are.
  template <typename Queries, typename Storage, typename Mask, typename E>
  void decode_heads(Parts& parts, const Queries& q, const KvCache<Storage>& cache, Index written, const Mask& mask,
                    Workspace& workspace, E& executor) const {
    const auto pages = cache.packed(written);
    if constexpr (Variant::kLambda == LambdaSource::none) {
      decode_attention_into(parts.attended, q, pages, this->heads(), mask, AttentionOptions{}, workspace, executor);
    } else {
      decode_diff_attention_into(parts.attended, q, pages, this->lambda_of_rows(parts.lambda, 0, q.rows()),
                                 this->heads(), mask, AttentionOptions{}, workspace, executor);
    }
  }
};

}  // namespace diffattn::inline v0_1::detail
