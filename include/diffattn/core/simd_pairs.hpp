#pragma once

// Pairs of bfloat16, and what the register tile does with them: two neighbours along depth lie side by side in 32 bits,
// so that a packet of floats has a pair in every lane, and one instruction multiplies and adds both. AVX512_BF16 has it
// (Zen 4 and later, Sapphire Rapids and later). Elsewhere the same text widens a pair to two floats and multiplies them,
// which is slower than float and there to be tested: whoever multiplies bfloat16 packs it as PackedBfloat16.
//
// Rounding   float to bfloat16 is to nearest, ties to even; NaN stays NaN. Products are exact in float, and sums are
//            float's. The instruction takes subnormal numbers for 0, its operands and its sums; the text does not.

#include <Eigen/Core>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/simd.hpp"

namespace diffattn::inline v0_1::simd {

/// Two values that are next to each other along depth.
struct Pair {
  Eigen::bfloat16 first;
  Eigen::bfloat16 second;
};
static_assert(sizeof(Pair) == sizeof(float) && std::is_trivially_copyable_v<Pair>);

/// Whether packets of this target have an instruction that multiplies pairs.
#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512BF16__)
inline constexpr bool kHasPairInstruction = sizeof(Packet<float>) == 64;
#else
inline constexpr bool kHasPairInstruction = false;
#endif

/// Whether bfloat16 is packed in pairs. Compiled for another target's packets (simd_vectors.hpp), it is in any case, so
/// that every machine tests them.
#ifdef DIFFATTN_PACKET_BYTES
inline constexpr bool kUsesPairs = true;
#else
inline constexpr bool kUsesPairs = kHasPairInstruction;
#endif

/// What bfloat16 is packed as, to be multiplied: pairs, or floats that have been rounded.
using PackedBfloat16 = std::conditional_t<kUsesPairs, Pair, float>;

/// A packet of kLanes<float> pairs.
struct PairPacket {
  Packet<float> bits;
};

/// Unsigned integers, as many as there are floats in a packet.
using FloatBits = CompilerVector<std::uint32_t, sizeof(Packet<float>)>::Type;

/// The packet of what a tile multiplies: at p, which is aligned to a packet.
template <typename Operand>
EIGEN_ALWAYS_INLINE auto load_operand(const Operand* p) {
  if constexpr (!std::is_same_v<Operand, Pair>) {
    return load(p);
  } else if constexpr (kLanes<float> == 1) {
    PairPacket x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  } else {
    return PairPacket{load(reinterpret_cast<const float*>(p))};
  }
}
/// The pairs at p, aligned or not.
EIGEN_ALWAYS_INLINE PairPacket loadu_pairs(const void* p) {
  PairPacket x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
/// What is at p, a scalar or a pair, in every lane. Any alignment.
template <typename Operand>
EIGEN_ALWAYS_INLINE auto broadcast_operand(const Operand* p) {
  if constexpr (!std::is_same_v<Operand, Pair>) {
    return broadcast(*p);
  } else {
    float bits;
    std::memcpy(&bits, p, sizeof(bits));
    return PairPacket{broadcast(bits)};
  }
}
/// Writes x to p, aligned or not.
EIGEN_ALWAYS_INLINE void storeu_pairs(Pair* p, const PairPacket& x) {
  std::memcpy(static_cast<void*>(p), &x, sizeof(x));
}
/// Writes x to p, which is aligned to a packet.
EIGEN_ALWAYS_INLINE void store_pairs(Pair* p, const PairPacket& x) {
  if constexpr (kLanes<float> == 1) {
    storeu_pairs(p, x);
  } else {
    store(reinterpret_cast<float*>(p), x.bits);
  }
}

/// The first value of every pair, and the second. Exact.
EIGEN_ALWAYS_INLINE Packet<float> first_of_pairs(const PairPacket& x) {
  return __builtin_bit_cast(Packet<float>, __builtin_bit_cast(FloatBits, x.bits) << 16);
}
EIGEN_ALWAYS_INLINE Packet<float> second_of_pairs(const PairPacket& x) {
  return __builtin_bit_cast(Packet<float>, __builtin_bit_cast(FloatBits, x.bits) & 0xffff0000u);
}

/// Both numbers of the pairs of one packet of Scalar, from p on.
template <typename Scalar>
struct WidenedPairs {
  Packet<Scalar> first;
  Packet<Scalar> second;
};
template <typename Scalar>
EIGEN_ALWAYS_INLINE WidenedPairs<Scalar> widen_pairs(const Pair* p) {
  if constexpr (std::is_same_v<Scalar, float>) {
    const PairPacket pairs = load_operand(p);
    return {first_of_pairs(pairs), second_of_pairs(pairs)};
  } else {
    alignas(kMostAlignment) Scalar first[kLanes<Scalar>], second[kLanes<Scalar>];
    for (Index lane = 0; lane < kLanes<Scalar>; ++lane) {
      first[lane] = static_cast<Scalar>(p[lane].first);
      second[lane] = static_cast<Scalar>(p[lane].second);
    }
    return {load(first), load(second)};
  }
}

/// a·b + c, lane by lane.
template <typename P>
EIGEN_ALWAYS_INLINE P multiply_add(const P& a, const P& b, const P& c) {
  return fma(a, b, c);
}
/// c + a₁·b₁ + a₀·b₀ for the pairs (a₀, a₁) and (b₀, b₁) of every lane, in the order of the instruction.
EIGEN_ALWAYS_INLINE Packet<float> multiply_add(const PairPacket& a, const PairPacket& b, const Packet<float>& c) {
#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512BF16__)
  if constexpr (kHasPairInstruction) {
    return _mm512_dpbf16_ps(c, __builtin_bit_cast(__m512bh, a.bits), __builtin_bit_cast(__m512bh, b.bits));
  }
#endif
  return fma(first_of_pairs(a), first_of_pairs(b), fma(second_of_pairs(a), second_of_pairs(b), c));
}

/// The bits of x rounded to bfloat16, in the upper half of every lane; the lower is 0.
EIGEN_ALWAYS_INLINE FloatBits rounded_bits(const Packet<float>& x) {
  const FloatBits bits = __builtin_bit_cast(FloatBits, x);
  const FloatBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  // What is added to a NaN could carry it to ±0; its bits are kept instead, and one that makes it quiet.
  const auto nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return (nan ? bits | 0x400000u : rounded) & 0xffff0000u;
}
/// x rounded to bfloat16 and widened again.
EIGEN_ALWAYS_INLINE Packet<float> round_to_bfloat16(const Packet<float>& x) {
  return __builtin_bit_cast(Packet<float>, rounded_bits(x));
}
/// Lane i: the pair of first[i] and second[i], rounded.
EIGEN_ALWAYS_INLINE PairPacket pairs_of(const Packet<float>& first, const Packet<float>& second) {
  return {__builtin_bit_cast(Packet<float>, (rounded_bits(first) >> 16) | rounded_bits(second))};
}
/// Lane i: the pair of first[i] and second[i]. Any alignment.
EIGEN_ALWAYS_INLINE PairPacket pairs_of(const Eigen::bfloat16* first, const Eigen::bfloat16* second) {
  if constexpr (kLanes<float> == 1) {
    const Pair pair{*first, *second};
    return loadu_pairs(&pair);
  } else {
    using P = Packet<float>;
    return {__builtin_bit_cast(P, spread_bits<P>(first) | (spread_bits<P>(second) << 16))};
  }
}

/// Every second lane of a and then of b, from lane kFirst on.
template <std::size_t kFirst, typename V, std::size_t... kLane>
EIGEN_ALWAYS_INLINE V every_second(const V& a, const V& b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kFirst + 2 * kLane)...);
}
/// The 2·kLanes<float> values at p as pairs of neighbours, rounded. Any alignment.
EIGEN_ALWAYS_INLINE PairPacket pairs_at(const float* p) {
  constexpr std::size_t kSize = static_cast<std::size_t>(kLanes<float>);
  using Lanes = CompilerVector<float, sizeof(Packet<float>)>::Type;
  const Lanes a = __builtin_bit_cast(Lanes, loadu(p)), b = __builtin_bit_cast(Lanes, loadu(p + kSize));
  const Lanes first = every_second<0>(a, b, std::make_index_sequence<kSize>{});
  const Lanes second = every_second<1>(a, b, std::make_index_sequence<kSize>{});
  return pairs_of(__builtin_bit_cast(Packet<float>, first), __builtin_bit_cast(Packet<float>, second));
}
EIGEN_ALWAYS_INLINE PairPacket pairs_at(const Eigen::bfloat16* p) { return loadu_pairs(p); }

