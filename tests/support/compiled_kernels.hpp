#pragma once

// The kernels and products that layers reach are compiled once for all tests, into the library of compiled/: every unit
// that includes this, which CMake sees to, calls them there and does not compile them again. What is not listed, other
// scalars, storage types and masks of kernels, is compiled where it is used, as in a user's program.
//
// Each macro declares (`extern template`) or, in compiled/, makes (`template`) the functions of one scalar.

#include <cstddef>

#include "diffattn/core/executor_view.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "diffattn/layers/detail/remembered_mask.hpp"
#include "diffattn/product/matmul.hpp"

#define DIFFATTN_HEADS(DECLARE, BLOCK, MASK)                                                                \
  DECLARE void run_viewed_heads<BLOCK, MASK, ExecutorView>(const BLOCK::Operands&, const MASK&, Workspace&, \
                                                           ExecutorView&);

#define DIFFATTN_CACHED_HEADS(DECLARE, BLOCK, STORED, MASK, EXECUTOR)                           \
  DECLARE void run_viewed_cached_heads<BLOCK, STORED, MASK, EXECUTOR, std::nullptr_t>(          \
      const BLOCK::Operands&, const KeyValuePages<STORED>&, const MASK&, Workspace&, EXECUTOR&, \
      const std::nullptr_t&);                                                                   \
  DECLARE void run_viewed_cached_rows<BLOCK::Operands, MASK, STORED, EXECUTOR>(                 \
      std::span<FewRows<BLOCK::Operands, MASK, PackedSource<STORED>>>, EXECUTOR&);

#define DIFFATTN_BACKWARD(DECLARE, SCALAR, MAPS, MASK)                      \
  DECLARE void run_viewed_heads_backward<SCALAR, MAPS, MASK, ExecutorView>( \
      const HeadOperands<SCALAR, MAPS>&, const HeadGradients<SCALAR, MAPS>&, const MASK&, Workspace&, ExecutorView&);

#define DIFFATTN_MATMUL(DECLARE, SCALAR, STORED, EXECUTOR)                                                           \
  DECLARE void matmul_transposed<SCALAR, STORED, EXECUTOR>(                                                          \
      const StridedView<SCALAR>&, const StridedView<const SCALAR>&, const StridedView<const STORED>&, const SCALAR*, \
      Workspace&, EXECUTOR&);

#define DIFFATTN_PRODUCTS(DECLARE, SCALAR, EXECUTOR)                                                             \
  DECLARE void multiply_all<SCALAR, SCALAR, EXECUTOR>(std::span<const Product<SCALAR>>, Workspace&, EXECUTOR&);  \
  DECLARE void multiply_thin<SCALAR, SCALAR, EXECUTOR>(std::span<const ThinOutput<SCALAR, SCALAR>>,              \
                                                       const StridedView<const SCALAR>&, Workspace&, EXECUTOR&); \
  DIFFATTN_MATMUL(DECLARE, SCALAR, SCALAR, EXECUTOR)                                                             \
  DIFFATTN_MATMUL(DECLARE, SCALAR, Eigen::bfloat16, EXECUTOR)

#define DIFFATTN_FORWARD_OF(DECLARE, SCALAR, BLOCK, PLAIN, BIASED)   \
  DIFFATTN_HEADS(DECLARE, BLOCK, FullMask)                           \
  DIFFATTN_HEADS(DECLARE, BLOCK, CausalMask)                         \
  DIFFATTN_HEADS(DECLARE, BLOCK, PLAIN)                              \
  DIFFATTN_HEADS(DECLARE, BLOCK, BIASED)                             \
  DIFFATTN_CACHED_HEADS(DECLARE, BLOCK, SCALAR, PLAIN, Serial)       \
  DIFFATTN_CACHED_HEADS(DECLARE, BLOCK, SCALAR, PLAIN, ExecutorView) \
  DIFFATTN_CACHED_HEADS(DECLARE, BLOCK, SCALAR, BIASED, Serial)

#define DIFFATTN_BACKWARD_OF(DECLARE, SCALAR, PLAIN)            \
  DIFFATTN_BACKWARD(DECLARE, SCALAR, 1, PLAIN)                  \
  DIFFATTN_BACKWARD(DECLARE, SCALAR, 2, PLAIN)                  \
  DIFFATTN_BACKWARD(DECLARE, SCALAR, 1, RememberedMask::Biased) \
  DIFFATTN_BACKWARD(DECLARE, SCALAR, 2, RememberedMask::Biased) \
  DIFFATTN_PRODUCTS(DECLARE, SCALAR, Serial)                    \
  DIFFATTN_PRODUCTS(DECLARE, SCALAR, ExecutorView)

namespace diffattn::inline v0_1::detail {

template <typename Scalar>
using PlainMaskView = MaskView<Scalar, false>;
template <typename Scalar>
using BiasedMaskView = MaskView<Scalar, true>;

#define DIFFATTN_KERNELS_OF(DECLARE, SCALAR)                                                                 \
  DIFFATTN_FORWARD_OF(DECLARE, SCALAR, StandardBlock<SCALAR>, PlainMaskView<SCALAR>, BiasedMaskView<SCALAR>) \
  DIFFATTN_FORWARD_OF(DECLARE, SCALAR, DifferentialBlock<SCALAR>, PlainMaskView<SCALAR>, BiasedMaskView<SCALAR>)

DIFFATTN_KERNELS_OF(extern template, float)
DIFFATTN_KERNELS_OF(extern template, double)
DIFFATTN_BACKWARD_OF(extern template, float, PlainMaskView<float>)
DIFFATTN_BACKWARD_OF(extern template, double, PlainMaskView<double>)

}  // namespace diffattn::inline v0_1::detail
