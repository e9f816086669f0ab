#pragma once

// Decoding against a cache that is spread over ranks: every rank has the new tokens, and the keys and values of some of
// those before. CacheParallel is an executor; where it is passed, a cache is this rank's part of the whole one, all
// other operands are the same on all ranks, and so is the result:
//
//   CacheParallel ranks(communicator);                           // or (communicator, executor)
//   ranks.feed(n);                                               // the next call feeds n tokens
//   layer.forward_into(y, x, cache, mask, workspace, ranks);     // or decoder.logits_into(y, tokens, cache, mask, …)
//
// A long prompt comes first, its rows spread over the ranks (sequence_parallel.hpp):
//
//   SequenceParallel prompt(communicator, n);
//   layer.forward_into(y, my_rows_of_x, cache, mask, workspace, prompt);      // into empty caches
//   ranks.prefilled(prompt.placement());
//
// feed() goes round: of each call's tokens, keys and values are kept by one rank, that of the call before it plus one. A
// mask is that of all tokens ever fed, as everywhere. Layers and decoders call decode_attention_into and
// decode_diff_attention_into, which take a CacheParallel and this rank's pages.
//
// Exchanged  by differential heads, in two phases (attention_in_phases.hpp): (m1, l1, m2, l2) of every row and head are
//            gathered, every rank combines its own maps with the sums of all, and the results are added up: dv + 4
//            numbers a row and head. By standard heads, parts of dv + 2 numbers, which are merged. No more than that: a
//            rank that fails says so in the place of its numbers. feed() compares three words, and so does a call that
//            needs more memory for its numbers than those before it.
// Order      by rank: the same number of ranks gives the same bits.
// Errors     an error of one rank, lack of memory included, is an error on all (collective_check.hpp, with_others());
//            caches are as before, and take_back() makes the positions so. feed() on ranks that disagree is
//            std::invalid_argument on all.
// Cost       keys and values are shared out, projections are not: every rank makes them all. More than 4 tokens a call
//            have their scores computed twice.

