#pragma once

// A file of tokens, memory-mapped: plain numbers one after another, little-endian, without a header. Token is the type
// of each: std::uint8_t reads any file as bytes, std::uint16_t and std::uint32_t what tokenizers commonly write.
//
// Errors   std::runtime_error if the file cannot be opened; FormatError if its size is no multiple of a token's.

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/file_bytes.hpp"

namespace diffattn::inline v0_1 {

template <typename Token>
class TokenFile {
  static_assert(std::is_unsigned_v<Token>, "diffattn: tokens are unsigned integers");

 public:
  /// Maps the file. Throws std::runtime_error and FormatError as said above.
  explicit TokenFile(const std::filesystem::path& path) : file_(path) {
    if (file_.size() % sizeof(Token) != 0) {
      throw FormatError(path.string() + ": " + std::to_string(file_.size()) +
                        " bytes are no whole number of tokens of " + std::to_string(sizeof(Token)));
    }
  }

  /// All tokens; valid as long as this object.
  std::span<const Token> tokens() const {
    return {reinterpret_cast<const Token*>(file_.data()), file_.size() / sizeof(Token)};
  }

 private:
  detail::FileBytes file_;
};

}  // namespace diffattn::inline v0_1
