#pragma once

// One call of attention over the ranks of a SequenceParallel: what all of them check together, and a group of key heads
// after another, gathered, with the query heads that read them.

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/distributed/collective_check.hpp"
#include "diffattn/distributed/detail/gathered_heads.hpp"
#include "diffattn/distributed/detail/placed_mask.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1::detail {

/// A group of key heads and the query heads that read them: views of its columns, of this rank's rows (queries, results,
/// λ) or of all rows (keys, values).
template <typename Scalar, typename Mask>
struct SpreadGroup {
  const Mask& of_all;
  const SequencePlacement& placement;
  const GatheredHeads<Scalar>& gathered;
  const GatheredHeads<Scalar>* gradients;  // null: forward
  Heads heads;
  Index first_head;
  Index first_query_head;  // packed
  Index query_heads;
  Index d, dv;

  PlacedMask<Mask> mask() const { return {of_all, placement, first_head, heads.num_heads}; }

  template <typename T>
  auto queries(const StridedView<T>& q) const {
    return columns_of(q, first_query_head * d, query_heads * d);
  }
  template <typename T>
  auto results(const StridedView<T>& out) const {
    return columns_of(out, first_head * dv, heads.num_heads * dv);
  }
  template <typename Lambda>
  auto lambda(const Lambda& all) const {
    if constexpr (is_scalar_lambda<Lambda>) {
      return all;
    } else {
      return all.middleCols(first_head, heads.num_heads);
    }
  }
  ConstColumns<Scalar> keys() const { return as_const(gathered.keys()); }
  ConstColumns<Scalar> values() const { return as_const(gathered.values()); }
  Columns<Scalar> dkeys() const { return columns_of(gradients->keys(), 0, gradients->keys().cols); }
  Columns<Scalar> dvalues() const { return columns_of(gradients->values(), 0, gradients->values().cols); }

  /// The rows of these heads in the gradient of a learned bias, if it is wanted.
  template <typename Views>
  void set_bias_gradient(Views& of_group, const Views& all) const {
    if (all.dbias) of_group.dbias = all.dbias->middle_rows(first_head, heads.num_heads);
  }

 private:
  static ConstColumns<Scalar> as_const(const StridedView<Scalar>& view) {
    return {view.data, view.rows, view.cols, {view.row_stride, view.col_stride}};
  }
};

/// Which way a call goes.
enum class Direction { forward, backward };

template <typename Scalar, typename Mask, typename Ranks>
class SpreadCall {
 public:
  SpreadCall(Ranks& ranks, const Heads& heads, Index query_maps, const Mask& mask, Workspace& workspace)
      : ranks_(ranks), heads_(heads), query_maps_(query_maps), mask_(mask), workspace_(workspace) {}

  /// Collective: throws on all ranks what is wrong on one, and where they disagree. `result`: out, or its gradient.
  template <typename Q, typename K, typename V, typename R, typename Lambda>
  void check(const char* where, const Q& q, const K& k, const V& v, const char* result_name, const R& result,
             const Lambda& lambda, const AttentionOptions& options, Direction direction = Direction::forward) {
    ranks_.check(where, [&](Agreed& agreed) {
      heads_ = checked_heads(where, heads_, query_maps_);
      const Index mine = ranks_.placement().mine(), kv_heads = heads_.num_kv_heads;
      const Index packed = heads_.query_heads(query_maps_);
      d_ = width_of(where, "q", q.cols(), packed);
      dv_ = width_of(where, "v", v.cols(), kv_heads);
      key_maps_ = query_maps_ == 2 && k.cols() == 2 * kv_heads * d_ ? 2 : 1;
      check_shape(where, "q, of this rank's rows,", q, mine, packed * d_);
      check_shape(where, "k, of this rank's rows,", k, mine, kv_heads * key_maps_ * d_);
      check_shape(where, "v, of this rank's rows,", v, mine, kv_heads * dv_);
      check_shape(where, result_name, result, mine, heads_.num_heads * dv_);
      if constexpr (!is_scalar_lambda<Lambda>) {
        check_shape(where, "lambda, of this rank's rows,", lambda, mine, heads_.num_heads);
      } else {
        agreed.add("lambda", static_cast<Scalar>(lambda));
      }
      check_mask(where, mask_, heads_.num_heads, ranks_.placement().rows(), ranks_.placement().rows());
      agreed.add("num_heads", heads_.num_heads);
      agreed.add("num_kv_heads", kv_heads);
      agreed.add("num_noise_heads", heads_.num_noise_heads);
      agreed.add("the width of a query", d_);
      agreed.add("the width of a value", dv_);
      agreed.add("how many maps of keys there are", key_maps_);
      agreed.add("the scale", scale_of<Scalar>(options, d_));
      add_mask(agreed, mask_);
      find_memory(direction);
    });
  }

