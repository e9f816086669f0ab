#pragma once

// SafetensorsWriter: tensors collected for a file, and the file written.
//
//   SafetensorsWriter writer;  writer.add("x", x);  writer.save(path);
//
// Errors   std::invalid_argument: what a file cannot hold, in add() and set_metadata(), which leave the writer as it
//          was. std::runtime_error: the file cannot be written. A file is there whole or as it was, also if the process
//          is killed, and so is what a symbolic link points to: save() writes "<name>.<process>-<number>.unfinished"
//          beside the target and renames it. Only a killed process leaves such a file behind; it can be deleted.
// Cost     add() copies the values, which stay until the writer goes; save() writes them as often as it is called.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/io/detail/unfinished_file.hpp"
#include "diffattn/io/dtype.hpp"
#include "diffattn/io/safetensors_header.hpp"

namespace diffattn::inline v0_1 {

/// Collects copies of tensors and writes them as one file, laid out as the reference implementation does it: large
/// element types first, then by name, header padded to 8 bytes.
class SafetensorsWriter {
 public:
  explicit SafetensorsWriter(std::map<std::string, std::string> metadata = {}) : metadata_(std::move(metadata)) {
    for (const auto& [key, text] : metadata_) check_metadata(key, text);
  }

  /// A string beside the tensors, in place of the one of the same key.
  void set_metadata(const std::string& key, const std::string& text) {
    check_metadata(key, text);
    metadata_[key] = text;
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

  /// Writes the file. Two processes may save to one path at a time: the last one's file stays.
  void save(const std::filesystem::path& path) const {
    detail::UnfinishedFile file(path);
    write(file);
    file.finish();
    file.replace_target();
  }

  /// The bytes of the file: calls out.write(data, size) for each piece.
  template <typename Out>
  void write(Out&& out) const {
    std::vector<const Named*> ordered;
    for (const Named& tensor : tensors_) ordered.push_back(&tensor);
    std::stable_sort(ordered.begin(), ordered.end(), [](const Named* a, const Named* b) {
      return detail::describe(a->second.dtype).size > detail::describe(b->second.dtype).size;
    });
    const std::string text = header(ordered);
    const std::uint64_t length = text.size();
    out.write(&length, sizeof(length));
    out.write(text.data(), text.size());
    for (const Named* const tensor : ordered) out.write(tensor->second.bytes.data(), tensor->second.bytes.size());
  }

 private:
  struct Tensor {
    Dtype dtype;
    std::vector<Index> shape;
    std::vector<char> bytes;
  };
  using Named = std::pair<const std::string, Tensor>;

  /// The JSON of the file for tensors in this order, padded to a multiple of 8 bytes. Text, and no nlohmann::json:
  /// the destructor of one that holds an object allocates, and ends the program where it cannot.
  std::string header(const std::vector<const Named*>& ordered) const {
    std::string text = "{";
    const auto open = [&](const std::string& key) { text += (text.size() == 1 ? "" : ",") + in_json(key) + ":{"; };
    if (!metadata_.empty()) {
      open("__metadata__");
      for (const auto& [key, value] : metadata_) {
        text += (text.back() == '{' ? "" : ",") + in_json(key) + ":" + in_json(value);
      }
      text += "}";
    }
    std::size_t offset = 0;
    for (const Named* const named : ordered) {
      const Tensor& tensor = named->second;
      const std::size_t end = offset + tensor.bytes.size();
      open(named->first);
      text += "\"data_offsets\":[" + std::to_string(offset) + "," + std::to_string(end) + "],\"dtype\":\"";
      text += detail::describe(tensor.dtype).name;
      text += "\",\"shape\":[";
      for (const Index extent : tensor.shape) text += (text.back() == '[' ? "" : ",") + std::to_string(extent);
      text += "]}";
      offset = end;
    }
    text += "}";
    text.resize((text.size() + 7) / 8 * 8, ' ');
    return text;
  }

  static std::string in_json(const std::string& text) { return nlohmann::json(text).dump(); }

  static void check_metadata(const std::string& key, const std::string& text) {
    check_utf8("metadata", key);
    check_utf8("metadata", text);
  }

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
