#pragma once

// A directory that holds a model: its weights (model.safetensors) and its config.json, written as one thing and read as
// one thing, never the weights of one save with the configuration of another.
//
// Both files carry the same mark, diffattn_save_id: the weights in their metadata, config.json as a field, which
// survives when somebody edits other fields. It is computed from the content of both, so that equal models are saved as
// equal bytes. Saving writes both unfinished files, then puts the weights into their place, then config.json: from then
// until the latter is there, its unfinished file is. So weights with a mark belong to the config.json with the same
// mark or, if a save was interrupted, to the unfinished one that has it. Weights without a mark are others', such as
// transformers', and are read with whatever config.json is there. A generation_config.json is marked and read likewise.
// What else is written with them, a tokenizer's files, comes into its place before the weights.
//
// Power may be lost as well: the directory is on the disk after the first step, before the second begins.

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/file_bytes.hpp"
#include "diffattn/io/detail/unfinished_file.hpp"
#include "diffattn/io/json_document.hpp"
#include "diffattn/io/safetensors.hpp"
#include "diffattn/io/sharded_safetensors.hpp"
#include "diffattn/io/whole_file.hpp"

namespace diffattn::inline v0_1::detail {

inline constexpr const char* kSaveId = "diffattn_save_id";
inline constexpr const char* kSavedGeneration = "diffattn_saved_generation_config";  // of weights saved with one

/// A number that depends on every byte it is given: equal for equal bytes in equal pieces.
class Fingerprint {
 public:
  void write(const void* data, std::size_t size) {
    const char* at = static_cast<const char*>(data);
    add(size);
    for (; size >= sizeof(std::uint64_t); size -= sizeof(std::uint64_t), at += sizeof(std::uint64_t)) {
      std::uint64_t word;
      std::memcpy(&word, at, sizeof(word));
      add(word);
    }
    std::uint64_t rest = 0;
    std::memcpy(&rest, at, size);
    add(rest);
  }
  /// 16 hexadecimal digits.
  std::string text() const {
    std::string digits(16, '0');
    for (std::size_t i = 0; i < digits.size(); ++i) digits[15 - i] = "0123456789abcdef"[value_ >> (4 * i) & 15];
    return digits;
  }

 private:
  void add(std::uint64_t word) {
    value_ = (value_ ^ word) * 0x9e3779b97f4a7c15;
    value_ ^= value_ >> 29;
  }

  std::uint64_t value_ = 0;
};

/// Makes a directory and those above it, and takes away the ones that it made unless it is told to keep them.
class NewDirectories {
 public:
  explicit NewDirectories(const std::filesystem::path& directory) {
    for (auto missing = directory; !missing.empty() && !std::filesystem::exists(missing);) {
      made_.push_back(missing);
      missing = missing.parent_path();
    }
    try {
      std::filesystem::create_directories(directory);
    } catch (...) {
      remove();
      throw;
    }
  }
  ~NewDirectories() { remove(); }
  NewDirectories(const NewDirectories&) = delete;
  NewDirectories& operator=(const NewDirectories&) = delete;

  void keep() { made_.clear(); }

 private:
  void remove() noexcept {
    std::error_code error;
    for (const auto& directory : made_) std::filesystem::remove(directory, error);  // only if it is empty
  }

