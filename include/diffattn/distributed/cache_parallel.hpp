#pragma once

// Decoding against a cache that is spread over ranks: every rank has the new tokens, and the keys and values of some of
// those before. CacheParallel is an executor; where it is passed, a cache is this rank's part of the whole one, all
// other operands are the same on all ranks, and so is the result:
//
//   CacheParallel ranks(communicator);                           // or (communicator, executor)
//   ranks.feed(n);                                               // the next call feeds n tokens
//   layer.forward_into(y, x, cache, mask, workspace, ranks);     // or decoder.logits_into(y, tokens, cache, mask, …)
//
// feed() goes round: of each call's tokens, keys and values are kept by one rank, that of the call before it plus one. A
// mask is that of all tokens ever fed, as everywhere. Layers and decoders call decode_attention_into and
// decode_diff_attention_into, which take a CacheParallel and this rank's pages.
//
// Exchanged  by differential heads, in two phases (attention_in_phases.hpp): (m1, l1, m2, l2) of every row and head are
//            gathered, every rank combines its own maps with the sums of all, and the results are added up: dv + 4
//            numbers a row and head. By standard heads, parts of dv + 2 numbers, which are merged. No more than that: a
//            rank that fails says so in the place of its numbers. feed() compares three words.
// Order      by rank: the same number of ranks gives the same bits.
// Errors     an error of one rank before the exchange is an error on all (collective_check.hpp); caches are as before,
//            and take_back() makes the positions so. feed() on ranks that disagree is std::invalid_argument on all.
// Cost       keys and values are shared out, projections are not: every rank makes them all. More than 4 tokens a call
//            have their scores computed twice.

#include <exception>
#include <span>
#include <tuple>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/distributed/collective_check.hpp"
#include "diffattn/distributed/communicator.hpp"
#include "diffattn/distributed/detail/cached_positions.hpp"
#include "diffattn/distributed/detail/exchanged_parts.hpp"
#include "diffattn/kernels/attention_in_phases.hpp"
#include "diffattn/kernels/key_value_pages.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/kernels/partial_attention.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// What a call needs of a CacheParallel besides its public members.
struct CacheAccess {
  /// Where the keys of this rank stand.
  template <typename Ranks>
  static const CachedPositions& positions(const Ranks& ranks) {
    return ranks.positions_;
  }
  /// Throws std::invalid_argument unless the last feed() was for a call of so many rows, which finds or leaves so many
  /// keys here.
  template <typename Ranks>
  static void check_fed(const char* where, const Ranks& ranks, Index rows, Index keys) {
    const Index fed = ranks.tokens() - ranks.position();
    if (rows != fed || keys != ranks.positions_.size()) {
      throw_invalid({where, ": the last feed() of CacheParallel was for ", fed, " tokens and ", ranks.positions_.size(),
                     " keys on this rank, got ", rows, " and ", keys,
                     "; every call needs a feed() of its own, and every sequence a CacheParallel"});
    }
  }
  /// What this rank has of a call, kept from one to the next.
  template <typename Scalar, typename Ranks>
  static PartScratch<Scalar>& scratch(Ranks& ranks) {
    return std::get<PartScratch<Scalar>>(ranks.scratch_);
  }
};

}  // namespace detail

/// An executor whose calls attend to the caches of all ranks. Holds references to the communicator and to the executor
/// that this rank computes with, and says where the keys of this rank's cache stand: one for each sequence.
template <Communicator C, Executor E = Serial>
class CacheParallel {
 public:
  using SpreadsSequences = void;
  using SpreadsCaches = void;

  /// For an empty cache.
  CacheParallel(C& communicator, E& executor) : communicator_(communicator), executor_(executor) {}
  /// The same on one thread a rank.
  explicit CacheParallel(C& communicator) requires std::is_same_v<E, Serial> : CacheParallel(communicator, serial()) {}

  /// The ranks that share the cache.
  C& communicator() const { return communicator_; }
  /// What this rank computes with.
  E& local() const { return executor_; }
  Index concurrency() const { return executor_.concurrency(); }
  template <typename Task>
  void run(Index count, Task&& task) const {
    executor_.run(count, task);
  }