#include <algorithm>
#include <exception>
#include <tuple>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/distributed/collective_check.hpp"
#include "diffattn/distributed/communicator.hpp"
#include "diffattn/distributed/detail/cached_positions.hpp"
#include "diffattn/distributed/detail/error_text.hpp"
#include "diffattn/distributed/detail/exchanged_parts.hpp"
#include "diffattn/distributed/sequence_placement.hpp"
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
  /// That of a call with the tokens of the last feed(), on every rank as many.
  template <typename Scalar, typename Ranks>
  static auto exchange(const char* where, Ranks& ranks, Index heads, Index cols) {
    auto& communicator = ranks.communicator();
    return PartExchange<Scalar, std::remove_reference_t<decltype(communicator)>>(
        communicator, ranks.room_, where, ranks.tokens() - ranks.position(), heads, cols);
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
      positions_.reserve_run();
      room_.find_memory(communicator_, count, room_.a_row);
    });
    room_.rows = std::max(room_.rows, count);
    room_.exchanges = 0;
    before_ = tokens_;
    tokens_ += count;
    keeper_ = (keeper_ + 1) % communicator_.size();
    if (keeps()) positions_.append(before_, count);
  }
  /// After a call that has thrown: as before the last feed().
  void take_back() {
    if (tokens_ != before_) keeper_ = (keeper_ + communicator_.size() - 1) % communicator_.size();
    take_back(before_);
  }
  /// The first `tokens` tokens stay; this rank's cache is to keep kept_before(tokens) of its own. Throws
  /// std::invalid_argument for more than there are.
  void take_back(Index tokens) {
    if (tokens < 0 || tokens > tokens_) {
      detail::throw_invalid({"CacheParallel: cannot take back to ", tokens, " tokens, ", tokens_, " have been fed"});
    }
    positions_.truncate(tokens);
    tokens_ = before_ = tokens;
  }
  /// Collective: the caches hold a sequence that SequenceParallel has put there, and that is placed so. Throws
  /// std::invalid_argument on all ranks if tokens have been fed, and for a placement over other ranks.
  void prefilled(const SequencePlacement& placement) {
    check_on_all(communicator_, "CacheParallel", [&](Agreed& agreed) {
      agreed.add("tokens of the sequence", placement.rows());
      if (tokens_ != 0) {
        detail::throw_invalid({"CacheParallel: prefilled() is for empty caches, ", tokens_, " tokens have been fed"});
      }
      if (placement.ranks() != communicator_.size() || placement.rank() != communicator_.rank()) {
        detail::throw_invalid({"CacheParallel: the sequence must be placed as for rank ", communicator_.rank(), " of ",
                               communicator_.size(), ", got rank ", placement.rank(), " of ", placement.ranks()});
      }
      placement.for_each_piece([&](Index, Index count, Index position) {
        if (count > 0) positions_.append(position, count);
      });
    });
    tokens_ = before_ = placement.rows();
  }

  /// Collective: f(), a call of a layer or a model in which attention exchanges numbers `exchanges` times: what one rank
  /// throws before the last of them is an error on all. What it throws behind it, such as a last product that lacks
  /// memory, is its own, and the next feed() is refused on all ranks.
  template <typename F>
  void with_others(const char* where, Index exchanges, F&& f) {
    if (is_inner_) return f();
    room_.exchanges = 0;
    room_.failed_on_all = false;
    is_inner_ = true;
    const std::exception_ptr error = detail::error_of(f);
    is_inner_ = false;
    if (error == nullptr) return;
    if (!room_.failed_on_all && room_.exchanges < exchanges) answer_others(where, error);
    std::rethrow_exception(error);
  }

  /// Tokens fed to all ranks, with those of the last feed().
  Index tokens() const { return tokens_; }
  /// Where the first of the tokens of the last feed() stands.
  Index position() const { return before_; }
  /// Whether this rank keeps the keys and values of the last feed().
  bool keeps() const { return keeper_ == communicator_.rank(); }
  /// How many of the first `tokens` tokens are in this rank's cache.
  Index kept_before(Index tokens) const { return positions_.before(tokens); }

 private:
  friend detail::CacheAccess;

  static E& serial() {
    static E executor;
    return executor;
  }

  /// Takes this rank's part in what the others are waiting in: an exchange like the last one, or, if there has not been
  /// one as large, the check before it.
  void answer_others(const char* where, const std::exception_ptr& error) {
    const Index rows = tokens_ - before_;
    if (room_.answer != nullptr && rows <= room_.rows) return room_.answer(communicator_, room_, rows, error);
    check_on_all(communicator_, where, [&] { std::rethrow_exception(error); });
  }

  C& communicator_;
  E& executor_;
  detail::CachedPositions positions_;
  detail::ExchangeRoom<C> room_;
  Index tokens_ = 0;
  Index before_ = 0;
  Index keeper_ = -1;
  bool is_inner_ = false;  // within with_others()
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
  auto exchange = detail::CacheAccess::exchange<Scalar>(kName, ranks, heads.num_heads, out.cols());
  exchange.run_one_phase(part, [&] {
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
  auto exchange = detail::CacheAccess::exchange<Scalar>(kName, ranks, heads.num_heads, out.cols());
  const_cast<Out&>(out.derived()) = exchange.run_two_phases([&](auto& share, const auto& meet) {
    detail::CacheAccess::check_fed(kName, ranks, q.rows(), pages.first_key + pages.n_k);
    detail::check_shape(kName, "out", out, q.rows(), heads.num_heads * pages.shape.dv);
    decode_diff_attention_in_phases_into(share, statistics, q, pages, lambda, heads, meet, here, options, workspace,
                                         ranks.local());
  });
}

}  // namespace diffattn::inline v0_1
