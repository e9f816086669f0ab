#pragma once

// Where the gradients of a call go, and what those of a block of query rows are computed from: the packed head that all
// blocks read, and the sums that they add to.

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/detail/operands.hpp"

namespace diffattn::inline v0_1::detail {

/// The gradients of one call, by the names of what they are gradients of. of_k is the same view twice when the maps
/// share their keys.
template <typename Scalar, Index kMaps>
struct HeadGradients : HeadLayout {
  /// layout: that of the operands.
  HeadGradients(const HeadLayout& layout, const StridedView<const Scalar>& dout_) : HeadLayout(layout), dout(dout_) {}

  StridedView<const Scalar> dout;
  StridedView<Scalar> of_q[kMaps];
  StridedView<Scalar> of_k[kMaps];
  StridedView<Scalar> of_v;
  StridedView<Scalar> of_bias;  // the table of a learned bias; no data: its gradient is not wanted
  Scalar* d2 = nullptr;         // [head][query]: D of the second map (dλ = −D); one map has none

  StridedView<const Scalar> result(Index head) const { return value_head(dout, head); }
  StridedView<Scalar> queries(Index map, Index head) const { return query_head(of_q, map, head); }
  StridedView<Scalar> keys(Index map, Index kv_head) const { return key_head(of_k[map], kv_head); }
  StridedView<Scalar> values(Index kv_head) const { return value_head(of_v, kv_head); }
  Scalar* second_dots(Index head) const { return d2 + head * dout.rows; }

  bool shared_keys() const { return of_k[0].data == of_k[kMaps - 1].data; }
};

/// Keys and values of one head, packed once and read by every block of its query rows.
template <typename Scalar, Index kMaps>
struct BackwardHead {
  const Scalar* keys[kMaps] = {};         // strips of keys, for the scores
  const Scalar* key_columns[kMaps] = {};  // strips of columns, for dQ
  const Scalar* values = nullptr;         // strips of keys, for dA
  Index n_k = 0;
  Index d = 0;
  Index dv = 0;
  bool finite = true;  // everything in it
};

/// Where dK / s and dV of one head add up: [strip of columns][key][kCols]. The same dk twice when the maps share keys.
template <typename Scalar, Index kMaps>
struct KeyValueSums {
  Scalar* dk[kMaps] = {};
  Scalar* dv = nullptr;
  Index padded_keys = 0;
};

}  // namespace diffattn::inline v0_1::detail
