#pragma once

// The element types of a safetensors file that the library knows, and how C++ types map to them.

#include <Eigen/Core>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

namespace diffattn::inline v0_1 {

enum class Dtype { F64, I64, F32, I32, F16, BF16 };

namespace detail {

struct DtypeName {
  Dtype dtype;
  std::string_view name;
  std::size_t size;  // bytes
};

inline constexpr DtypeName kDtypes[] = {{Dtype::F64, "F64", 8}, {Dtype::I64, "I64", 8}, {Dtype::F32, "F32", 4},
                                        {Dtype::I32, "I32", 4}, {Dtype::F16, "F16", 2}, {Dtype::BF16, "BF16", 2}};

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

/// Calls f with a value of the C++ type of `dtype`.
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
    case Dtype::I32:
      break;
  }
  return f(std::int32_t{});
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
