#pragma once

// Safetensors: a file of tensors, opened for reading.
//
//   Safetensors file(path);                        maps the file and checks its whole header, strictly
//   file.matrix<float>("q_proj.weight")            a copy, converted to the scalar asked for
//   file.mapped<float>("q_proj.weight")            the same values where the file has them, without a copy
//   file.metadata().at("depth")                    the strings stored beside the tensors
//
// Floating-point tensors convert to any floating-point scalar, integers to any scalar that can hold their values. Read
// are F64, F32, F16, BF16, I64 and I32; a file may hold tensors of the format's other types beside them.
//
// Errors   FormatError: the file breaks the format (names the file, the tensor and the rule), lacks a tensor that was
//          asked for, has it in a type that is not read, or holds an integer that the scalar cannot.
//          std::runtime_error: it cannot be opened.
// Cost     opening reads the header only; matrix() reads that tensor. A copy of a Safetensors shares the mapped file,
//          which stays for as long as a copy or a mapped tensor does.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/file_bytes.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/io/dtype.hpp"
#include "diffattn/io/safetensors_header.hpp"

namespace diffattn::inline v0_1 {

class Safetensors {
 public:
  /// Maps the file and checks its header. Throws std::runtime_error if it cannot be opened, FormatError that says what
  /// it is instead (text, PyTorch's own format, …) or which rule it breaks.
  explicit Safetensors(const std::filesystem::path& path)
      : path_(path.string()),
        file_(std::make_shared<const detail::FileBytes>(path)),
        header_(detail::SafetensorsHeaderParser(file_->data(), file_->size(), path_).parse()) {}

  /// Where the file is.
  const std::string& path() const { return path_; }
  /// The strings stored beside the tensors.
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  /// Every tensor's element type, shape and place, by name.
  const std::map<std::string, TensorInfo>& tensors() const { return header_.tensors; }
  /// Whether there is a tensor of this name.
  bool contains(const std::string& name) const { return header_.tensors.count(name) != 0; }

  /// One tensor's. Throws FormatError if there is none of this name.
  const TensorInfo& info(const std::string& name) const {
    const auto found = header_.tensors.find(name);
    if (found == header_.tensors.end()) throw FormatError(path_ + ": has no tensor " + detail::in_quotes(name));
    return found->second;
  }

  /// The tensor as a matrix: its last extent is the columns, the others together are the rows (a stack of sequences
  /// (batch, tokens, features) becomes batch·tokens rows). Rank 1 is one row, rank 0 is 1 x 1.
  template <typename T>
  Matrix<T> matrix(const std::string& name) const {
    const TensorInfo& tensor = readable(name);
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
    for (const Index extent : readable(name).shape) size *= extent;
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
    const TensorInfo& tensor = readable(name);
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
  const TensorInfo& readable(const std::string& name) const {
    const TensorInfo& tensor = info(name);
    if (detail::is_readable(tensor.dtype)) return tensor;
    throw FormatError(path_ + ": tensor " + detail::in_quotes(name) + " is of type " +
                      std::string(detail::describe(tensor.dtype).name) +
                      ", which is not read; convert it to F32, F16, BF16 or I32 (also read: F64, I64)");
  }

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

}  // namespace diffattn::inline v0_1
