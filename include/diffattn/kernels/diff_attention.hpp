#pragma once

// Differential attention, eq. (1) of "Differential Transformer" (Ye et al., arXiv 2410.05258):
//
//   (softmax(s·Q1 K1ᵀ + bias) − λ·softmax(s·Q2 K2ᵀ + bias)) V,      s = 1/sqrt(d) unless the options say otherwise
//
//   diff_attention(q1, k1, q2, k2, v, lambda, mask, options)          → n_q x dv      one head
//   multihead_diff_attention(q, k, v, lambda, heads, mask, options)   → n_q x H·dv    H heads, side by side
//   diff_attention_into(out, q1, k1, q2, k2, v, lambda, mask, options, workspace, executor)
//   multihead_diff_attention_into(out, q, k, v, lambda, heads, mask, options, workspace, executor)
//
// mask, options, workspace and executor can be left out, from the right: FullMask{}, {}, the thread's, Serial.
//
// Shapes     q1, q2 (n_q x d) · k1, k2 (n_k x d) · v (n_k x dv) → out (n_q x dv); any d, dv >= 1 (dv need not be 2d).
//            Multi-head: q (n_q x 2H·d), packed head 2h is Q1_h and 2h+1 is Q2_h; k (n_k x 2G·d) likewise, or
//            (n_k x G·d) when both maps share their keys (DIFF V2); v (n_k x G·dv) → out (n_q x H·dv). That is
//            the layout of the official multihead_flashdiff_*.py and, shared, of multihead_flashdiffv2.py.
// Noise      with heads.num_noise_heads = N < H, r = H/N heads share Q2 and so P2 (grouped differential attention,
//            arXiv 2510.06949): q is n_q x (H + N)·d, groups of r signal heads and their noise head (Heads,
//            options.hpp). P2 is computed once for them, unless the mask has a bias that may differ from head to head
//            (mask.hpp): then P2 is that of each head by itself. The result is that of pairs with Q2 repeated, bit for
//            bit.
// λ          any number, negative and above 1 included; or one for every query, n_q x 1 (n_q x H for several heads).
//            The difference is not renormalised: the rows of P1 − λ·P2 sum to 1 − λ.
// Operands, masks, errors, memory, threads: as attention.hpp says, and a panel of 2 · 48 · n_k scores a worker besides.
// bfloat16   as there; λ is a number or a matrix of float, and P1 − λ·P2 is what is rounded. So nothing is lost to the
//            subtraction, as it is where each of two attentions returns bfloat16.
// Cost       4·n_q·n_k·d + 2·n_q·n_k·dv FLOP a head over visible keys: with dv = 2d, that of two standard heads.
//            r heads that share their noise take 2·(r + 1)·n_q·n_k·d + 2·r·n_q·n_k·dv, 13/16 of it for r = 4, and no
//            more memory.

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/detail/forward/differential_block.hpp"
#include "diffattn/kernels/detail/forward/head_schedule.hpp"
#include "diffattn/kernels/detail/operands.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1 {

/// (softmax(s·q1 k1ᵀ) − λ·softmax(s·q2 k2ᵀ)) v, eq. (1): q1, q2 (n_q x d), k1, k2 (n_k x d), v (n_k x dv) → n_q x dv.
/// lambda: a number, or n_q x 1. Throws ShapeError.
template <typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda,
          AttentionMask Mask = FullMask>
Matrix<typename Q1::Scalar> diff_attention(const Eigen::MatrixBase<Q1>& q1, const Eigen::MatrixBase<K1>& k1,
                                           const Eigen::MatrixBase<Q2>& q2, const Eigen::MatrixBase<K2>& k2,
                                           const Eigen::MatrixBase<V>& v, const Lambda& lambda, const Mask& mask = {},
                                           const AttentionOptions& options = {}) {
  Matrix<typename Q1::Scalar> out(q1.rows(), v.cols());
  diff_attention_into(out, q1, k1, q2, k2, v, lambda, mask, options);
  return out;
}

