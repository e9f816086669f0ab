#pragma once

// Reading and writing safetensors, the format in which PyTorch models are published.
//
//   Safetensors file(path);                        maps the file and checks its whole header, strictly
//   file.matrix<float>("q_proj.weight")            a copy, converted to the scalar asked for
//   file.mapped<float>("q_proj.weight")            the same values where the file has them, without a copy
//   file.metadata().at("depth")                    the strings stored beside the tensors
//   load_parameters(layer, file, "weight.");       every parameter that visit_parameters(layer, …) names
//
//   SafetensorsWriter writer;  writer.add("x", x);  writer.save(path);
//   save_parameters(layer, path, "weight.");       loads in PyTorch's safetensors
//
// Element types F64, F32, F16, BF16, I64 and I32. Floating-point tensors convert to any floating-point scalar, integers
// to any scalar that can hold their values.
//
// Errors   FormatError: the file breaks the format (names the file, the tensor and the rule), lacks a tensor that was
//          asked for, holds an integer that the scalar cannot, or does not fit the layer. std::runtime_error: it cannot
//          be opened or written. std::invalid_argument: a writer is given what a file cannot hold.
//          load_parameters reports every missing, surplus and mis-shaped tensor in one FormatError and changes nothing.
//          save() writes beside the target and renames: a file is there whole or not at all.
// Cost     opening reads the header only; matrix() reads that tensor. A copy of a Safetensors shares the mapped file,
//          which stays for as long as a copy or a mapped tensor does.

#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/io/detail/dtype.hpp"
#include "diffattn/io/detail/file_bytes.hpp"
#include "diffattn/io/detail/safetensors_header.hpp"

namespace diffattn::inline v0_1 {

static_assert(std::endian::native == std::endian::little, "diffattn: safetensors are little-endian, like this reader");

class Safetensors {
 public:
  explicit Safetensors(const std::filesystem::path& path)
      : path_(path.string()),
        file_(std::make_shared<const detail::FileBytes>(path)),
        header_(detail::SafetensorsHeaderParser(file_->data(), file_->size(), path_).parse()) {}

  const std::string& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  const std::map<std::string, TensorInfo>& tensors() const { return header_.tensors; }
  bool contains(const std::string& name) const { return header_.tensors.count(name) != 0; }

  const TensorInfo& info(const std::string& name) const {
    const auto found = header_.tensors.find(name);
    if (found == header_.tensors.end()) throw FormatError(path_ + ": has no tensor " + detail::in_quotes(name));
    return found->second;
  }

  /// The tensor as a matrix: its last extent is the columns, the others together are the rows (a stack of sequences
  /// (batch, tokens, features) becomes batch·tokens rows). Rank 1 is one row, rank 0 is 1 x 1.
  template <typename T>
  Matrix<T> matrix(const std::string& name) const {
    const TensorInfo& tensor = info(name);
    const Index cols = tensor.shape.empty() ? 1 : tensor.shape.back();
    Index rows = 1;
    for (std::size_t i = 0; i + 1 < tensor.shape.size(); ++i) rows *= tensor.shape[i];
    Matrix<T> result(rows, cols);
    read(name, result.data());
    return result;
  }

  /// The tensor's values in a column, whatever its shape.
  template <typename T>
  Vector<T> vector(const std::string& name) const {
    Index size = 1;
    for (const Index extent : info(name).shape) size *= extent;
    Vector<T> result(size);
    read(name, result.data());
    return result;
  }

  /// The tensor's values in the mapped file, row-major, or null if they are of another type or not aligned for T. Keeps
  /// the file alive.
  template <typename T>
  std::shared_ptr<const T> mapped(const std::string& name) const {
    const TensorInfo& tensor = info(name);
    const std::byte* const at = file_->data() + header_.data_begin + tensor.begin;
    if (tensor.dtype != detail::dtype_of<T>() || reinterpret_cast<std::uintptr_t>(at) % alignof(T) != 0) return nullptr;
    return std::shared_ptr<const T>(file_, reinterpret_cast<const T*>(at));
  }

