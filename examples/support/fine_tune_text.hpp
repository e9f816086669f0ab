#pragma once

// The text that example 11 learns.

#include <algorithm>
#include <cstdint>
#include <diffattn/training/token_file.hpp>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/fine_tune_options.hpp"

namespace example {

/// The bytes of --text: of a file, or of all files in a directory, in the order of their names. Throws
/// std::runtime_error unless the last twentieth, which is held out, is a sequence and the byte behind it.
inline std::vector<std::uint8_t> text_for(const FineTuneOptions& options) {
  std::vector<std::filesystem::path> paths;
  if (std::filesystem::is_directory(options.text)) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(options.text)) {
      if (entry.is_regular_file()) paths.push_back(entry.path());
    }
    std::sort(paths.begin(), paths.end());
  } else {
    paths = {options.text};
  }
  std::vector<std::uint8_t> text;
  for (const auto& path : paths) {
    if (std::filesystem::file_size(path) == 0) continue;
    const diffattn::TokenFile<std::uint8_t> file(path);
    text.insert(text.end(), file.tokens().begin(), file.tokens().end());
  }
  if (text.size() / 20 > static_cast<std::size_t>(options.length)) return text;
  throw std::runtime_error(options.text.string() + ": has " + std::to_string(text.size()) + " bytes; --length " +
                           std::to_string(options.length) + " needs at least " +
                           std::to_string(20 * (options.length + 1)));
}

}  // namespace example
