#pragma once

// A layer's parameters in a safetensors file, under the names that visit_parameters gives them.
//
//   load_parameters(layer, file, "weight.");       every parameter that visit_parameters(layer, …) names
//   save_parameters(layer, path, "weight.");       loads in PyTorch's safetensors
//
// Errors   load_parameters reports every missing, surplus and mis-shaped tensor in one FormatError, and under which
//          prefix the layer is there if it was forgotten. Whatever it throws, std::bad_alloc included, the layer is as
//          it was.
//          save_parameters: std::runtime_error if the file cannot be written; it is there whole or as it was.

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/io/dtype.hpp"
#include "diffattn/io/safetensors_header.hpp"
#include "diffattn/io/safetensors_reader.hpp"
#include "diffattn/io/safetensors_writer.hpp"
#include "diffattn/layers/parameters.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// The shape that a parameter has in a file.
template <typename Derived>
std::vector<Index> stored_shape(const Eigen::DenseBase<Derived>& parameter) {
  if constexpr (Derived::IsVectorAtCompileTime) {
    return {parameter.size()};
  } else {
    return {parameter.rows(), parameter.cols()};
  }
}

/// What is wrong with a tensor that must be there, of this shape and of floating-point values; empty if nothing is.
/// Tensors: Safetensors or ShardedSafetensors.
template <typename Tensors>
std::string mismatch(const Tensors& tensors, const std::string& name, const std::vector<Index>& shape) {
  if (!tensors.contains(name)) return "missing: " + in_quotes(name);
  const TensorInfo& info = tensors.info(name);
  if (info.shape != shape) {
    return "shape: " + in_quotes(name) + " must be " + shape_text(shape) + ", got " + shape_text(info.shape);
  }
  if (is_integer(info.dtype) || !is_readable(info.dtype)) {
    return "type: " + in_quotes(name) + " must hold floating-point values" +
           (is_integer(info.dtype) ? "" : " of type F64, F32, F16 or BF16") + ", got " +
           std::string(describe(info.dtype).name);
  }
  return "";
}

/// Where the values of a parameter go, whatever its type.
class Destination {
 public:
  Destination() = default;
  template <typename Parameter>
  explicit Destination(Parameter& parameter)
      : to_(parameter.data()), read_([](const Safetensors& file, const std::string& name, void* to) {
          file.read(name, static_cast<typename Parameter::Scalar*>(to));
        }) {
    static_assert(Parameter::IsRowMajor || Parameter::IsVectorAtCompileTime,
                  "diffattn: a parameter must be row-major, as diffattn::Matrix is");
  }

  /// Does not allocate.
  void read(const Safetensors& file, const std::string& name) const { read_(file, name, to_); }

 private:
  void* to_ = nullptr;
  void (*read_)(const Safetensors& file, const std::string& name, void* to) = nullptr;
};

/// Under which prefix, if not under the one that was given, a file holds all parameters of these names: what is to be
/// said of a prefix that was forgotten; empty if there is none.
inline std::string other_prefix(const Safetensors& file, const std::vector<std::string>& names) {
  std::string first;
  std::size_t others = 0;
  for (const auto& [name, info] : file.tensors()) {
    if (names.empty() || !std::string_view(name).ends_with(names.front())) continue;
    const std::string prefix = name.substr(0, name.size() - names.front().size());
    const auto is_there = [&](const std::string& known) { return file.contains(prefix + known); };
    if (!std::all_of(names.begin(), names.end(), is_there)) continue;
    if (first.empty()) {
      first = prefix;
    } else {
      ++others;
    }
  }
  if (first.empty()) return "";
  return ", but all of them with " + in_quotes(first) + " before their names" +
         (others == 0 ? "" : ", as with " + std::to_string(others) + " other prefixes") +
         ": load_parameters(layer, file, " + in_quotes(first) + ")";
}

}  // namespace detail

/// Copies the tensors "<prefix><name>" of `file` into the parameters of `layer`, converting to its scalar type. All of
/// them must be there, in the right shape, and no other tensor may have the prefix; otherwise FormatError, and the
/// layer is as it was.
template <typename Layer>
void load_parameters(Layer& layer, const Safetensors& file, const std::string& prefix = "") {
  std::string problems;
  std::vector<std::string> names;
  bool any = false;  // one of them is there
  std::map<std::string, detail::Destination> expected;
  visit_parameters(layer, [&](std::string_view name, auto& parameter) {
    names.emplace_back(name);
    const std::string full = prefix + names.back();
    any = any || file.contains(full);
    expected[full] = detail::Destination(parameter);
    const std::string problem = detail::mismatch(file, full, detail::stored_shape(parameter));
    if (!problem.empty()) problems += "\n  " + problem;
  });
  for (const auto& [name, info] : file.tensors()) {
    if (name.compare(0, prefix.size(), prefix) == 0 && expected.count(name) == 0) {
      problems += "\n  surplus: " + detail::in_quotes(name);
    }
  }
  if (!problems.empty()) {
    throw FormatError(file.path() + ": does not hold the parameters of this layer" +
                      (any ? "" : detail::other_prefix(file, names)) + problems);
  }

  for (const auto& [name, destination] : expected) destination.read(file, name);  // nothing here can fail
}

/// Writes every parameter of `layer` as "<prefix><name>", in its scalar type, and `metadata` beside them.
template <typename Layer>
void save_parameters(const Layer& layer, const std::filesystem::path& path, const std::string& prefix = "",
                     std::map<std::string, std::string> metadata = {}) {
  SafetensorsWriter writer(std::move(metadata));
  visit_parameters(
      layer, [&](std::string_view name, const auto& parameter) { writer.add(prefix + std::string(name), parameter); });
  writer.save(path);
}

}  // namespace diffattn::inline v0_1
