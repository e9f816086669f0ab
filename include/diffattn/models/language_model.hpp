#pragma once

// LanguageModel: how the logits of a model are asked for, one way for all models. Decoder and DiffLlama are it.
//
//   Matrix<float> logits = model.logits({1, 2, 3});     or (tokens, mask): (tokens x vocab_size)
//   model.logits(prompt, cache);                        the tokens that follow those in a DecoderCache; or with a mask
//   model.logits(tokens, caches);                       many sequences at once: token i continues *caches[i]
//   model.logits(…, executor);                          on the threads of an executor
//   model.logits_into(y, …, workspace, executor)        into a matrix of yours, scratch and threads from you
//
// Row i scores what follows token i, which sees the tokens that `mask` lets it see: CausalMask, if it is left out. Behind
// a cache the mask is that of all tokens ever fed, as if they stood in one piece.
//
// Tokens   any contiguous integers: a std::vector, std::span, Eigen vector or {1, 2, 3}.
// Caches   of make_cache(), or forks of such; a batch is any contiguous range of pointers (layers/cache_batch.hpp).
//          Whatever is thrown, all caches are as before. Of a batch, row i is what its token gives alone; bit for bit
//          with up to 4 of them and hidden_dim whole packets, otherwise but for the order in which sums are rounded.
// Errors   std::invalid_argument for a token id outside the vocabulary, for more tokens than a cache or the model has
//          room for, and for a cache of another model; of a batch, in the name of the sequence: "sequence 3: token …".
//          ShapeError for a y that does not fit. Before any work.

#include <initializer_list>
#include <iterator>
#include <span>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/cache_batch.hpp"
#include "diffattn/models/decoder_cache.hpp"

namespace diffattn::inline v0_1 {

/// `Model`, which derives from this, has config().vocab_size and logits_into(y, tokens, …, mask, workspace, executor)
/// in three forms: without a cache, with one, and with a batch of them.
template <typename Model, typename Scalar>
class LanguageModel {
 public:
  /// (tokens x vocab_size): row i scores what follows token i.
  template <typename Tokens, AttentionMask Mask = CausalMask, Executor E = Serial>
  Matrix<Scalar> logits(const Tokens& tokens, const Mask& mask = {}, E&& executor = {}) const {
    return filled(tokens, executor, mask);
  }
  template <typename Tokens, Executor E>
  Matrix<Scalar> logits(const Tokens& tokens, E&& executor) const {
    return filled(tokens, executor, CausalMask{});
  }
  Matrix<Scalar> logits(std::initializer_list<Index> tokens) const { return logits(std::span(tokens)); }

  /// The same for the tokens that follow those in `cache`, which they join; whatever is thrown, it is as before.
  template <typename Tokens, typename Storage, AttentionMask Mask = CausalMask, Executor E = Serial>
  Matrix<Scalar> logits(const Tokens& tokens, DecoderCache<Storage>& cache, const Mask& mask = {},
                        E&& executor = {}) const {
    return filled(tokens, executor, cache, mask);
  }
  template <typename Tokens, typename Storage, Executor E>
  Matrix<Scalar> logits(const Tokens& tokens, DecoderCache<Storage>& cache, E&& executor) const {
    return filled(tokens, executor, cache, CausalMask{});
  }
  template <typename Storage>
  Matrix<Scalar> logits(std::initializer_list<Index> tokens, DecoderCache<Storage>& cache) const {
    return logits(std::span(tokens), cache);
  }

  /// The same for many sequences at once: token i follows those in *caches[i] and joins them, and row i scores what
  /// follows it. Whatever is thrown, all caches are as before.
  template <typename Tokens, CacheBatch<DecoderCache> Caches, AttentionMask Mask = CausalMask, Executor E = Serial>
  Matrix<Scalar> logits(const Tokens& tokens, Caches&& caches, const Mask& mask = {}, E&& executor = {}) const {
    return filled(tokens, executor, caches, mask);
  }
  template <typename Tokens, CacheBatch<DecoderCache> Caches, Executor E>
  Matrix<Scalar> logits(const Tokens& tokens, Caches&& caches, E&& executor) const {
    return filled(tokens, executor, caches, CausalMask{});
  }
  template <CacheBatch<DecoderCache> Caches>
  Matrix<Scalar> logits(std::initializer_list<Index> tokens, Caches&& caches) const {
    return logits(std::span(tokens), caches);
  }

  /// logits(tokens) into y (tokens x vocab_size), with scratch from `workspace` and work spread over `executor`: after
  /// a first call of the largest shape no heap.
  template <typename Y, typename Tokens, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, Workspace& workspace, E&& executor = {}) const {
    model().logits_into(y, tokens, CausalMask{}, workspace, executor);
  }
  /// logits(tokens, cache) into y; allocates only the pages by which the cache grows, none up to its `reserve`.
  template <typename Y, typename Tokens, typename Storage, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, DecoderCache<Storage>& cache,
                   Workspace& workspace, E&& executor = {}) const {
    model().logits_into(y, tokens, cache, CausalMask{}, workspace, executor);
  }
  /// logits(tokens, caches) into y.
  template <typename Y, typename Tokens, CacheBatch<DecoderCache> Caches, Executor E = Serial>
  void logits_into(const Eigen::MatrixBase<Y>& y, const Tokens& tokens, Caches&& caches, Workspace& workspace,
                   E&& executor = {}) const {
    model().logits_into(y, tokens, caches, CausalMask{}, workspace, executor);
  }

 protected:
  template <typename Tokens>
  static Index size_of(const Tokens& tokens) {
    return static_cast<Index>(std::size(tokens));
  }

 private:
  const Model& model() const { return static_cast<const Model&>(*this); }

  /// What logits_into(y, tokens, rest…, workspace, executor) gives.
  template <typename Tokens, typename E, typename... Rest>
  Matrix<Scalar> filled(const Tokens& tokens, E& executor, Rest&&... rest) const {
    Workspace workspace;
    Matrix<Scalar> result(size_of(tokens), model().config().vocab_size);
    model().logits_into(result, tokens, rest..., workspace, executor);
    return result;
  }
};

}  // namespace diffattn::inline v0_1