  std::vector<std::filesystem::path> made_;  // the innermost first
};

/// A JSON object with the mark as its first member.
inline std::string marked(std::string object, const std::string& id) {
  const std::size_t begin = object.find('{') + 1;
  const bool empty = object.find_first_not_of(" \t\r\n", begin) == object.find('}');
  return object.insert(begin, "\n  \"" + std::string(kSaveId) + "\": \"" + id + (empty ? "\"" : "\","));
}

/// What may stand beside weights and config.json.
struct CompanionFiles {
  std::string generation_config;                                   // the text of an object; empty for none
  std::map<std::string, std::shared_ptr<const FileBytes>> others;  // by name: a tokenizer's
};

/// Whether a file is there, can be read and has these bytes.
inline bool has_bytes(const std::filesystem::path& path, const FileBytes& bytes) {
  try {
    const FileBytes there(path);
    return there.size() == bytes.size() &&
           (bytes.size() == 0 || std::memcmp(there.data(), bytes.data(), bytes.size()) == 0);
  } catch (const std::runtime_error&) {
    return false;
  }
}

/// Writes weights and the text of a config.json, an object, and what stands beside them into `directory`, which is made
/// if it is not there. Files that are there with the same bytes are not touched.
inline void save_checkpoint_directory(const std::filesystem::path& directory, SafetensorsWriter weights,
                                      std::string config, const CompanionFiles& companions = {}) {
  Fingerprint fingerprint;
  weights.write(fingerprint);
  fingerprint.write(config.data(), config.size());
  std::string generation = companions.generation_config;
  if (!generation.empty()) fingerprint.write(generation.data(), generation.size());
  const std::string id = fingerprint.text();
  weights.set_metadata(kSaveId, id);
  config = marked(std::move(config), id);

  NewDirectories directories(directory);
  UnfinishedFile weights_file(directory / "model.safetensors"), config_file(directory / "config.json");
  std::vector<std::unique_ptr<UnfinishedFile>> others;
  const auto finish = [](UnfinishedFile& file, const void* data, std::size_t size) {
    file.write(data, size);
    file.finish();
  };
  for (const auto& [name, bytes] : companions.others) {
    if (has_bytes(directory / name, *bytes)) continue;
    others.push_back(std::make_unique<UnfinishedFile>(directory / name));
    finish(*others.back(), bytes->data(), bytes->size());
  }
  std::optional<UnfinishedFile> generation_file;
  if (!generation.empty()) {
    weights.set_metadata(kSavedGeneration, "true");
    generation = marked(std::move(generation), id);
    finish(generation_file.emplace(directory / "generation_config.json"), generation.data(), generation.size());
  }
  weights.write(weights_file);
  weights_file.finish();
  finish(config_file, config.data(), config.size());
  const DirectoryLock lock(directory);
  for (const auto& other : others) other->replace_target();
  weights_file.replace_target();
  directories.keep();
  // Should their turn fail now, the weights are read with them as they are.
  config_file.keep();
  if (generation_file) {
    generation_file->keep();
    generation_file->replace_target();
  }
  config_file.replace_target();
}

/// A model's files, opened.
struct CheckpointFiles {
  ShardedSafetensors tensors;
  std::string config;                // the text
  std::string save_id;               // of both; empty if the weights are others'
  std::string generation_config;     // the text; empty if there is none
  bool is_generation_saved = false;  // with the weights, so that nothing in it is of another model
};

/// The mark in the text of a config.json: empty if it has none, nothing if the text is no JSON object.
inline std::optional<std::string> save_id_of(const std::string& config) {
  try {
    const JsonDocument json(config, "config.json");
    if (json.root().type != JsonDocument::Type::object) return std::nullopt;
    const JsonDocument::Value* const id = json.find(json.root(), kSaveId);
    return id == nullptr || id->type != JsonDocument::Type::text ? "" : id->text;
  } catch (const FormatError&) {
    return std::nullopt;
  }
}

/// What the weights' metadata hold under a key; empty if they have nothing.
inline std::string metadata_of(const ShardedSafetensors& tensors, const char* key) {
  for (const Safetensors& file : tensors.files()) {
    if (const auto found = file.metadata().find(key); found != file.metadata().end()) return found->second;
  }
  return "";
}

/// The text of the unfinished config.json that an interrupted save has left with this mark, if there is one.
inline std::optional<std::string> unfinished_config(const std::filesystem::path& config, const std::string& id) {
  const std::filesystem::path target = follow_links(config);
  const std::string prefix = target.filename().string() + ".", suffix = kUnfinishedSuffix;
  std::error_code error;
  std::filesystem::directory_iterator entry(target.has_parent_path() ? target.parent_path() : ".", error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    const bool unfinished = name.size() > prefix.size() + suffix.size() &&
                            name.compare(0, prefix.size(), prefix) == 0 &&
                            name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
    if (!unfinished) continue;
    try {
      std::string text = read_text(entry->path());
      if (save_id_of(text) == id) return text;
    } catch (const std::runtime_error&) {  // gone, or not ours to read
    }
  }
  return std::nullopt;
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_other_config(const std::filesystem::path& path,
                                                                      const std::string& its, const std::string& id) {
  throw FormatError(path.string() + ": does not belong to the weights beside it: its " + kSaveId + " is " +
                    in_quotes(its) + ", theirs " + in_quotes(id) +
                    ". A save was interrupted, or one of the files was replaced. Save the model again or, if this is "
                    "their configuration, write their " +
                    kSaveId + " into it");
}

/// Puts the generation_config.json that belongs to the files that were opened beside them. False if the one that is
/// there is of another save: somebody may be saving now.
inline bool add_generation_config(CheckpointFiles& files, const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "generation_config.json";
  std::error_code error;
  std::string text = std::filesystem::exists(path, error) ? read_text(path) : "";
  if (files.save_id.empty()) {
    files.generation_config = std::move(text);
    return true;
  }
  const std::optional<std::string> id = text.empty() ? "" : save_id_of(text);
  files.is_generation_saved = id == files.save_id;
  if (!files.is_generation_saved && !metadata_of(files.tensors, kSavedGeneration).empty()) {
    if (std::optional<std::string> unfinished = unfinished_config(path, files.save_id)) {
      text = std::move(*unfinished);
      files.is_generation_saved = true;
    }
  }
  if (!files.is_generation_saved && id && !id->empty()) return false;
  files.generation_config = std::move(text);
  return true;
}

/// Opens the weights of a directory and the config.json that they were saved with; writes nothing. Throws FormatError
/// if that one is not there, std::runtime_error if a file cannot be opened.
inline CheckpointFiles open_checkpoint_directory(const std::filesystem::path& directory) {
  check_has_safetensors(directory);
  const std::filesystem::path path = directory / "config.json";
  std::string last_config, last_id;
  std::optional<DirectoryLock> lock;  // from the second look on
  for (bool first = true;; first = false) {
    if (!first && !lock) lock.emplace(directory);
    std::error_code error;
    const bool missing = !std::filesystem::exists(path, error);
    std::string config = missing ? "" : read_text(path);
    CheckpointFiles files{
        .tensors = ShardedSafetensors(directory), .config = "", .save_id = "", .generation_config = ""};
    files.save_id = metadata_of(files.tensors, kSaveId);
    const std::string& id = files.save_id;
    const std::optional<std::string> config_id = missing ? "" : save_id_of(config);
    std::optional<std::string> fitting;
    if (!missing && (id.empty() || !config_id || *config_id == id))
      fitting = config;  // no JSON: its reader says so better
    if (!fitting && !id.empty()) fitting = unfinished_config(path, id);
    // Somebody may be saving, whose files are all there once we have the lock, or have saved between the two reads. A
    // third look then shows the same as the second.
    const bool same = !first && config == last_config && id == last_id;
    if (!fitting && same) {
      if (missing) {
        throw std::runtime_error(directory.string() + ": has no config.json, which says what model its weights are of");
      }
      // An interrupted save would have left its own: somebody has put this one there on purpose.
      if (!config_id->empty()) throw_other_config(path, *config_id, id);
      fitting = config;
    }
    if (fitting && (add_generation_config(files, directory) || same)) {
      files.config = std::move(*fitting);
      return files;
    }
    last_config = std::move(config);
    last_id = id;
  }
}

}  // namespace diffattn::inline v0_1::detail
