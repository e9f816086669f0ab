#pragma once

// The one door to SIMD: Eigen's packets under the names that the kernels use. The same kernel text compiles for SSE2,
// AVX2, AVX-512 and NEON, float and double; what changes is Packet<Scalar>. No other header names an Eigen internal.

#include <Eigen/Core>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
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
/// The compilers' own vector of kBytes bytes: Eigen has packets of 16-bit types on some targets only.
template <typename T, std::size_t kBytes>
struct CompilerVector {
  typedef T Type __attribute__((vector_size(kBytes)));
};

/// The bits of a packet of floats from as many 16-bit values, in the low half of each lane.
template <typename P>
EIGEN_ALWAYS_INLINE auto spread_bits(const void* p) {
  using Bits = typename CompilerVector<std::uint32_t, sizeof(P)>::Type;
  // GCC 12 splits the conversion below in two where there is an instruction for it.
#if defined(__AVX2__)
  if constexpr (sizeof(P) == 32) {
    return __builtin_bit_cast(Bits, _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  } else
#endif
#if defined(__AVX512F__)
      if constexpr (sizeof(P) == 64) {
    return __builtin_bit_cast(Bits, _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
  } else
#endif
  {
    typename CompilerVector<std::uint16_t, sizeof(P) / 2>::Type narrow;
    std::memcpy(&narrow, p, sizeof(narrow));
    return __builtin_convertvector(narrow, Bits);
  }
}

template <typename P>
EIGEN_ALWAYS_INLINE P widen(const Eigen::bfloat16* p) {
  return __builtin_bit_cast(P, spread_bits<P>(p) << 16);
}

template <typename P>
EIGEN_ALWAYS_INLINE P widen(const Eigen::half* p) {
#if defined(__F16C__)
  if constexpr (sizeof(P) == 32) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(P) == 64) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#endif
  // Exponent and fraction move into place; a multiplication corrects the bias, and normalises what is subnormal.
  const auto bits = spread_bits<P>(p), magnitude = (bits & 0x7fffu) << 13;
  const P scaled = Eigen::internal::pmul(__builtin_bit_cast(P, magnitude), Eigen::internal::pset1<P>(0x1p112f));
  const auto infinite = __builtin_bit_cast(decltype(bits), magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return __builtin_bit_cast(P, __builtin_bit_cast(decltype(bits), scaled) | infinite | ((bits & 0x8000u) << 16));
}

/// kLanes<Scalar> values that are stored as T, which is no wider: they are widened exactly. Any alignment.
template <typename Scalar, typename T>
EIGEN_ALWAYS_INLINE Packet<Scalar> load_as(const T* p) {
  constexpr bool kSixteenBits = std::is_same_v<T, Eigen::bfloat16> || std::is_same_v<T, Eigen::half>;
  if constexpr (std::is_same_v<Scalar, T>) {
    return loadu(p);
#ifdef __AVX512F__
    // Written out for x86, where GCC 12 makes three to eight instructions of the compilers' own conversion.
  } else if constexpr (kSixteenBits && std::is_same_v<Scalar, float> && kLanes<float> == 16) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (std::is_same_v<T, Eigen::half>) return _mm512_cvtph_ps(narrow);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
#endif
#ifdef __AVX2__
  } else if constexpr (std::is_same_v<T, Eigen::bfloat16> && std::is_same_v<Scalar, float> && kLanes<float> == 8) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
#endif
#ifdef __F16C__
  } else if constexpr (std::is_same_v<T, Eigen::half> && std::is_same_v<Scalar, float> && kLanes<float> == 8) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
  } else if constexpr (kSixteenBits && std::is_same_v<Scalar, float> && kLanes<float> > 1) {
    return widen<Packet<float>>(p);
  } else {
    alignas(64) Scalar wide[kLanes<Scalar>];
    for (Index i = 0; i < kLanes<Scalar>; ++i) wide[i] = static_cast<Scalar>(p[i]);
    return load(wide);
  }
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

/// Asks for the cache line at `p`, to be read or written soon. Any address will do.
EIGEN_ALWAYS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
/// The same for the line `offset` values after p, whatever is there.
template <typename T>
EIGEN_ALWAYS_INLINE void prefetch(const T* p, Index offset) {
  const auto bytes = static_cast<std::uintptr_t>(offset * static_cast<Index>(sizeof(T)));
  prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + bytes));
}

}  // namespace diffattn::inline v0_1::simd
