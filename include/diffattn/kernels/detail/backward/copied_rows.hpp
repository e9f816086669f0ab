#pragma once

// The rows of queries and of dout that a block of the backward pass works on, copied for its products: as rows, which
// meet keys and values, and as packed columns, which meet dS and A for dK and dV.

#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/backward/backward_operands.hpp"
#include "diffattn/kernels/detail/visible_pairs.hpp"
#include "diffattn/product/packed.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar, Index kMaps>
struct CopiedRows {
  Scalar* q_rows[kMaps];     // [row][d], scaled
  Scalar* q_columns[kMaps];  // [strip of d][row][kCols]
  Scalar* dout_rows;         // [row][dv]
  Scalar* dout_columns;      // [strip of dv][row][kCols]

  /// Takes memory for blocks of up to max_rows.
  CopiedRows(Workspace& workspace, const BackwardHead<Scalar, kMaps>& shape, Index max_rows)
      : dout_rows(workspace.take<Scalar>(max_rows * shape.dv)),
        dout_columns(workspace.take<Scalar>(packed_strips_size<Scalar>(shape.dv, max_rows))) {
    for (Index map = 0; map < kMaps; ++map) {
      q_rows[map] = workspace.take<Scalar>(max_rows * shape.d);
      q_columns[map] = workspace.take<Scalar>(packed_strips_size<Scalar>(shape.d, max_rows));
    }
  }

  /// Copies `rows`, queries of the first `maps` maps multiplied by `scale` where they are to meet keys. Returns whether
  /// all are finite.
  template <typename Mask>
  bool copy(const HeadOperands<Scalar, kMaps>& in, const HeadGradients<Scalar, kMaps>& grad, const RowRange<Mask>& rows,
            Index maps, Scalar scale) {
    const StridedView<const Scalar> dout = grad.result(rows.head).middle_rows(rows.first, rows.count);
    copy_rows(dout_rows, dout, Scalar(1));
    bool finite = pack_columns(dout_columns, rows.count, dout);
    for (Index map = 0; map < maps; ++map) {
      const StridedView<const Scalar> q = in.queries(map, rows.head).middle_rows(rows.first, rows.count);
      copy_rows(q_rows[map], q, scale);
      finite &= pack_columns(q_columns[map], rows.count, q);
    }
    return finite;
  }
};

}  // namespace diffattn::inline v0_1::detail