  /// Writes the tensor's values, converted, to `to`, which has room for all of them.
  template <typename T>
  void read(const std::string& name, T* to) const {
    const TensorInfo& tensor = info(name);
    if (tensor.begin == tensor.end) return;
    const std::byte* const from = file_->data() + header_.data_begin + tensor.begin;
    detail::with_type_of(tensor.dtype, [&]<typename Stored>(Stored) {
      const std::size_t count = (tensor.end - tensor.begin) / sizeof(Stored);
      if constexpr (std::is_same_v<Stored, T>) {
        std::memcpy(to, from, count * sizeof(T));
      } else {
        for (std::size_t i = 0; i < count; ++i) {
          Stored value;
          std::memcpy(&value, from + i * sizeof(Stored), sizeof(Stored));  // the file owes nobody alignment
          to[i] = convert<T>(value, name);
        }
      }
    });
  }

 private:
  template <typename T, typename Stored>
  T convert(Stored value, const std::string& name) const {
    if constexpr (std::is_integral_v<Stored>) {
      const T converted = static_cast<T>(value);
      if (!is_exactly(converted, value)) {
        throw FormatError(path_ + ": tensor " + detail::in_quotes(name) + " holds " + std::to_string(value) +
                          ", which " + std::string(detail::describe(detail::dtype_of<T>()).name) + " cannot");
      }
      return converted;
    } else if constexpr (std::is_integral_v<T>) {
      throw FormatError(path_ + ": tensor " + detail::in_quotes(name) + " holds floating-point values, not integers");
    } else {
      return static_cast<T>(value);
    }
  }

  template <typename T>
  static bool is_exactly(T converted, std::int64_t value) {
    if constexpr (std::is_integral_v<T>) {
      return converted == value;
    } else {
      const double real = static_cast<double>(converted);  // exact from any narrower type
      return real >= -0x1p63 && real < 0x1p63 && static_cast<std::int64_t>(real) == value;
    }
  }

  std::string path_;
  std::shared_ptr<const detail::FileBytes> file_;
  detail::SafetensorsHeader header_;
};

/// Collects copies of tensors and writes them as one file, laid out as the reference implementation does it: large
/// element types first, then by name, header padded to 8 bytes.
class SafetensorsWriter {
 public:
  explicit SafetensorsWriter(std::map<std::string, std::string> metadata = {}) : metadata_(std::move(metadata)) {
    for (const auto& [key, text] : metadata_) {
      check_utf8("metadata", key);
      check_utf8("metadata", text);
    }
  }

  /// A column or row vector type is stored with rank 1, anything else with rank 2. Throws std::invalid_argument if the
  /// name is taken, is "__metadata__" or is not UTF-8.
  template <typename Derived>
  void add(const std::string& name, const Eigen::DenseBase<Derived>& matrix) {
    if constexpr (Derived::IsVectorAtCompileTime) {
      add(name, matrix, {matrix.size()});
    } else {
      add(name, matrix, {matrix.rows(), matrix.cols()});
    }
  }

  /// The same with a shape of your own, of as many elements.
  template <typename Derived>
  void add(const std::string& name, const Eigen::DenseBase<Derived>& matrix, std::vector<Index> shape) {
    using T = typename Derived::Scalar;
    if (detail::byte_size(detail::dtype_of<T>(), shape) != static_cast<std::size_t>(matrix.size()) * sizeof(T)) {
      detail::throw_shape({"SafetensorsWriter: the shape of ", detail::in_quotes(name).c_str(), " does not hold its ",
                           matrix.size(), " elements"});
    }
    check_utf8("a name", name);
    if (name == "__metadata__" || tensors_.count(name) != 0) {
      detail::throw_invalid({"SafetensorsWriter: a tensor cannot be named ", detail::in_quotes(name).c_str(),
                             tensors_.count(name) != 0 ? " twice" : ""});
    }
    const Matrix<T> values = matrix.derived();
    Tensor tensor{detail::dtype_of<T>(), std::move(shape), {}};
    tensor.bytes.resize(static_cast<std::size_t>(values.size()) * sizeof(T));
    if (!tensor.bytes.empty()) std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
    tensors_.emplace(name, std::move(tensor));
  }

