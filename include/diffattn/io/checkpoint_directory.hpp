#pragma once

// A directory that holds a model: its weights (model.safetensors) and its config.json, written as one thing and read as
// one thing, never the weights of one save with the configuration of another.
//
// Both files carry the same mark, diffattn_save_id: the weights in their metadata, config.json as a field, which
// survives when somebody edits other fields. It is computed from the content of both, so that equal models are saved as
// equal bytes. Saving writes both unfinished files, then puts the weights into their place, then config.json: from then
// until the latter is there, its unfinished file is. So weights with a mark belong to the config.json with the same
// mark or, if a save was interrupted, to the unfinished one that has it. Weights without a mark are others', such as
// transformers', and are read with whatever config.json is there.
//
// Power may be lost as well: the directory is on the disk after the first step, before the second begins.

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/io/detail/unfinished_file.hpp"
#include "diffattn/io/json_document.hpp"
#include "diffattn/io/safetensors.hpp"
#include "diffattn/io/sharded_safetensors.hpp"
#include "diffattn/io/whole_file.hpp"

namespace diffattn::inline v0_1::detail {

inline constexpr const char* kSaveId = "diffattn_save_id";

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

/// Writes weights and the text of a config.json, an object, into `directory`, which is made if it is not there.
inline void save_checkpoint_directory(const std::filesystem::path& directory, SafetensorsWriter weights,
                                      std::string config) {
  Fingerprint fingerprint;
  weights.write(fingerprint);
  fingerprint.write(config.data(), config.size());
  const std::string id = fingerprint.text();
  weights.set_metadata(kSaveId, id);
  config.insert(config.find('{') + 1, "\n  \"" + std::string(kSaveId) + "\": \"" + id + "\",");

  NewDirectories directories(directory);
  UnfinishedFile weights_file(directory / "model.safetensors"), config_file(directory / "config.json");
  weights.write(weights_file);
  weights_file.finish();
  config_file.write(config.data(), config.size());
  config_file.finish();
  const DirectoryLock lock(directory);
  weights_file.replace_target();
  directories.keep();
  config_file.keep();  // should its turn fail now, the weights are read with it as it is
  config_file.replace_target();
}

/// A model's files, opened.
struct CheckpointFiles {
  ShardedSafetensors tensors;
  std::string config;   // the text
  std::string save_id;  // of both; empty if the weights are others'
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

/// The mark of the weights: empty if they have none.
inline std::string save_id_of(const ShardedSafetensors& tensors) {
  for (const Safetensors& file : tensors.files()) {
    if (const auto id = file.metadata().find(kSaveId); id != file.metadata().end()) return id->second;
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

/// Opens the weights of a directory and the config.json that they were saved with; writes nothing. Throws FormatError
/// if that one is not there, std::runtime_error if a file cannot be opened.
inline CheckpointFiles open_checkpoint_directory(const std::filesystem::path& directory) {
  check_has_safetensors(directory);
  const std::filesystem::path path = directory / "config.json";
  std::string last_config, last_id;
  for (bool first = true;; first = false) {
    std::error_code error;
    const bool missing = !std::filesystem::exists(path, error);
    std::string config = missing ? "" : read_text(path);
    ShardedSafetensors tensors(directory);
    std::string id = save_id_of(tensors);
    const std::optional<std::string> config_id = missing ? "" : save_id_of(config);
    const bool fits = id.empty() || !config_id || *config_id == id;  // no JSON: its reader says so better
    if (fits && !missing) return {std::move(tensors), std::move(config), std::move(id)};
    if (!id.empty()) {
      std::optional<std::string> other = unfinished_config(path, id);
      if (other) return {std::move(tensors), std::move(*other), std::move(id)};
    }
    // Somebody may have saved between the two reads, in which case a second look shows other files.
    if (!first && config == last_config && id == last_id) {
      if (missing) {
        throw std::runtime_error(directory.string() + ": has no config.json, which says what model its weights are of");
      }
      // An interrupted save would have left its own: somebody has put this one there on purpose.
      if (config_id->empty()) return {std::move(tensors), std::move(config), std::move(id)};
      throw FormatError(
          path.string() + ": does not belong to the weights beside it: its " + kSaveId + " is " +
          in_quotes(*config_id) + ", theirs " + in_quotes(id) +
          ". A save was interrupted, or one of the files was replaced. Save the model again or, if this is "
          "their configuration, write their " +
          kSaveId + " into it");
    }
    last_config = std::move(config);
    last_id = std::move(id);
  }
}

}  // namespace diffattn::inline v0_1::detail
