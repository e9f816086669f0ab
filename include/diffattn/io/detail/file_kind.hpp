#pragma once

// What a file is instead of what it was taken for, told by its first bytes: for error messages alone.

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>

#include "diffattn/io/detail/safetensors_header_events.hpp"

namespace diffattn::inline v0_1::detail {

/// Whether text begins so: printable characters and white space, behind a byte order mark if there is one.
inline bool looks_like_text(std::string_view bytes) {
  if (bytes.starts_with("\xEF\xBB\xBF")) bytes.remove_prefix(3);
  return std::all_of(bytes.begin(), bytes.end(),
                     [](char c) { return (c >= ' ' && c <= '~') || c == '\n' || c == '\r' || c == '\t'; });
}

/// What a file of these bytes is, of 8 at least, that is no safetensors, and what to do with it; empty if it is unknown.
inline std::string what_instead(const std::byte* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), std::min<std::size_t>(size, 24));
  const std::string convert =
      ", not safetensors: load it in Python with torch.load and write it with safetensors.torch.save_file";
  if (bytes.starts_with("PK\x03\x04")) return "is a zip archive, PyTorch's own format (.pt, .pth, .bin)" + convert;
  // The opcode of a pickle's protocol, and its number.
  if (bytes[0] == '\x80' && bytes[1] >= 2 && bytes[1] <= 5) return "is a pickle, PyTorch's old format" + convert;
  if (bytes.starts_with("GGUF")) return "is a GGUF file, llama.cpp's format, not safetensors";
  if (bytes.starts_with("\x89HDF")) return "is an HDF5 file, not safetensors";
  if (bytes.starts_with("\x93NUMPY")) return "is a NumPy file, not safetensors";
  if (bytes.starts_with("version https://git-lfs")) {
    return "is a pointer of Git LFS, which stands for the file: get the file itself with git lfs pull";
  }
  if (!looks_like_text(bytes)) return "";
  return "begins with " + in_quotes(std::string(bytes)) + ", which looks like text or JSON, not like safetensors" +
         (bytes[0] == '{' ? " (a directory with a model.safetensors.index.json is opened by ShardedSafetensors)" : "");
}

}  // namespace diffattn::inline v0_1::detail
