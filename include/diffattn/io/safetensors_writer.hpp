#pragma once

// SafetensorsWriter: tensors collected for a file, and the file written.
//
//   SafetensorsWriter writer;  writer.add("x", x);  writer.save(path);
//
// Errors   std::invalid_argument: what a file cannot hold, in add(), which leaves the writer as it was.
//          std::runtime_error: the file cannot be written. save() writes beside the target and renames: a file is there
//          whole or not at all.
// Cost     add() copies the values, which stay until the writer goes; save() writes them as often as it is called.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/io/detail/dtype.hpp"
#include "diffattn/io/detail/safetensors_header.hpp"
#include "diffattn/io/detail/whole_file.hpp"

namespace diffattn::inline v0_1 {

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

    detail::write_whole(path, [&](std::ostream& out) {
      const std::uint64_t length = text.size();
      out.write(reinterpret_cast<const char*>(&length), sizeof(length));
      out.write(text.data(), static_cast<std::streamsize>(text.size()));
      for (const auto& [name, tensor] : ordered) {
        out.write(tensor->bytes.data(), static_cast<std::streamsize>(tensor->bytes.size()));
      }
    });
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

}  // namespace diffattn::inline v0_1
