#pragma once

// The element types of a safetensors file, and how C++ types map to those that are read and written. A file may hold
// tensors of the others beside them.
//
// Tested by tests/io/safetensors_reader_test.cpp and safetensors_writer_test.cpp.

#include <Eigen/Core>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

#include "diffattn/core/version.hpp"

namespace diffattn::inline v0_1 {

enum class Dtype {
  F64,
  I64,
  F32,
  I32,
  F16,
  BF16,
  // known, but neither read nor written
  U64,
  C64,
  U32,
  I16,
  U16,
  I8,
  U8,
  BOOL,
  F8_E4M3,
  F8_E5M2,
  F8_E8M0,
  F8_E4M3FNUZ,
  F8_E5M2FNUZ,
  F6_E2M3,
  F6_E3M2,
  F4
};

namespace detail {

struct DtypeName {
  Dtype dtype;
  std::string_view name;
  std::size_t bits;             // of an element
  std::size_t size = bits / 8;  // bytes, where it has whole ones
};

inline constexpr DtypeName kDtypes[] = {{Dtype::F64, "F64", 64},
                                        {Dtype::I64, "I64", 64},
                                        {Dtype::F32, "F32", 32},
                                        {Dtype::I32, "I32", 32},
                                        {Dtype::F16, "F16", 16},
                                        {Dtype::BF16, "BF16", 16},
                                        {Dtype::U64, "U64", 64},
                                        {Dtype::C64, "C64", 64},
                                        {Dtype::U32, "U32", 32},
                                        {Dtype::I16, "I16", 16},
                                        {Dtype::U16, "U16", 16},
                                        {Dtype::I8, "I8", 8},
                                        {Dtype::U8, "U8", 8},
                                        {Dtype::BOOL, "BOOL", 8},
                                        {Dtype::F8_E4M3, "F8_E4M3", 8},
                                        {Dtype::F8_E5M2, "F8_E5M2", 8},
                                        {Dtype::F8_E8M0, "F8_E8M0", 8},
                                        {Dtype::F8_E4M3FNUZ, "F8_E4M3FNUZ", 8},
                                        {Dtype::F8_E5M2FNUZ, "F8_E5M2FNUZ", 8},
                                        {Dtype::F6_E2M3, "F6_E2M3", 6},
                                        {Dtype::F6_E3M2, "F6_E3M2", 6},
                                        {Dtype::F4, "F4", 4}};

inline std::optional<Dtype> dtype_from_name(std::string_view name) {
  for (const DtypeName& known : kDtypes) {
    if (known.name == name) return known.dtype;
  }
  return std::nullopt;
}

inline const DtypeName& describe(Dtype dtype) { return kDtypes[static_cast<std::size_t>(dtype)]; }

template <typename T>
inline constexpr bool has_dtype =
    std::is_same_v<T, double> || std::is_same_v<T, float> || std::is_same_v<T, Eigen::half> ||
    std::is_same_v<T, Eigen::bfloat16> || std::is_same_v<T, std::int64_t> || std::is_same_v<T, std::int32_t>;

template <typename T>
constexpr Dtype dtype_of() {
  static_assert(has_dtype<T>, "diffattn: safetensors hold double, float, Eigen::half, Eigen::bfloat16, int64 or int32");
  if constexpr (std::is_same_v<T, double>) return Dtype::F64;
  if constexpr (std::is_same_v<T, float>) return Dtype::F32;
  if constexpr (std::is_same_v<T, Eigen::half>) return Dtype::F16;
  if constexpr (std::is_same_v<T, Eigen::bfloat16>) return Dtype::BF16;
  if constexpr (std::is_same_v<T, std::int64_t>) return Dtype::I64;
  if constexpr (std::is_same_v<T, std::int32_t>) return Dtype::I32;
}

inline bool is_integer(Dtype dtype) { return dtype == Dtype::I64 || dtype == Dtype::I32; }
inline bool is_readable(Dtype dtype) { return dtype <= Dtype::BF16; }

/// Calls f with a value of the C++ type of `dtype`, which must be readable.
template <typename F>
decltype(auto) with_type_of(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::F64:
      return f(double{});
    case Dtype::F32:
      return f(float{});
    case Dtype::F16:
      return f(Eigen::half{});
    case Dtype::BF16:
      return f(Eigen::bfloat16{});
    case Dtype::I64:
      return f(std::int64_t{});
    default:
      return f(std::int32_t{});
  }
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
