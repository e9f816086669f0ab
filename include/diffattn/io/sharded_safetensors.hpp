#pragma once

// A model's tensors in a directory, as Hugging Face stores them: one model.safetensors, or several files and a
// model.safetensors.index.json that says which tensor is where. To the reader they are one set of names.
//
//   ShardedSafetensors tensors(directory);
//   tensors.file_of("model.norm.weight").vector<float>("model.norm.weight")
//
// A tensor of a file that the index does not mention is there all the same, as it is to transformers.
//
// Errors   FormatError: a file or the index breaks its format, or they contradict each other; the message names the
//          file, the tensor and the rule. std::runtime_error: a file cannot be opened, or the directory has no
//          safetensors; the message says what it has instead and what to do with it. The index may name files of the
//          directory only: no path in it leads out.
//
// Tested by tests/hugging_face/diffllama_checkpoint_test.cpp and diffllama_test.cpp.

#include <algorithm>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/io/json_document.hpp"
#include "diffattn/io/safetensors.hpp"
#include "diffattn/io/whole_file.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// Which file has which tensor, by an index's text; `file` names it in errors.
inline std::map<std::string, std::string> parse_checkpoint_index(const std::string& text, const std::string& file) {
  using Type = JsonDocument::Type;
  const auto fail = [&](const std::string& why) { throw FormatError(file + ": " + why); };
  const JsonDocument json(text, file);
  const bool is_object = json.root().type == Type::object;
  const auto* const weight_map = is_object ? json.find(json.root(), "weight_map") : nullptr;
  if (weight_map == nullptr || weight_map->type != Type::object) fail("has no weight_map that is an object");
  std::map<std::string, std::string> result;
  json.for_each(*weight_map, [&](const JsonDocument::Value& where) {
    if (where.type != Type::text) fail("weight_map gives " + in_quotes(where.key) + " no file name");
    const std::string& name = where.text;
    const bool plain = !name.empty() && name != "." && name != ".." &&
                       name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
    if (!plain) {
      fail("weight_map gives " + in_quotes(where.key) + " the file " + in_quotes(name) +
           ", which is not a plain name: put the file beside the index");
    }
    result.insert_or_assign(where.key, name);
  });
  if (result.empty()) fail("has a weight_map without tensors");
  return result;
}

/// Throws std::runtime_error that says what to do, unless `directory` has a model's safetensors.
inline void check_has_safetensors(const std::filesystem::path& directory) {
  namespace fs = std::filesystem;
  const auto fail = [&](const std::string& why) { throw std::runtime_error(directory.string() + ": " + why); };
  std::error_code error;
  const fs::file_status status = fs::status(directory, error);
  if (!fs::exists(status)) fail("there is no such directory");
  if (!fs::is_directory(status)) fail("is a file; give the directory that it is in, with the model's other files");
  if (fs::exists(directory / "model.safetensors", error)) return;
  if (fs::exists(directory / "model.safetensors.index.json", error)) return;

  std::vector<std::string> names;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory, error)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  const auto first = [&](auto matches) {
    const auto found = std::find_if(names.begin(), names.end(), matches);
    return found == names.end() ? std::string() : *found;
  };
  const auto ending = [&](std::string_view end) {
    return first([&](const std::string& name) { return std::string_view(name).ends_with(end); });
  };
  const std::string lacks = "has no model.safetensors";
  const std::string convert = ".save_pretrained(…) in Python with transformers writes model.safetensors";
  const std::string load = "AutoModelForCausalLM.from_pretrained(\"" + directory.string() + "\"";
  if (first([](const std::string& name) { return name == "adapter_config.json"; }) != "") {
    fail(lacks + ", but an adapter: merge it into its model first (merge_and_unload() in peft), and save that");
  }
  for (const char* const end : {".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"}) {
    if (const std::string name = ending(end); !name.empty()) {
      fail(lacks + ", but " + in_quotes(name) + ", which is not read: " + load + ")" + convert);
    }
  }
  if (const std::string name = ending(".gguf"); !name.empty()) {
    fail(lacks + ", but " + in_quotes(name) + ", which is not read: " + load + ", gguf_file=" + in_quotes(name) + ")" +
         convert);
  }
  if (const std::string name = ending(".safetensors"); !name.empty()) {
    const bool shard = name.find("-of-") != std::string::npos;
    fail(lacks + ", but " + in_quotes(name) + ": " +
         (shard ? "model.safetensors.index.json, which belongs to it, is missing" : "call it model.safetensors"));
  }
  fail(lacks + ", nor a model.safetensors.index.json and the files that it names");
}

}  // namespace detail

class ShardedSafetensors {
 public:
  /// Opens all files of the directory. Throws as said above.
  explicit ShardedSafetensors(const std::filesystem::path& directory) : path_(directory.string()) {
    detail::check_has_safetensors(directory);
    const std::filesystem::path whole = directory / "model.safetensors",
                                index = directory / "model.safetensors.index.json";
    std::error_code error;
    if (std::filesystem::exists(whole, error)) {
      add_file(whole);
      for (const auto& [name, info] : files_.front().tensors()) file_of_.emplace(name, 0);
    } else {
      open_shards(directory, detail::parse_checkpoint_index(detail::read_text(index), index.string()), index.string());
    }
  }

  /// Where the index is.
  const std::string& path() const { return path_; }
  /// Every tensor and the number of its file in files().
  const std::map<std::string, std::size_t>& tensors() const { return file_of_; }
  /// The files, in the order in which they were opened.
  const std::vector<Safetensors>& files() const { return files_; }
  /// Whether there is a tensor of this name, in any file.
  bool contains(const std::string& name) const { return file_of_.count(name) != 0; }

  /// The file that has a tensor. Throws FormatError if none has.
  const Safetensors& file_of(const std::string& name) const {
    const auto found = file_of_.find(name);
    if (found == file_of_.end()) throw FormatError(path_ + ": has no tensor " + detail::in_quotes(name));
    return files_[found->second];
  }
  /// Type and shape of a tensor. Throws FormatError for a name that no file has.
  const TensorInfo& info(const std::string& name) const { return file_of(name).info(name); }

 private:
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
        const auto known = file_of_.try_emplace(tensor, number).first;
        if (known->second != number) {
          throw FormatError(index + ": tensor " + detail::in_quotes(tensor) + " of " + detail::in_quotes(name) +
                            " is also in another file: which of the two is meant?");
        }
      }
    }
  }

  std::string path_;
  std::vector<Safetensors> files_;
  std::map<std::string, std::size_t> file_of_;
};

}  // namespace diffattn::inline v0_1
