#pragma once

// DiffLlamaOrigin: what a checkpoint's directory says beside what its model computes. Whoever writes the model back
// writes this too: load_diffllama and DiffLlama::load keep it in DecoderConfig::origin, save_diffllama takes it from
// there.
//
// Tested by tests/hugging_face/diffllama_export_test.cpp.

#include <any>
#include <filesystem>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>

#include "diffattn/core/file_bytes.hpp"
#include "diffattn/io/checkpoint_directory.hpp"
#include "diffattn/io/dtype.hpp"
#include "diffattn/io/json_document.hpp"
#include "diffattn/io/json_members.hpp"
#include "diffattn/io/sharded_safetensors.hpp"

namespace diffattn::inline v0_1::detail {

struct DiffLlamaOrigin {
  std::string config;                           // the text of config.json, without our mark
  CompanionFiles companions;                    // generation_config.json likewise, and the tokenizer
  std::map<std::string, Dtype> dtypes;          // by the tensors' names in transformers
  std::map<std::string, std::string> metadata;  // of the safetensors
};

/// The files of a directory that make a tokenizer, as transformers names them, mapped. What cannot be read is left out:
/// the model does not need it.
inline std::map<std::string, std::shared_ptr<const FileBytes>> tokenizer_files(const std::filesystem::path& directory) {
  std::map<std::string, std::shared_ptr<const FileBytes>> files;
  for (const char* const name :
       {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"}) {
    std::error_code error;
    if (!std::filesystem::is_regular_file(directory / name, error)) continue;
    try {
      auto bytes = std::make_shared<const FileBytes>(directory / name);
      files.emplace(name, std::move(bytes));
    } catch (const std::runtime_error&) {  // there, but not ours to read
    }
  }
  return files;
}

/// The text of an object without our mark.
inline std::string without_mark(const std::string& text, const std::string& file) {
  JsonMembers members(JsonDocument(text, file));
  members.remove(kSaveId);
  return members.text();
}

/// What a directory says that was opened as `files`; `dtypes` are those of the model's tensors.
inline std::shared_ptr<const DiffLlamaOrigin> read_origin(const std::filesystem::path& directory,
                                                          const CheckpointFiles& files,
                                                          const ShardedSafetensors& tensors,
                                                          std::map<std::string, Dtype> dtypes) {
  auto origin = std::make_shared<DiffLlamaOrigin>();
  origin->config = without_mark(files.config, "config.json");
  if (save_id_of(files.generation_config)) {
    origin->companions.generation_config = without_mark(files.generation_config, "generation_config.json");
  }
  origin->companions.others = tokenizer_files(directory);
  origin->dtypes = std::move(dtypes);
  for (const Safetensors& file : tensors.files()) {
    origin->metadata.insert(file.metadata().begin(), file.metadata().end());
  }
  origin->metadata.erase(kSaveId);
  return origin;
}

/// The origin that a decoder's configuration carries, or null.
inline const DiffLlamaOrigin* origin_of(const std::any& origin) {
  const auto* const found = std::any_cast<std::shared_ptr<const DiffLlamaOrigin>>(&origin);
  return found == nullptr ? nullptr : found->get();
}

}  // namespace diffattn::inline v0_1::detail
