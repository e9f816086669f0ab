#pragma once

// One long sequence over several ranks: each has some of its rows (sequence_placement.hpp), and a call on all ranks
// computes, of what it would compute for the whole sequence, the rows of each. SequenceParallel is an executor; where
// it is passed, queries, keys, values, x and y are this rank's rows, and a mask is that of the whole sequence:
//
//   SequenceParallel ranks(communicator, n);                       // n rows in all; or (communicator, n, executor)
//   const auto x = ranks.placement().rows_of(whole_x);
//   multihead_diff_attention_into(out, q, k, v, lambda, heads, CausalMask{}, {}, workspace, ranks);
//   layer.forward_into(y, x, CausalMask{}, tape, workspace, ranks);
//   layer.backward_into(dx, dy, tape, grad, workspace, ranks);
//   decoder.logits_into(logits, tokens, {ranks.placement().mine()}, tape, workspace, ranks);   // and backward
//   layer.forward_into(y, x, cache, mask, workspace, ranks);       // or decoder.logits_into(logits, tokens, cache, mask, …)
//   Matrix<float> whole_y = ranks.gather(y);
//
// What takes it: attention_into, multihead_attention_into, diff_attention_into, multihead_diff_attention_into and
// multihead_…_backward_into with views of gradients, layers and decoders for one sequence; what cannot does not compile.
// An empty cache keeps keys and values of this rank's rows; CacheParallel goes on behind it (cache_parallel.hpp).
//
// Exchanged  forward: keys and values of one key head (or key_heads_at_a_time) after another are gathered on every rank,
//            so that queries meet all keys at the cost of one machine, 4·d a pair of rows. Backward: they are gathered
//            again, and the gradients that every rank has for all of them go back to the rows' own ranks. A rank sends
//            each other rank (key maps·d + dv)·G numbers for each of its rows forward, and twice that backward.
// Gradients  of what all ranks have alike, λ as a number, a learned bias's table, a layer's parameters, are those of
//            this rank's rows: their sums over the ranks are the gradients (data_parallel.hpp).
// Order      sums over ranks run in the order of the ranks: the same number of ranks gives the same bits.
// Errors     collective: what is wrong on one rank, a shape, a mask that throws, memory, is thrown on all
//            (collective_check.hpp), and so is std::invalid_argument where they disagree on sizes, λ as a number, scale
//            or a mask of this library. More ranks than rows are refused.
// Memory     a rank's share of all operands, and keys and values of one key head of all rows; backward 2.5 times those.

#include <exception>
#include <optional>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/distributed/collective_check.hpp"
#include "diffattn/distributed/communicator.hpp"
#include "diffattn/distributed/detail/error_text.hpp"
#include "diffattn/distributed/detail/gathered_heads.hpp"
#include "diffattn/distributed/detail/placed_mask.hpp"
#include "diffattn/distributed/detail/spread_call.hpp"
#include "diffattn/distributed/sequence_placement.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "diffattn/kernels/gradients.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

/// An executor whose calls are for this rank's rows of one sequence of all ranks. Holds references to the communicator
/// and to the executor that this rank computes with.
template <Communicator C, Executor E = Serial>
class SequenceParallel {
 public:
  using SpreadsSequences = void;

  /// Collective. `rows`: of the whole sequence. key_heads_at_a_time: how many key heads are gathered together. Throws
  /// std::invalid_argument for more ranks than rows, and if ranks disagree.
  SequenceParallel(C& communicator, Index rows, E& executor, Index key_heads_at_a_time = 1)
      : communicator_(communicator),
        executor_(executor),
        placement_(checked(communicator, rows, key_heads_at_a_time)),
        key_heads_(key_heads_at_a_time) {}
  /// The same on one thread a rank.
  SequenceParallel(C& communicator, Index rows) requires std::is_same_v<E, Serial>
      : SequenceParallel(communicator, rows, serial()) {}