/// The values of `first` and then of `second`, rounded, as pairs of neighbours.
EIGEN_ALWAYS_INLINE PairPacket pairs_of_neighbours(const Packet<float>& first, const Packet<float>& second) {
#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512BF16__)
  if constexpr (kHasPairInstruction) {
    return {__builtin_bit_cast(Packet<float>, _mm512_cvtne2ps_pbh(second, first))};
  }
#endif
  alignas(kMostAlignment) float values[2 * kLanes<float>];
  store(values, first);
  store(values + kLanes<float>, second);
  return pairs_at(values);
}

/// Stores a packet of floats, rounded to Result. Any alignment.
EIGEN_ALWAYS_INLINE void store_as(float* to, const Packet<float>& x) { storeu(to, x); }
EIGEN_ALWAYS_INLINE void store_as(Eigen::bfloat16* to, const Packet<float>& x) {
  if constexpr (kLanes<float> == 1) {
    *to = static_cast<Eigen::bfloat16>(first(x));
  } else {
#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512BF16__)
    if constexpr (kHasPairInstruction) {
      const __m256bh narrow = _mm512_cvtneps_pbh(x);
      std::memcpy(static_cast<void*>(to), &narrow, sizeof(narrow));
      return;
    }
#endif
    using Narrow = CompilerVector<std::uint16_t, sizeof(x) / 2>::Type;
    const Narrow narrow = __builtin_convertvector(rounded_bits(x) >> 16, Narrow);
    std::memcpy(static_cast<void*>(to), &narrow, sizeof(narrow));
  }
}

}  // namespace diffattn::inline v0_1::simd