  /// Collective: the next call feeds `count` tokens, at least one. Throws std::invalid_argument.
  void feed(Index count) {
    check_on_all(communicator_, "CacheParallel", [&](Agreed& agreed) {
      agreed.add("tokens fed before", tokens_);
      agreed.add("tokens to feed", count);
      if (count < 1) detail::throw_invalid({"CacheParallel: feed() takes one token at least, got ", count});
    });
    before_ = tokens_;
    tokens_ += count;
    keeper_ = (keeper_ + 1) % communicator_.size();
    if (keeps()) positions_.append(before_, count);
  }
  /// After a call that has thrown: as before the last feed().
  void take_back() {
    positions_.truncate(before_);
    if (tokens_ != before_) keeper_ = (keeper_ + communicator_.size() - 1) % communicator_.size();
    tokens_ = before_;
  }

  /// Tokens fed to all ranks, with those of the last feed().
  Index tokens() const { return tokens_; }
  /// Where the first of the tokens of the last feed() stands.
  Index position() const { return before_; }
  /// Whether this rank keeps the keys and values of the last feed().
  bool keeps() const { return keeper_ == communicator_.rank(); }

 private:
  friend detail::CacheAccess;

  static E& serial() {
    static E executor;
    return executor;
  }

  C& communicator_;
  E& executor_;
  detail::CachedPositions positions_;
  Index tokens_ = 0;
  Index before_ = 0;
  Index keeper_ = -1;
  std::tuple<detail::PartScratch<float>, detail::PartScratch<double>> scratch_;
};

template <Communicator C>
explicit CacheParallel(C&) -> CacheParallel<C, Serial>;

/// decode_attention() of the caches of all ranks: q and out are the same on all of them, `pages` this rank's. Collective.
template <typename Out, typename Q, typename Storage, AttentionMask Mask, Communicator C, Executor E>
void decode_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                           const KeyValuePages<Storage>& pages, Heads heads, const Mask& mask,
                           const AttentionOptions& options, Workspace& workspace, CacheParallel<C, E>& ranks) {
  constexpr const char* kName = "decode_attention";
  using Scalar = typename Q::Scalar;
  const detail::CachedMask<Mask> here{mask, detail::CacheAccess::positions(ranks), ranks.tokens()};
  PartialAttention<Scalar>& part = detail::CacheAccess::scratch<Scalar>(ranks).part;
  detail::PartExchange<Scalar, C> exchange(ranks.communicator(), kName, out.rows(), heads.num_heads, workspace);
  exchange.run_one_phase(part, out.cols(), [&] {
    detail::CacheAccess::check_fed(kName, ranks, q.rows(), pages.first_key + pages.n_k);
    detail::check_shape(kName, "out", out, q.rows(), heads.num_heads * pages.shape.dv);
    decode_partial_attention_into(part, q, pages, heads, here, options, workspace, ranks.local());
  });
  const_cast<Out&>(out.derived()) = part.out;
}

/// decode_diff_attention() of the caches of all ranks: q, lambda and out are the same on all of them, `pages` this
/// rank's. Collective.
template <typename Out, typename Q, typename Storage, typename Lambda, AttentionMask Mask, Communicator C, Executor E>
void decode_diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                                const KeyValuePages<Storage>& pages, const Lambda& lambda, Heads heads,
                                const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                CacheParallel<C, E>& ranks) {
  constexpr const char* kName = "decode_diff_attention";
  using Scalar = typename Q::Scalar;
  const detail::CachedMask<Mask> here{mask, detail::CacheAccess::positions(ranks), ranks.tokens()};
  DiffSoftmaxStatistics<Scalar>& statistics = detail::CacheAccess::scratch<Scalar>(ranks).statistics;
  detail::PartExchange<Scalar, C> exchange(ranks.communicator(), kName, out.rows(), heads.num_heads, workspace);
  const auto frame = workspace.frame();
  MatrixMap<Scalar> share(workspace.take<Scalar>(out.size()), out.rows(), out.cols());
  exchange.run_two_phases([&](const auto& meet) {
    detail::CacheAccess::check_fed(kName, ranks, q.rows(), pages.first_key + pages.n_k);
    decode_diff_attention_in_phases_into(share, statistics, q, pages, lambda, heads, meet, here, options, workspace,
                                         ranks.local());
  });
  ranks.communicator().all_reduce(std::span<Scalar>(share.data(), static_cast<std::size_t>(share.size())));
  const_cast<Out&>(out.derived()) = share;
}

}  // namespace diffattn::inline v0_1
