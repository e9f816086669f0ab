#pragma once

// Text files read and written whole: what is written is there whole or not at all (unfinished_file.hpp). Both throw
// std::runtime_error naming the file.
//
// Tested by tests/io/detail/unfinished_file_test.cpp and checkpoint_directory_test.cpp.

#include <filesystem>
#include <string>

#include "diffattn/core/file_bytes.hpp"
#include "diffattn/io/detail/unfinished_file.hpp"

namespace diffattn::inline v0_1::detail {

inline void write_text(const std::filesystem::path& path, const std::string& text) {
  UnfinishedFile file(path);
  file.write(text.data(), text.size());
  file.finish();
  file.replace_target();
}

inline std::string read_text(const std::filesystem::path& path) {
  const FileBytes bytes(path);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace diffattn::inline v0_1::detail