  /// Which rows are here.
  const SequencePlacement& placement() const { return placement_; }
  /// The ranks that share the sequence.
  C& communicator() const { return communicator_; }
  /// What this rank computes with.
  E& local() const { return executor_; }
  /// How many heads of keys and values are gathered at a time.
  Index key_heads_at_a_time() const { return key_heads_; }

  /// This rank's workers: what rows do not need each other for is spread over them alone.
  Index concurrency() const { return executor_.concurrency(); }
  template <typename Task>
  void run(Index count, Task&& task) const {
    executor_.run(count, task);
  }

  /// Collective: check() or check(agreed), whose error on one rank is one on all.
  template <typename Check>
  void check(const char* where, Check&& check) const {
    thrown_on_all_ = true;
    check_on_all(communicator_, where, check);
    thrown_on_all_ = false;
  }

  /// Collective: f(), in which all that is collective begins with a check(). What one rank throws in between, the others
  /// throw in their next check(), at the latest in one at the end, which an inner call leaves to the outer one.
  template <typename F>
  void with_others(const char* where, Index /*exchanges*/, F&& f) {
    if (is_inner_) return f();
    thrown_on_all_ = false;
    is_inner_ = true;
    const std::exception_ptr error = detail::error_of(f);
    is_inner_ = false;
    if (error != nullptr && thrown_on_all_) std::rethrow_exception(error);
    check(where, [&] { detail::rethrow_if_any(error); });
  }

  /// How many rows the whole sequence has, for a call with this rank's. Throws ShapeError unless it has those of one
  /// sequence.
  Index check_sequence(const char* where, Index sequences, Index rows) const {
    if (sequences != 1 || rows != placement_.mine()) {
      detail::throw_shape({where, ": ranks share one sequence, of which this one has ", placement_.mine(),
                           " rows; got ", sequences, sequences == 1 ? " sequence of " : " sequences of ", rows});
    }
    return placement_.rows();
  }

  /// Collective: all rows of the sequence, from this rank's rows of it, mine() x any columns. Throws ShapeError.
  template <typename X>
  Matrix<typename X::Scalar> gather(const Eigen::MatrixBase<X>& mine) const {
    using Scalar = typename X::Scalar;
    Workspace workspace;
    Matrix<Scalar> rows, result;
    std::optional<detail::GatheredHeads<Scalar>> all;
    check("SequenceParallel", [&](Agreed& agreed) {
      detail::check_shape("SequenceParallel", "the rows of this rank", mine, placement_.mine(), mine.cols());
      agreed.add("columns", mine.cols());
      rows = mine;
      result.resize(placement_.rows(), mine.cols());
      all.emplace(placement_, mine.cols(), 0, workspace);
    });
    const auto view = detail::view_of(rows);
    all->gather(communicator_, detail::columns_of(view, 0, rows.cols()), detail::columns_of(view, 0, 0));
    result = detail::columns_of(all->keys(), 0, rows.cols());
    return result;
  }

 private:
  static E& serial() {
    static E executor;
    return executor;
  }

  static SequencePlacement checked(C& communicator, Index rows, Index key_heads) {
    check_on_all(communicator, "SequenceParallel", [&](Agreed& agreed) {
      agreed.add("rows", rows);
      agreed.add("key_heads_at_a_time", key_heads);
      if (key_heads < 1) {
        detail::throw_invalid({"SequenceParallel: key_heads_at_a_time must be 1 or more, got ", key_heads});
      }
      SequencePlacement(rows, communicator.size(), communicator.rank());
      detail::reserve_in(communicator, 0);
    });
    return SequencePlacement(rows, communicator.size(), communicator.rank());
  }

  C& communicator_;
  E& executor_;
  SequencePlacement placement_;
  Index key_heads_;
  bool is_inner_ = false;               // within with_others()
  mutable bool thrown_on_all_ = false;  // by the last check()
};

template <Communicator C>
SequenceParallel(C&, Index) -> SequenceParallel<C, Serial>;