/// H = heads.num_heads differential heads, G = heads.num_kv_heads of keys and values: q (n_q x 2H·d), its maps in the
/// order Q1, Q2 of head 0, Q1, Q2 of head 1, …; k (n_k x 2G·d) likewise, or (n_k x G·d), shared by both maps;
/// v (n_k x G·dv); lambda a number, or n_q x H → n_q x H·dv. Throws ShapeError, and std::invalid_argument for heads
/// that cannot be grouped.
template <typename Q, typename K, typename V, typename Lambda, AttentionMask Mask = FullMask>
Matrix<typename Q::Scalar> multihead_diff_attention(const Eigen::MatrixBase<Q>& q, const Eigen::MatrixBase<K>& k,
                                                    const Eigen::MatrixBase<V>& v, const Lambda& lambda, Heads heads,
                                                    const Mask& mask = {}, const AttentionOptions& options = {}) {
  Matrix<typename Q::Scalar> out(q.rows(),
                                 detail::output_cols("multihead_diff_attention", heads, detail::operand("v", v)));
  multihead_diff_attention_into(out, q, k, v, lambda, heads, mask, options);
  return out;
}

/// diff_attention(), written to `out`, which must be n_q x dv.
template <typename Out, typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda,
          AttentionMask Mask = FullMask>
void diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q1>& q1,
                         const Eigen::MatrixBase<K1>& k1, const Eigen::MatrixBase<Q2>& q2,
                         const Eigen::MatrixBase<K2>& k2, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                         const Mask& mask = {}, const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  diff_attention_into(out, q1, k1, q2, k2, v, lambda, mask, options, workspace);
}

/// diff_attention(), with scratch from `workspace`, on the threads of `executor`.
template <typename Out, typename Q1, typename K1, typename Q2, typename K2, typename V, typename Lambda,
          AttentionMask Mask, Executor E = Serial>
void diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q1>& q1,
                         const Eigen::MatrixBase<K1>& k1, const Eigen::MatrixBase<Q2>& q2,
                         const Eigen::MatrixBase<K2>& k2, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                         const Mask& mask, const AttentionOptions& options, Workspace& workspace, E&& executor = {}) {
  using Scalar = typename Q1::Scalar;
  using Result = typename Out::Scalar;
  detail::check_output_scalar<Scalar, Out>();
  auto operands =
      detail::operands_of<Result>("diff_attention", q1, k1, q2, k2, v, lambda, detail::operand("out", out), mask, options);
  operands.in.out = detail::writable_view_of(out);
  detail::run_heads<detail::DifferentialBlock<Scalar, Result>>(operands.in, mask, workspace, executor);
}

/// multihead_diff_attention(), written to `out`, which must be n_q x H·dv.
template <typename Out, typename Q, typename K, typename V, typename Lambda, AttentionMask Mask = FullMask>
void multihead_diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                                   const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                                   Heads heads, const Mask& mask = {}, const AttentionOptions& options = {}) {
  detail::ThreadWorkspace workspace;
  multihead_diff_attention_into(out, q, k, v, lambda, heads, mask, options, workspace);
}

/// multihead_diff_attention(), with scratch from `workspace`, on the threads of `executor`.
template <typename Out, typename Q, typename K, typename V, typename Lambda, AttentionMask Mask, Executor E = Serial>
void multihead_diff_attention_into(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Q>& q,
                                   const Eigen::MatrixBase<K>& k, const Eigen::MatrixBase<V>& v, const Lambda& lambda,
                                   Heads heads, const Mask& mask, const AttentionOptions& options, Workspace& workspace,
                                   E&& executor = {}) {
  using Scalar = typename Q::Scalar;
  using Result = typename Out::Scalar;
  detail::check_output_scalar<Scalar, Out>();
  auto operands = detail::operands_of<Result>("multihead_diff_attention", q, k, v, lambda, detail::operand("out", out), heads,
                                      mask, options);
  operands.in.out = detail::writable_view_of(out);
  detail::run_heads<detail::DifferentialBlock<Scalar, Result>>(operands.in, mask, workspace, executor);
}

}  // namespace diffattn::inline v0_1