  /// Gathers a group of key heads after another and calls f(group) for each, whose error on one rank is one on all.
  template <typename F>
  void for_each_group(const StridedView<const Scalar>& k, const StridedView<const Scalar>& v, const F& f) {
    run<false>(k, v, {}, {}, f);
  }

  /// The same, where f leaves gradients of all rows in group.dkeys() and group.dvalues(); this rank's are added up in dk
  /// and dv.
  template <typename F>
  void for_each_group_back(const StridedView<const Scalar>& k, const StridedView<const Scalar>& v,
                           const StridedView<Scalar>& dk, const StridedView<Scalar>& dv, const F& f) {
    run<true>(k, v, dk, dv, f);
  }

 private:
  /// What run() takes of the workspace between one check and the next, once: a rank that has no room for it is heard.
  void find_memory(Direction direction) {
    {
      const auto frame = workspace_.frame();
      take_groups_memory(direction);
    }
    static_cast<void>(workspace_.take<std::byte>(0));  // an empty workspace puts its blocks together when asked next
  }
  void take_groups_memory(Direction direction) {
    hold_workspace();
    const Index count = std::min(ranks_.key_heads_at_a_time(), heads_.num_kv_heads);
    const Index key_cols = count * key_maps_ * d_, value_cols = count * dv_;
    const SequencePlacement& placement = ranks_.placement();
    GatheredHeads<Scalar>(placement, key_cols, value_cols, workspace_);
    if (direction == Direction::forward) return;
    GatheredHeads<Scalar> gradients(placement, key_cols, value_cols, workspace_);
    gradients.find_memory(workspace_);
  }

  /// While something is taken, a workspace does not move what it has.
  void hold_workspace() { static_cast<void>(workspace_.take<std::byte>(1)); }

  static Index width_of(const char* where, const char* name, Index cols, Index parts) {
    if (cols < 1 || cols % parts != 0) {
      throw_shape({where, ": the columns of ", name, " must be a positive multiple of ", parts, ", got ", cols});
    }
    return cols / parts;
  }

  template <bool kBack, typename F>
  void run(const StridedView<const Scalar>& k, const StridedView<const Scalar>& v, const StridedView<Scalar>& dk,
           const StridedView<Scalar>& dv, const F& f) {
    auto& communicator = ranks_.communicator();
    const SequencePlacement& placement = ranks_.placement();
    const Index kv_heads = heads_.num_kv_heads, sharers = heads_.num_heads / kv_heads;
    const Index packed = heads_.query_heads(query_maps_) / kv_heads;  // of a key head
    const auto held = workspace_.frame();
    hold_workspace();
    for (Index first = 0; first < kv_heads; first += ranks_.key_heads_at_a_time()) {
      const auto frame = workspace_.frame();
      const Index count = std::min(ranks_.key_heads_at_a_time(), kv_heads - first);
      const Index key_width = key_maps_ * d_, key_cols = count * key_width, value_cols = count * dv_;
      GatheredHeads<Scalar> gathered(placement, key_cols, value_cols, workspace_);
      GatheredHeads<Scalar> gradients(placement, kBack ? key_cols : 0, kBack ? value_cols : 0, workspace_);
      gathered.gather(communicator, columns_of(k, first * key_width, key_cols), columns_of(v, first * dv_, value_cols));
      ranks_.check("attention", [&] {
        f(SpreadGroup<Scalar, Mask>{mask_,
                                    placement,
                                    gathered,
                                    kBack ? &gradients : nullptr,
                                    {count * sharers, count, count * heads_.num_noise_heads / kv_heads},
                                    first * sharers,
                                    first * packed,
                                    count * packed,
                                    d_,
                                    dv_});
      });
      if constexpr (kBack) {
        gradients.add_up(communicator, columns_of(dk, first * key_width, key_cols),
                         columns_of(dv, first * dv_, value_cols), workspace_);
      }
    }
  }

  Ranks& ranks_;
  Heads heads_;
  Index query_maps_;
  const Mask& mask_;
  Workspace& workspace_;
  Index d_ = 0, dv_ = 0, key_maps_ = 1;
};

}  // namespace diffattn::inline v0_1::detail