/// multihead_attention() of the whole sequence: q, k, v and out are this rank's rows of it. Collective.
template <typename Out, typename Q, typename K, typename V, AttentionMask Mask, Communicator C, Executor E>
void multihead_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                              const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v, Heads heads,
                              const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                              SequenceParallel<C, E>& ranks) {
  using Scalar = typename Q::Scalar;
  constexpr const char* kName = "multihead_attention";
  const detail::Readable<Q> q_read(q.derived());
  const detail::Readable<K> k_read(k.derived());
  const detail::Readable<V> v_read(v.derived());
  detail::SpreadCall<Scalar, Mask, SequenceParallel<C, E>> call(ranks, heads, 1, mask, workspace);
  call.check(kName, q_read, k_read, v_read, "out", out, Scalar(0), options);
  call.for_each_group(detail::view_of(k_read), detail::view_of(v_read), [&](const auto& group) {
    multihead_attention_into(group.results(detail::writable_view_of(out)), group.queries(detail::view_of(q_read)),
                             group.keys(), group.values(), group.heads, group.mask(), options, workspace,
                             ranks.local());
  });
}

/// multihead_diff_attention() of the whole sequence: q, k, v, out and a λ for every row are this rank's rows of it.
/// Collective.
template <typename Out, typename Q, typename K, typename V, typename Lambda, AttentionMask Mask, Communicator C,
          Executor E>
void multihead_diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                                   const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                                   Heads heads, const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                   SequenceParallel<C, E>& ranks) {
  using Scalar = typename Q::Scalar;
  constexpr const char* kName = "multihead_diff_attention";
  const detail::Readable<Q> q_read(q.derived());
  const detail::Readable<K> k_read(k.derived());
  const detail::Readable<V> v_read(v.derived());
  detail::SpreadCall<Scalar, Mask, SequenceParallel<C, E>> call(ranks, heads, 2, mask, workspace);
  call.check(kName, q_read, k_read, v_read, "out", out, lambda, options);
  call.for_each_group(detail::view_of(k_read), detail::view_of(v_read), [&](const auto& group) {
    multihead_diff_attention_into(group.results(detail::writable_view_of(out)), group.queries(detail::view_of(q_read)),
                                  group.keys(), group.values(), group.lambda(lambda), group.heads, group.mask(),
                                  options, workspace, ranks.local());
  });
}

/// diff_attention() of the whole sequence: all operands are this rank's rows of it. Collective.
template <typename Out, typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda,
          AttentionMask Mask, Communicator C, Executor E>
void diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q1>& q1,
                         const Eigen::MatrixBase<K1>& k1, const Eigen::MatrixBase<Q2>& q2,
                         const Eigen::MatrixBase<K2>& k2, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                         const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                         SequenceParallel<C, E>& ranks) {
  using Scalar = typename Q1::Scalar;
  const auto frame = workspace.frame();
  MatrixMap<Scalar> q(nullptr, 0, 0), k(nullptr, 0, 0);
  ranks.check("diff_attention", [&] {
    detail::check_shape("diff_attention", "q2", q2, q1.rows(), q1.cols());
    detail::check_shape("diff_attention", "k2", k2, k1.rows(), k1.cols());
    new (&q) MatrixMap<Scalar>(workspace.take<Scalar>(2 * q1.size()), q1.rows(), 2 * q1.cols());
    new (&k) MatrixMap<Scalar>(workspace.take<Scalar>(2 * k1.size()), k1.rows(), 2 * k1.cols());
    q << q1, q2;
    k << k1, k2;
  });
  multihead_diff_attention_into(out, q, k, v, lambda, Heads{1, 1}, mask, options, workspace, ranks);
}