  void save(const std::filesystem::path& path) const {
    std::vector<std::pair<std::string, const Tensor*>> ordered;
    for (const auto& [name, tensor] : tensors_) ordered.emplace_back(name, &tensor);
    std::stable_sort(ordered.begin(), ordered.end(), [](const auto& a, const auto& b) {
      return detail::describe(a.second->dtype).size > detail::describe(b.second->dtype).size;
    });

    nlohmann::json header = nlohmann::json::object();
    if (!metadata_.empty()) header["__metadata__"] = metadata_;
    std::size_t offset = 0;
    for (const auto& [name, tensor] : ordered) {
      const std::size_t end = offset + tensor->bytes.size();
      header[name] = {
          {"dtype", detail::describe(tensor->dtype).name}, {"shape", tensor->shape}, {"data_offsets", {offset, end}}};
      offset = end;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');

    std::filesystem::path unfinished = path;
    unfinished += ".unfinished";
    std::ofstream out(unfinished, std::ios::binary | std::ios::trunc);
    const std::uint64_t length = text.size();
    out.write(reinterpret_cast<const char*>(&length), sizeof(length));
    out.write(text.data(), static_cast<std::streamsize>(text.size()));
    for (const auto& [name, tensor] : ordered) {
      out.write(tensor->bytes.data(), static_cast<std::streamsize>(tensor->bytes.size()));
    }
    out.close();
    std::error_code error;
    if (out) std::filesystem::rename(unfinished, path, error);
    if (!out || error) {
      std::filesystem::remove(unfinished, error);
      throw std::runtime_error(path.string() + ": cannot be written");
    }
  }

 private:
  struct Tensor {
    Dtype dtype;
    std::vector<Index> shape;
    std::vector<char> bytes;
  };

  static void check_utf8(const char* what, const std::string& text) {
    try {
      static_cast<void>(nlohmann::json(text).dump());
    } catch (const nlohmann::json::exception&) {
      detail::throw_invalid({"SafetensorsWriter: ", what, " is not UTF-8: ", detail::in_quotes(text).c_str()});
    }
  }

  std::map<std::string, std::string> metadata_;
  std::map<std::string, Tensor> tensors_;
};

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

inline std::string shape_text(const std::vector<Index>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace detail

/// Copies the tensors "<prefix><name>" of `file` into the parameters of `layer`, converting to its scalar type. All of
/// them must be there, in the right shape, and no other tensor may have the prefix; otherwise FormatError, and the
/// layer is as it was.
template <typename Layer>
void load_parameters(Layer& layer, const Safetensors& file, const std::string& prefix = "") {
  std::string problems;
  std::map<std::string, bool> expected;
  visit_parameters(layer, [&](std::string_view name, auto& parameter) {
    const std::string full = prefix + std::string(name);
    expected[full] = true;
    if (!file.contains(full)) {
      problems += "\n  missing: " + detail::in_quotes(full);
      return;
    }
    const TensorInfo& info = file.info(full);
    const std::vector<Index> shape = detail::stored_shape(parameter);
    if (info.shape != shape) {
      problems += "\n  shape: " + detail::in_quotes(full) + " must be " + detail::shape_text(shape) + ", got " +
                  detail::shape_text(info.shape);
    } else if (detail::is_integer(info.dtype)) {
      problems += "\n  type: " + detail::in_quotes(full) + " must hold floating-point values, got " +
                  std::string(detail::describe(info.dtype).name);
    }
  });
  for (const auto& [name, info] : file.tensors()) {
    if (name.compare(0, prefix.size(), prefix) == 0 && expected.count(name) == 0) {
      problems += "\n  surplus: " + detail::in_quotes(name);
    }
  }
  if (!problems.empty()) throw FormatError(file.path() + ": does not hold the parameters of this layer" + problems);

  visit_parameters(
      layer, [&](std::string_view name, auto& parameter) { file.read(prefix + std::string(name), parameter.data()); });
}

/// Writes every parameter of `layer` as "<prefix><name>".
template <typename Layer>
void save_parameters(const Layer& layer, const std::filesystem::path& path, const std::string& prefix = "",
                     std::map<std::string, std::string> metadata = {}) {
  SafetensorsWriter writer(std::move(metadata));
  visit_parameters(
      layer, [&](std::string_view name, const auto& parameter) { writer.add(prefix + std::string(name), parameter); });
  writer.save(path);
}

}  // namespace diffattn::inline v0_1
