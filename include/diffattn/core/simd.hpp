#pragma once

// The one door to SIMD: Eigen's packets under the names that the kernels use. The same kernel text compiles for SSE2,
// AVX2, AVX-512 and NEON, float and double; what changes is Packet<Scalar>. No other header names an Eigen internal.

#include <Eigen/Core>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1::simd {

template <typename Scalar>
using Packet = typename Eigen::internal::packet_traits<Scalar>::type;

/// Scalars in a packet: 8 floats with AVX2, 1 when Eigen is told not to vectorise.
template <typename Scalar>
inline constexpr Index kLanes = Eigen::internal::unpacket_traits<Packet<Scalar>>::size;

/// Vector registers of the target, which bounds a register tile.
inline constexpr Index kRegisters = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS;

template <typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> load(const Scalar* p) {  // p aligned to the packet
  return Eigen::internal::pload<Packet<Scalar>>(p);
}
template <typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> loadu(const Scalar* p) {
  return Eigen::internal::ploadu<Packet<Scalar>>(p);
}
template <typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> broadcast(const Scalar& value) {
  return Eigen::internal::pset1<Packet<Scalar>>(value);
}
template <typename Scalar>
EIGEN_ALWAYS_INLINE void store(Scalar* p, const Packet<Scalar>& x) {  // p aligned to the packet
  Eigen::internal::pstore(p, x);
}
template <typename Scalar>
EIGEN_ALWAYS_INLINE void storeu(Scalar* p, const Packet<Scalar>& x) {
  Eigen::internal::pstoreu(p, x);
}

template <typename P>
EIGEN_ALWAYS_INLINE P add(const P& a, const P& b) {
  return Eigen::internal::padd(a, b);
}
template <typename P>
EIGEN_ALWAYS_INLINE P sub(const P& a, const P& b) {
  return Eigen::internal::psub(a, b);
}
template <typename P>
EIGEN_ALWAYS_INLINE P mul(const P& a, const P& b) {
  return Eigen::internal::pmul(a, b);
}
/// a·b + c, fused where the target can.
template <typename P>
EIGEN_ALWAYS_INLINE P fma(const P& a, const P& b, const P& c) {
  return Eigen::internal::pmadd(a, b, c);
}
/// The larger of the two; `a` where either is NaN (NaN on targets whose instruction says so).
template <typename P>
EIGEN_ALWAYS_INLINE P max(const P& a, const P& b) {
  return Eigen::internal::pmax(a, b);
}
template <typename P>
EIGEN_ALWAYS_INLINE auto first(const P& a) {
  return Eigen::internal::pfirst(a);
}
template <typename P>
EIGEN_ALWAYS_INLINE auto reduce_max(const P& a) {
  return Eigen::internal::predux_max(a);
}
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
  if constexpr (kLanes < Scalar >> 1) {
    Eigen::internal::PacketBlock<Packet<Scalar>, kLanes<Scalar>> block;
    for (int r = 0; r < kLanes<Scalar>; ++r) block.packet[r] = rows[r];
    Eigen::internal::ptranspose(block);
    for (int r = 0; r < kLanes<Scalar>; ++r) rows[r] = block.packet[r];
  }
}
#pragma GCC diagnostic pop

/// Shifts the bit pattern of every lane left by N: how an integer in the low bits becomes an exponent.
template <int N, typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> shift_bits_left(const Packet<Scalar>& x) {
  using Bits = std::conditional_t<sizeof(Scalar) == 4, std::uint32_t, std::uint64_t>;
  if constexpr (sizeof(x) == sizeof(Bits)) {
    return std::bit_cast<Scalar>(std::bit_cast<Bits>(x) << N);
  } else {
    // Eigen 3.4 has no packet of 64-bit integers; the compilers' own vectors shift on every target.
    typedef Bits BitsPacket __attribute__((vector_size(sizeof(x))));
    return __builtin_bit_cast(Packet<Scalar>, __builtin_bit_cast(BitsPacket, x) << N);
  }
}

/// Asks for the cache line at `p`, to be read some microseconds from now: into the second-level cache, since it would
/// not last in the first.
EIGEN_ALWAYS_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace diffattn::inline v0_1::simd