/// The gradients of multihead_attention() of the whole sequence: {dq, dk, dv} of this rank's rows; dbias, if there is
/// one, is this rank's share. Collective.
template <typename Q, typename K, typename V, typename G, AttentionMask Mask, Communicator C, Executor E>
void multihead_attention_backward_into(const AttentionGradientViews<typename Q::Scalar>& gradients,
                                       const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                       const Eigen::MatrixBase<V>& v, const Eigen::MatrixBase<G>& dout, Heads heads,
                                       const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                       SequenceParallel<C, E>& ranks) {
  using Scalar = typename Q::Scalar;
  constexpr const char* kName = "multihead_attention_backward";
  const detail::Readable<Q> q_read(q.derived());
  const detail::Readable<K> k_read(k.derived());
  const detail::Readable<V> v_read(v.derived());
  const detail::Readable<G> g_read(dout.derived());
  detail::SpreadCall<Scalar, Mask, SequenceParallel<C, E>> call(ranks, heads, 1, mask, workspace);
  call.check(kName, q_read, k_read, v_read, "dout", g_read, Scalar(0), options, detail::Direction::backward);
  call.for_each_group_back(
      detail::view_of(k_read), detail::view_of(v_read), gradients.dk, gradients.dv, [&](const auto& group) {
        AttentionGradientViews<Scalar> of_group{group.queries(gradients.dq), group.dkeys(), group.dvalues()};
        group.set_bias_gradient(of_group, gradients);
        multihead_attention_backward_into(of_group, group.queries(detail::view_of(q_read)), group.keys(),
                                          group.values(), group.results(detail::view_of(g_read)), group.heads,
                                          group.mask(), options, workspace, ranks.local());
      });
}

/// The gradients of multihead_diff_attention() of the whole sequence: {dq, dk, dv} of this rank's rows and dlambda,
/// which for a λ that is a number, as dbias, is this rank's share. Collective.
template <typename Q, typename K, typename V, typename Lambda, typename G, AttentionMask Mask, Communicator C,
          Executor E>
void multihead_diff_attention_backward_into(const DiffAttentionGradientViews<typename Q::Scalar>& gradients,
                                            const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                            const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                                            const Eigen::MatrixBase<G>& dout, Heads heads, const Mask& mask,
                                            const AttentionOptions& options, Workspace& workspace,
                                            SequenceParallel<C, E>& ranks) {
  using Scalar = typename Q::Scalar;
  constexpr const char* kName = "multihead_diff_attention_backward";
  const detail::Readable<Q> q_read(q.derived());
  const detail::Readable<K> k_read(k.derived());
  const detail::Readable<V> v_read(v.derived());
  const detail::Readable<G> g_read(dout.derived());
  detail::SpreadCall<Scalar, Mask, SequenceParallel<C, E>> call(ranks, heads, 2, mask, workspace);
  call.check(kName, q_read, k_read, v_read, "dout", g_read, lambda, options, detail::Direction::backward);
  constexpr bool kNumber = detail::is_scalar_lambda<Lambda>;
  if constexpr (kNumber) gradients.dlambda(0, 0) = 0;
  call.for_each_group_back(
      detail::view_of(k_read), detail::view_of(v_read), gradients.dk, gradients.dv, [&](const auto& group) {
        Scalar dlambda = 0;
        const auto differentiate = [&](DiffAttentionGradientViews<Scalar> of_group) {
          group.set_bias_gradient(of_group, gradients);
          multihead_diff_attention_backward_into(
              of_group, group.queries(detail::view_of(q_read)), group.keys(), group.values(), group.lambda(lambda),
              group.results(detail::view_of(g_read)), group.heads, group.mask(), options, workspace, ranks.local());
        };
        if constexpr (kNumber) {
          differentiate({group.queries(gradients.dq), group.dkeys(), group.dvalues(), dlambda});
          gradients.dlambda(0, 0) += dlambda;
        } else {
          differentiate({group.queries(gradients.dq), group.dkeys(), group.dvalues(),
                         detail::columns_of(gradients.dlambda, group.first_head, group.heads.num_heads)});
        }
      });
}

}  // namespace diffattn::inline v0_1
