#pragma once

// BatchedAttention: what every attention layer has for many sequences at once (attention_layer.hpp): the newest token of
// each, behind a cache of its own.
//
//   y = layer.forward(x, caches);                      row i of x continues *caches[i]; or forward(x, caches, mask)
//   layer.forward_into(y, x, caches, …, workspace, executor)
//
// The projections are one product for all rows, so that weights are read once for all sequences, and heads and keys of
// all caches are shared out to the executor together. Row i of y is what forward(x.row(i), *caches[i]) gives: bit for
// bit where the products compute a row in the same way, which up to 4 rows alone or together and any larger numbers
// among each other do.
//
// Shapes   x, y (n x embed_dim), n caches (cache_batch.hpp); n = 0 is no error.
// Mask     that of all tokens of a sequence, as if they stood in one piece; the window of each cache joins it.
// Errors   ShapeError, std::invalid_argument, in the name of the sequence; before any work. Whatever is thrown, all
//          caches are as before.
// Memory   what the layer takes for n tokens, and the weights of all keys that are seen, for all sequences together; no
//          heap after a first call, but for pages by which caches grow.

#include <cstddef>
#include <memory>
#include <span>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/key_value_pages.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/layers/attention_variant.hpp"
#include "diffattn/layers/cache_batch.hpp"
#include "diffattn/layers/cross_attention.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/kv_cache.hpp"

namespace diffattn::inline v0_1 {

template <typename Variant>
class BatchedAttention : public CrossAttention<Variant> {
  using Passes = CrossAttention<Variant>;

 public:
  using Scalar = typename Variant::Scalar;

  // Caches&& takes what const Caches& would; of two overloads that differ in their constraints alone, the one of the
  // derived class hides the other.

  /// y (n x embed_dim) for x (n x embed_dim), whose row i follows the tokens in *caches[i] and joins them.
  template <typename X, CacheBatch<KvCache> Caches, AttentionMask Mask = CausalMask>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x, Caches&& caches, const Mask& mask = {}) const {
    detail::ThreadWorkspace workspace;
    Matrix<Scalar> y(x.rows(), config_.embed_dim);
    forward_into(y, x, caches, mask, workspace);
    return y;
  }

  /// forward(x, caches) into y.
  template <typename Y, typename X, CacheBatch<KvCache> Caches, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Caches&& caches, Workspace& workspace,
                    E&& executor = {}) const {
    forward_into(y, x, caches, CausalMask{}, workspace, executor);
  }

  /// forward(x, caches, mask) into y.
  template <typename Y, typename X, CacheBatch<KvCache> Caches, AttentionMask Mask, Executor E = Serial>
  void forward_into(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, Caches&& caches, const Mask& mask,
                    Workspace& workspace, E&& executor = {}) const {
    constexpr const char* where = Variant::kName;
    const auto batch = detail::batch_of<KvCache>(std::data(caches), std::size(caches));
    Passes::check_tokens(y, x);
    detail::check_batch(where, "rows of x", x.rows(), batch, workspace);
    detail::check_sequences(where, x.rows(), [&](const char* name, Index i) {
      const auto& cache = *batch[static_cast<std::size_t>(i)];
      check_cache(name, cache, 1);
      detail::check_mask(name, mask, config_.num_heads, 1, cache.position() + 1);
    });
    if (x.rows() == 0) return;
    const detail::Readable<X> x_read(x.derived());
    attend_to_caches(Passes::output_of(y), Passes::input_of(x_read), batch, mask, workspace, executor);
  }

  /// Throws, naming `where`, ShapeError unless the cache is empty or one of a layer like this, std::invalid_argument
  /// unless it has room for `tokens` tokens more.
  template <typename Storage>
  void check_cache(const char* where, const KvCache<Storage>& cache, Index tokens) const {
    cache.template check<Scalar>(where, config_.num_kv_heads, Variant::kKeyMaps, config_.head_dim,
                                 Variant::value_dim(config_), tokens);
  }

 protected:
  using Passes::Passes, Passes::config_;

 private:
  /// In the three steps of the caches: prepare, write, commit. What throws before the last leaves all as they were.
  template <typename Storage, typename Mask, typename E>
  void attend_to_caches(const typename Passes::Output& y, const typename Passes::Input& x,
                        std::span<KvCache<Storage>* const> caches, const Mask& mask, Workspace& workspace,
                        E& executor) const {
    for (KvCache<Storage>* cache : caches) {
      Passes::prepare(*cache, 1);
    }
    const auto frame = workspace.frame();
    auto parts = Passes::room_for(x.rows(), x.rows(), nullptr, workspace);
    Passes::project(x, parts, workspace, executor);
    executor.run(x.rows(), [&](Index i, Index /*worker*/) {
      Serial alone;
      KvCache<Storage>& cache = *caches[static_cast<std::size_t>(i)];
      Passes::turn(parts, {i, i, 1, i, 1}, cache.position(), alone);
      cache.write(detail::view_of(detail::rows_of(parts.k, i, 1)), detail::view_of(detail::rows_of(parts.v, i, 1)),
                  alone);
    });
    if constexpr (std::is_same_v<Mask, CausalMask>) {
      decode_batch(parts, caches, workspace, executor, [](SlidingWindowMask window) { return window; });
    } else {
      decode_batch(parts, caches, workspace, executor,
                   [&](SlidingWindowMask window) { return both(detail::MaskReference<Mask>{mask}, window); });
    }
    Passes::finish(y, parts.attended, false, workspace, executor);
    for (KvCache<Storage>* cache : caches) cache->commit(1);
  }

  /// Fills parts.attended from what has been written to the caches. seen(window) is the mask of a cache.
  template <typename Storage, typename E, typename Seen>
  void decode_batch(typename Passes::Parts& parts, std::span<KvCache<Storage>* const> caches, Workspace& workspace,
                    E& executor, const Seen& seen) const {
    using Mask = decltype(seen(SlidingWindowMask{}));
    const std::size_t n = caches.size();
    auto* const pages = workspace.take<KeyValuePages<Storage>>(static_cast<Index>(n));
    auto* const masks = workspace.take<Mask>(static_cast<Index>(n));
    for (std::size_t i = 0; i < n; ++i) {
      std::construct_at(pages + i, caches[i]->packed(1));
      std::construct_at(masks + i, seen(caches[i]->window_mask()));
    }
    const std::span<const KeyValuePages<Storage>> all_pages(pages, n);
    const std::span<const Mask> all_masks(masks, n);
    if constexpr (Variant::kLambda == LambdaSource::none) {
      decode_attention_into(parts.attended, parts.q, all_pages, Passes::heads(), all_masks, AttentionOptions{},
                            workspace, executor);
    } else {
      decode_diff_attention_into(parts.attended, parts.q, all_pages,
                                 Passes::lambda_of_rows(parts.lambda, 0, static_cast<Index>(n)), Passes::heads(),
                                 all_masks, AttentionOptions{}, workspace, executor);
    }
  }
};

}  // namespace diffattn::inline v0_1
