#pragma once

// Packets on the compilers' own vectors, of any width on any CPU. With them a machine can test the sizes of lanes,
// tiles and strips that another target has. simd.hpp uses them when DIFFATTN_PACKET_BYTES says how wide: 16, 32 or 64.
// They are slower than Eigen's, and every aligned load and store checks its address.

#include <Eigen/Core>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1::simd::vectors {

#ifdef DIFFATTN_PACKET_BYTES
/// Bytes of a packet.
inline constexpr std::size_t kBytes = DIFFATTN_PACKET_BYTES;
static_assert(kBytes == 16 || kBytes == 32 || kBytes == 64, "DIFFATTN_PACKET_BYTES must be 16, 32 or 64");
#else
inline constexpr std::size_t kBytes = 16;
#endif

/// Names the compilers' vector type of Scalar: an alias template cannot carry the attribute.
template <typename Scalar>
struct PacketOf {
  typedef Scalar Type __attribute__((vector_size(kBytes)));
};
/// The vector of kBytes bytes of Scalar.
template <typename Scalar>
using Packet = typename PacketOf<Scalar>::Type;

/// Scalars in a packet.
template <typename Scalar>
inline constexpr Index kLanes = static_cast<Index>(kBytes / sizeof(Scalar));

/// Vector registers of the targets with packets of this size: AVX-512 has 32, SSE and AVX have 16.
inline constexpr Index kRegisters = kBytes == 64 ? 32 : 16;

/// Throws std::logic_error unless p is aligned to a packet: the target that is being imitated would crash.
EIGEN_ALWAYS_INLINE void check_alignment(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % kBytes != 0) {
    throw std::logic_error("diffattn: a packet at an address that is not aligned to it");
  }
}

/// The packet at p, aligned or not.
template <typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> loadu(const Scalar* p) {
  Packet<Scalar> x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
/// The packet at p, which is aligned to a packet. Throws std::logic_error if it is not.
template <typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> load(const Scalar* p) {
  check_alignment(p);
  return loadu(p);
}
/// `value` in every lane.
template <typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> broadcast(const Scalar& value) {
  return value - Packet<Scalar>{};  // a difference, since −0 + 0 is +0
}
/// Writes x to p, aligned or not.
template <typename Scalar>
EIGEN_ALWAYS_INLINE void storeu(Scalar* p, const Packet<Scalar>& x) {
  std::memcpy(p, &x, sizeof(x));
}
/// Writes x to p, which is aligned to a packet. Throws std::logic_error if it is not.
template <typename Scalar>
EIGEN_ALWAYS_INLINE void store(Scalar* p, const Packet<Scalar>& x) {
  check_alignment(p);
  storeu(p, x);
}

/// a + b, lane by lane.
template <typename P>
EIGEN_ALWAYS_INLINE P add(const P& a, const P& b) {
  return a + b;
}
/// a − b, lane by lane.
template <typename P>
EIGEN_ALWAYS_INLINE P sub(const P& a, const P& b) {
  return a - b;
}
/// a·b, lane by lane.
template <typename P>
EIGEN_ALWAYS_INLINE P mul(const P& a, const P& b) {
  return a * b;
}
/// a·b + c, rounded once where the compiler fuses the two.
template <typename P>
EIGEN_ALWAYS_INLINE P fma(const P& a, const P& b, const P& c) {
  return a * b + c;
}
/// Whether fma() rounds once, whatever the compiler does.
inline constexpr bool kFusesMultiplyAdd = false;
/// The larger of the two; `a` where either is NaN.
template <typename P>
EIGEN_ALWAYS_INLINE P max(const P& a, const P& b) {
  return b > a ? b : a;
}
/// The first lane.
template <typename P>
EIGEN_ALWAYS_INLINE auto first(const P& a) {
  return a[0];
}

/// Returns x, and hides from the compiler how x was computed: see simd_eigen.hpp. An empty asm as there would need a
/// register as wide as the packet, which the target may not have.
template <typename P>
EIGEN_ALWAYS_INLINE P barrier(const P& x) {
#ifdef __clang__
  return __arithmetic_fence(x);
#else
  return __builtin_assoc_barrier(x);
#endif
}

/// All lanes combined to one: the upper half with the lower half, then again, as the instructions of the targets do.
template <typename P, typename Combine>
EIGEN_ALWAYS_INLINE auto reduce(P a, const Combine& combine) {
  for (std::size_t half = sizeof(P) / sizeof(a[0]) / 2; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) a[i] = combine(a[i], a[i + half]);
  }
  return a[0];
}
/// The largest lane.
template <typename P>
EIGEN_ALWAYS_INLINE auto reduce_max(const P& a) {
  return reduce(a, [](auto x, auto y) { return y > x ? y : x; });
}
/// The sum of all lanes.
template <typename P>
EIGEN_ALWAYS_INLINE auto reduce_add(const P& a) {
  return reduce(a, [](auto x, auto y) { return x + y; });
}

/// Transposes the kLanes x kLanes matrix whose row r is rows[r].
template <typename Scalar>
EIGEN_ALWAYS_INLINE void transpose(Packet<Scalar> (&rows)[kLanes<Scalar>]) {
  Scalar values[kLanes<Scalar>][kLanes<Scalar>];
  std::memcpy(&values, &rows, sizeof(values));
  for (Index r = 0; r < kLanes<Scalar>; ++r) {
    for (Index c = 0; c < kLanes<Scalar>; ++c) rows[r][c] = values[c][r];
  }
}

}  // namespace diffattn::inline v0_1::simd::vectors
