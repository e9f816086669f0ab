#pragma once

// What the gradients of a block of query rows are computed from, and where they go: the packed head that all blocks
// read, the sums that its blocks add to, and the rows of one block.

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/detail/lambda_view.hpp"

namespace diffattn::inline v0_1::detail {

/// The gradients of one call; columns as in HeadOperands. dk is the same view twice when the maps share their keys.
template <typename Scalar, Index kMaps>
struct HeadGradients {
  StridedView<const Scalar> dout;
  StridedView<Scalar> dq[kMaps];
  StridedView<Scalar> dk[kMaps];
  StridedView<Scalar> dv;

  bool shared_keys() const { return dk[0].data == dk[kMaps - 1].data; }
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

/// The operands and results of one block: its rows of each.
template <typename Scalar, Index kMaps>
struct BackwardRows {
  StridedView<const Scalar> q[kMaps];
  StridedView<const Scalar> dout;
  StridedView<Scalar> dq[kMaps];
  Scalar* d2 = nullptr;  // one value a row: D of the second map
  LambdaView<Scalar> lambda;
  Index head_index = 0;  // of λ
};

}  // namespace diffattn::inline v0_1::detail
