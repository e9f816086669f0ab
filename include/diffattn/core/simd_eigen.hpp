#pragma once

// Eigen's packets under the names that the kernels use: what simd.hpp offers by default. No other header names an Eigen
// internal.

#include <Eigen/Core>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1::simd::eigen {

/// Eigen's widest vector of Scalar on this target.
template <typename Scalar>
using Packet = typename Eigen::internal::packet_traits<Scalar>::type;

/// Scalars in a packet: 8 floats with AVX2, 1 when Eigen is told not to vectorise.
template <typename Scalar>
inline constexpr Index kLanes = Eigen::internal::unpacket_traits<Packet<Scalar>>::size;

/// The number of vector registers of the target. A register tile must fit in them.
inline constexpr Index kRegisters = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS;

/// The packet at p, which is aligned to a packet.
template <typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> load(const Scalar* p) {
  return Eigen::internal::pload<Packet<Scalar>>(p);
}
/// The packet at p, aligned or not.
template <typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> loadu(const Scalar* p) {
  return Eigen::internal::ploadu<Packet<Scalar>>(p);
}
/// `value` in every lane.
template <typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> broadcast(const Scalar& value) {
  return Eigen::internal::pset1<Packet<Scalar>>(value);
}
/// Writes x to p, which is aligned to a packet.
template <typename Scalar>
EIGEN_ALWAYS_INLINE void store(Scalar* p, const Packet<Scalar>& x) {
  Eigen::internal::pstore(p, x);
}
/// Writes x to p, aligned or not.
template <typename Scalar>
EIGEN_ALWAYS_INLINE void storeu(Scalar* p, const Packet<Scalar>& x) {
  Eigen::internal::pstoreu(p, x);
}

/// a + b, lane by lane.
template <typename P>
EIGEN_ALWAYS_INLINE P add(const P& a, const P& b) {
  return Eigen::internal::padd(a, b);
}
/// a − b, lane by lane.
template <typename P>
EIGEN_ALWAYS_INLINE P sub(const P& a, const P& b) {
  return Eigen::internal::psub(a, b);
}
/// a·b, lane by lane.
template <typename P>
EIGEN_ALWAYS_INLINE P mul(const P& a, const P& b) {
  return Eigen::internal::pmul(a, b);
}
/// a·b + c, rounded once where the target has such an instruction.
template <typename P>
EIGEN_ALWAYS_INLINE P fma(const P& a, const P& b, const P& c) {
  return Eigen::internal::pmadd(a, b, c);
}
/// Whether fma() rounds once.
#if defined(EIGEN_VECTORIZE_FMA) || defined(__ARM_FEATURE_FMA)
inline constexpr bool kFusesMultiplyAdd = true;
#else
inline constexpr bool kFusesMultiplyAdd = false;
#endif
/// The larger of the two; `a` where either is NaN (NaN on targets whose instruction says so).
template <typename P>
EIGEN_ALWAYS_INLINE P max(const P& a, const P& b) {
  return Eigen::internal::pmax(a, b);
}
/// The first lane.
template <typename P>
EIGEN_ALWAYS_INLINE auto first(const P& a) {
  return Eigen::internal::pfirst(a);
}
/// Returns x, and hides from the compiler how x was computed. Without it -fassociative-math, a part of -ffast-math,
/// would simplify (x + c) − c to x. Costs nothing.
template <typename P>
EIGEN_ALWAYS_INLINE P barrier(P x) {
#if defined(__x86_64__) || defined(__SSE__)
  asm("" : "+v"(x));
#elif defined(__aarch64__) || defined(__ARM_NEON)
  asm("" : "+w"(x));
#elif defined(__GNUC__) && !defined(__clang__)
  x = __builtin_assoc_barrier(x);
#endif
  return x;
}

/// The largest lane.
template <typename P>
EIGEN_ALWAYS_INLINE auto reduce_max(const P& a) {
  return Eigen::internal::predux_max(a);
}
/// The sum of all lanes.
template <typename P>
EIGEN_ALWAYS_INLINE auto reduce_add(const P& a) {
  return Eigen::internal::predux(a);
}

// GCC notes that a template argument loses the vector attribute; PacketBlock is Eigen's own and means the same without.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
/// Transposes the kLanes x kLanes matrix whose row r is rows[r].
template <typename Scalar>
EIGEN_ALWAYS_INLINE void transpose(Packet<Scalar> (&rows)[kLanes<Scalar>]) {
  constexpr Index kSize = kLanes<Scalar>;
  if constexpr (kSize > 1) {
    Eigen::internal::PacketBlock<Packet<Scalar>, kSize> block;
    for (int r = 0; r < kSize; ++r) block.packet[r] = rows[r];
    Eigen::internal::ptranspose(block);
    for (int r = 0; r < kSize; ++r) rows[r] = block.packet[r];
  }
}
#pragma GCC diagnostic pop

}  // namespace diffattn::inline v0_1::simd::eigen
