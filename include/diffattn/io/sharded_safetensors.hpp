#pragma once

// A model's tensors in a directory, as Hugging Face stores them: one model.safetensors, or several files and a
// model.safetensors.index.json that says which tensor is where. To the reader they are one set of names.
//
//   ShardedSafetensors tensors(directory);
//   tensors.file_of("model.norm.weight").vector<float>("model.norm.weight")
//
// Errors   FormatError: a file or the index breaks its format, or they contradict each other; the message names the
// file,
//          the tensor and the rule. std::runtime_error: a file cannot be opened. The index may name files of the
//          directory only: no path in it leads out.

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/io/detail/json.hpp"
#include "diffattn/io/detail/whole_file.hpp"
#include "diffattn/io/safetensors.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// Which file has which tensor, by an index's text; `file` names it in errors.
inline std::map<std::string, std::string> parse_checkpoint_index(const std::string& text, const std::string& file) {
  const auto fail = [&](const std::string& why) { throw FormatError(file + ": " + why); };
  const JsonTree tree(text, file + ": is not valid JSON: ");
  const nlohmann::json& json = tree.root();
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object()) {
    fail("has no weight_map that is an object");
  }
  std::map<std::string, std::string> result;
  for (const auto& [tensor, where] : json["weight_map"].items()) {
    if (!where.is_string()) fail("weight_map gives " + in_quotes(tensor) + " no file name");
    const auto& name = where.template get_ref<const std::string&>();
    const bool plain = !name.empty() && name != "." && name != ".." &&
                       name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
    if (!plain) {
      fail("weight_map gives " + in_quotes(tensor) + " the file " + in_quotes(name) + ", which is not a plain name");
    }
    result.emplace(tensor, name);
  }
  if (result.empty()) fail("has a weight_map without tensors");
  return result;
}

}  // namespace detail

class ShardedSafetensors {
 public:
  explicit ShardedSafetensors(const std::filesystem::path& directory) : path_(directory.string()) {
    const std::filesystem::path whole = directory / "model.safetensors", index = directory / kIndexName;
    std::error_code error;
    if (std::filesystem::exists(whole, error) || !std::filesystem::exists(index, error)) {
      add_file(whole);
      for (const auto& [name, info] : files_.front().tensors()) file_of_.emplace(name, 0);
    } else {
      open_shards(directory, detail::parse_checkpoint_index(detail::read_text(index), index.string()), index.string());
    }
  }

  const std::string& path() const { return path_; }
  /// Every tensor and the number of its file in files().
  const std::map<std::string, std::size_t>& tensors() const { return file_of_; }
  const std::vector<Safetensors>& files() const { return files_; }
  bool contains(const std::string& name) const { return file_of_.count(name) != 0; }

  const Safetensors& file_of(const std::string& name) const {
    const auto found = file_of_.find(name);
    if (found == file_of_.end()) throw FormatError(path_ + ": has no tensor " + detail::in_quotes(name));
    return files_[found->second];
  }
  const TensorInfo& info(const std::string& name) const { return file_of(name).info(name); }

 private:
  static constexpr const char* kIndexName = "model.safetensors.index.json";

  std::size_t add_file(const std::filesystem::path& path) {
    files_.emplace_back(path);
    return files_.size() - 1;
  }

  void open_shards(const std::filesystem::path& directory, const std::map<std::string, std::string>& weight_map,
                   const std::string& index) {
    std::map<std::string, std::size_t> numbers;
    for (const auto& [tensor, name] : weight_map) {
      const auto known = numbers.find(name);
      const std::size_t number = known != numbers.end() ? known->second : add_file(directory / name);
      numbers.emplace(name, number);
      if (!files_[number].contains(tensor)) {
        throw FormatError(index + ": tensor " + detail::in_quotes(tensor) + " is not in " + detail::in_quotes(name));
      }
      file_of_.emplace(tensor, number);
    }
    for (const auto& [name, number] : numbers) {
      for (const auto& [tensor, info] : files_[number].tensors()) {
        const auto expected = weight_map.find(tensor);
        if (expected == weight_map.end() || expected->second != name) {
          throw FormatError(index + ": tensor " + detail::in_quotes(tensor) + " of " + detail::in_quotes(name) +
                            " is not in its weight_map");
        }
      }
    }
  }

  std::string path_;
  std::vector<Safetensors> files_;
  std::map<std::string, std::size_t> file_of_;
};

}  // namespace diffattn::inline v0_1
