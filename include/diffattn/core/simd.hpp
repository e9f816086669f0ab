#pragma once

// All SIMD of the library: packets of float or double, and what the kernels do with them. A packet is a vector register
// full of scalars; its lanes are the scalars in it. The same kernel text compiles for SSE2, AVX2, AVX-512 and NEON;
// only the type Packet<Scalar> changes.
//
//   simd_eigen.hpp     Eigen's packets, as wide as the target that Eigen sees: the default
//   simd_vectors.hpp   the compilers' own vectors with -DDIFFATTN_PACKET_BYTES=16, 32 or 64: packets as wide as those
//                      of another target, on any CPU, with the alignment of every packet checked; slow, for tests
//
// Both offer Packet, kLanes, kRegisters, load, loadu, store, storeu, broadcast, add, sub, mul, fma, kFusesMultiplyAdd,
// max, first, barrier, reduce_max, reduce_add and transpose. What is the same for both stands here. All translation
// units of a program must be compiled with the same packets.

#include <Eigen/Core>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/simd_eigen.hpp"
#include "diffattn/core/simd_vectors.hpp"

namespace diffattn::inline v0_1::simd {

#ifdef DIFFATTN_PACKET_BYTES
using namespace vectors;
#else
using namespace eigen;
#endif

/// The largest alignment in bytes that a packet of any target asks for. Scratch memory is aligned to it.
inline constexpr std::size_t kMostAlignment = 64;

/// The compilers' own vector of kBytes bytes: Eigen has packets of 16-bit types on some targets only.
template <typename T, std::size_t kBytes>
struct CompilerVector {
  typedef T Type __attribute__((vector_size(kBytes)));
};

/// The bits of a packet of floats from as many 16-bit values, in the low half of each lane.
template <typename P>
EIGEN_ALWAYS_INLINE auto spread_bits(const void* p) {
  using Bits = typename CompilerVector<std::uint32_t, sizeof(P)>::Type;
  // GCC 12 makes three to eight instructions of the conversion at the end, where the CPU has one that does it. The
  // macros are Eigen's, so that this header uses the instructions that Eigen uses and no others.
#ifdef EIGEN_VECTORIZE_AVX2
  if constexpr (sizeof(P) == 32) {
    return __builtin_bit_cast(Bits, _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  } else
#endif
#ifdef EIGEN_VECTORIZE_AVX512
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

/// A packet of floats from as many bfloat16 values. Exact; any alignment.
template <typename P>
EIGEN_ALWAYS_INLINE P widen(const Eigen::bfloat16* p) {
  return __builtin_bit_cast(P, spread_bits<P>(p) << 16);
}

/// A packet of floats from as many half values. Exact, subnormal, infinite and NaN ones too; any alignment.
template <typename P>
EIGEN_ALWAYS_INLINE P widen(const Eigen::half* p) {
#if defined(EIGEN_VECTORIZE_AVX2) && defined(__F16C__)
  if constexpr (sizeof(P) == 32) {
    return __builtin_bit_cast(P, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
#endif
#ifdef EIGEN_VECTORIZE_AVX512
  if constexpr (sizeof(P) == 64) {
    return __builtin_bit_cast(P, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
#endif
  // Exponent and fraction are shifted to their places in a float. A multiplication by 2^112 corrects the exponent's
  // bias and normalises subnormal values.
  const auto bits = spread_bits<P>(p), magnitude = (bits & 0x7fffu) << 13;
  const P scaled = mul(__builtin_bit_cast(P, magnitude), broadcast(0x1p112f));
  const auto infinite = __builtin_bit_cast(decltype(bits), magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return __builtin_bit_cast(P, __builtin_bit_cast(decltype(bits), scaled) | infinite | ((bits & 0x8000u) << 16));
}

/// kLanes<Scalar> values that are stored as T, a type no wider than Scalar, converted exactly. Any alignment.
template <typename Scalar, typename T>
EIGEN_ALWAYS_INLINE Packet<Scalar> load_as(const T* p) {
  constexpr bool kSixteenBits = std::is_same_v<T, Eigen::bfloat16> || std::is_same_v<T, Eigen::half>;
  if constexpr (std::is_same_v<Scalar, T>) {
    return loadu(p);
  } else if constexpr (kSixteenBits && std::is_same_v<Scalar, float> && kLanes<float> != 1) {
    return widen<Packet<float>>(p);
  } else if constexpr (std::is_same_v<Scalar, double> && std::is_same_v<T, float> && kLanes<double> != 1) {
    typename CompilerVector<float, sizeof(Packet<double>) / 2>::Type narrow;
    std::memcpy(&narrow, p, sizeof(narrow));
    using Wide = typename CompilerVector<double, sizeof(Packet<double>)>::Type;
    return __builtin_bit_cast(Packet<double>, __builtin_convertvector(narrow, Wide));
  } else {
    alignas(kMostAlignment) Scalar wide[kLanes<Scalar>];
    for (Index i = 0; i < kLanes<Scalar>; ++i) wide[i] = static_cast<Scalar>(p[i]);
    return load(wide);
  }
}

/// The kCount values at p, again and again: lane i is p[i % kCount]. Any alignment.
template <Index kCount, typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> repeat(const Scalar* p) {
  constexpr std::size_t kRepeatedBytes = kCount * sizeof(Scalar);
  using P = Packet<Scalar>;
  if constexpr (kCount == 1) {
    return broadcast(*p);
  } else if constexpr (kRepeatedBytes == 8) {
    std::uint64_t bits;
    std::memcpy(&bits, p, kRepeatedBytes);
    return __builtin_bit_cast(P, bits - typename CompilerVector<std::uint64_t, sizeof(P)>::Type{});
  } else {
#ifdef EIGEN_VECTORIZE_AVX512
    if constexpr (sizeof(P) == 64 && kRepeatedBytes == 16) {
      return __builtin_bit_cast(P, _mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p))));
    }
#endif
    alignas(kMostAlignment) Scalar values[kLanes<Scalar>];
    for (Index i = 0; i < kLanes<Scalar>; ++i) values[i] = p[i % kCount];
    return load(values);
  }
}

/// One half of the lanes of a and b, taken in turns: the lower with kFirst = 0, the upper with kFirst = kLanes / 2.
template <std::size_t kFirst, typename V, std::size_t... kLane>
EIGEN_ALWAYS_INLINE V interleaved_half(const V& a, const V& b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * sizeof...(kLane))...);
}
/// The lanes of a and b in turns, a's first: the first half of them in a, the second in b.
template <typename Scalar>
EIGEN_ALWAYS_INLINE void interleave(Packet<Scalar>& a, Packet<Scalar>& b) {
  constexpr std::size_t kSize = static_cast<std::size_t>(kLanes<Scalar>);
  using Lanes = typename CompilerVector<Scalar, sizeof(a)>::Type;
  const Lanes x = __builtin_bit_cast(Lanes, a), y = __builtin_bit_cast(Lanes, b);
  a = __builtin_bit_cast(Packet<Scalar>, interleaved_half<0>(x, y, std::make_index_sequence<kSize>{}));
  b = __builtin_bit_cast(Packet<Scalar>, interleaved_half<kSize / 2>(x, y, std::make_index_sequence<kSize>{}));
}

/// Stores a packet of doubles as as many Scalars, rounded to nearest. Any alignment.
template <typename Scalar>
EIGEN_ALWAYS_INLINE void store_as(Scalar* to, const Packet<double>& x) {
  if constexpr (std::is_same_v<Scalar, double>) {
    storeu(to, x);
  } else if constexpr (sizeof(x) == sizeof(double)) {
    *to = static_cast<Scalar>(first(x));
  } else {
    using Narrow = typename CompilerVector<Scalar, sizeof(x) / sizeof(double) * sizeof(Scalar)>::Type;
    const auto narrow =
        __builtin_convertvector(__builtin_bit_cast(typename CompilerVector<double, sizeof(x)>::Type, x), Narrow);
    std::memcpy(to, &narrow, sizeof(narrow));
  }
}

/// `then` in the lanes where x is y, `otherwise` in the others.
template <typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> select_equal(const Packet<Scalar>& x, const Packet<Scalar>& y,
                                                const Packet<Scalar>& then, const Packet<Scalar>& otherwise) {
  if constexpr (sizeof(x) == sizeof(Scalar)) {
    return x == y ? then : otherwise;
  } else {
    using Vector = typename CompilerVector<Scalar, sizeof(x)>::Type;
    const auto equal = __builtin_bit_cast(Vector, x) == __builtin_bit_cast(Vector, y);
    const Vector selected = equal ? __builtin_bit_cast(Vector, then) : __builtin_bit_cast(Vector, otherwise);
    return __builtin_bit_cast(Packet<Scalar>, selected);
  }
}

/// Shifts the bits of every lane left by N. So an integer in the low bits becomes the exponent of a float.
template <int N, typename Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> shift_bits_left(const Packet<Scalar>& x) {
  using Bits = std::conditional_t<sizeof(Scalar) == 4, std::uint32_t, std::uint64_t>;
  if constexpr (sizeof(x) == sizeof(Bits)) {
    return std::bit_cast<Scalar>(std::bit_cast<Bits>(x) << N);
  } else {
    // Eigen 3.4 has no packet of 64-bit integers; the compilers' own vectors shift on every target.
    using BitsPacket = typename CompilerVector<Bits, sizeof(x)>::Type;
    return __builtin_bit_cast(Packet<Scalar>, __builtin_bit_cast(BitsPacket, x) << N);
  }
}

/// Asks for the cache line at `p`, to be read or written soon. Any address is allowed: a bad one is ignored.
EIGEN_ALWAYS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
/// The same for the line `offset` values after p, which may lie outside the memory that p belongs to.
template <typename T>
EIGEN_ALWAYS_INLINE void prefetch(const T* p, Index offset) {
  const auto bytes = static_cast<std::uintptr_t>(offset * static_cast<Index>(sizeof(T)));
  prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + bytes));
}

}  // namespace diffattn::inline v0_1::simd
