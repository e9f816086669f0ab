#pragma once

// Files read and written whole. What is written is written beside its target and renamed: it is there whole or not at
// all. Both throw std::runtime_error naming the file.

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <system_error>

#include "diffattn/io/detail/file_bytes.hpp"

namespace diffattn::inline v0_1::detail {

/// write(stream) writes the content.
template <typename F>
void write_whole(const std::filesystem::path& path, F&& write) {
  std::filesystem::path unfinished = path;
  unfinished += ".unfinished";
  std::ofstream out(unfinished, std::ios::binary | std::ios::trunc);
  write(out);
  out.close();
  std::error_code error;
  if (out) std::filesystem::rename(unfinished, path, error);
  if (!out || error) {
    std::filesystem::remove(unfinished, error);
    throw std::runtime_error(path.string() + ": cannot be written");
  }
}

inline void write_text(const std::filesystem::path& path, const std::string& text) {
  write_whole(path, [&](std::ostream& out) { out.write(text.data(), static_cast<std::streamsize>(text.size())); });
}

inline std::string read_text(const std::filesystem::path& path) {
  const FileBytes bytes(path);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace diffattn::inline v0_1::detail
