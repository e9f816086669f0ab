#pragma once

// The header of a safetensors file, parsed and checked to the letter of the format
// (github.com/huggingface/safetensors): 8 bytes of header length, little-endian; a JSON object {name: {dtype, shape,
// data_offsets}} with an optional "__metadata__" of strings; then the data, which the tensors must cover without gap or
// overlap. What a reader of ours may be handed is anybody's file, so every rule is checked before a single offset is
// believed.
//
// Tested by tests/io/bad_files_test.cpp, mutations_test.cpp and tests/fuzz.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/io/detail/file_kind.hpp"
#include "diffattn/io/detail/safetensors_header_events.hpp"

namespace diffattn::inline v0_1::detail {

/// Parses `size` bytes of a whole file; `file` names it in errors. Throws FormatError.
class SafetensorsHeaderParser {
 public:
  SafetensorsHeaderParser(const std::byte* bytes, std::size_t size, std::string file)
      : bytes_(bytes), size_(size), file_(std::move(file)) {}

  SafetensorsHeader parse() const {
    const std::size_t length = header_length();
    SafetensorsHeader header = parse_json(length);
    header.data_begin = kLengthBytes + length;
    check_coverage(header);
    return header;
  }

 private:
  static constexpr std::size_t kLengthBytes = 8;
  static constexpr std::size_t kLongestHeader = 100'000'000;  // the limit of the reference implementation

  [[noreturn, gnu::cold, gnu::noinline]] void fail(const std::string& why) const {
    throw FormatError(file_ + ": " + why);
  }
  [[noreturn, gnu::cold, gnu::noinline]] void fail(const std::string& tensor, const std::string& why) const {
    throw FormatError(file_ + ": tensor " + in_quotes(tensor) + " " + why);
  }

  std::size_t header_length() const {
    if (size_ < kLengthBytes) fail("is shorter than the 8 bytes of a header length");
    std::uint64_t length = 0;
    for (std::size_t i = 0; i < kLengthBytes; ++i) length |= std::to_integer<std::uint64_t>(bytes_[i]) << (8 * i);
    if (length > std::min(kLongestHeader, size_ - kLengthBytes)) {
      if (const std::string kind = what_instead(bytes_, size_); !kind.empty()) fail(kind);
    }
    if (length > kLongestHeader) fail("claims a header of " + std::to_string(length) + " bytes, more than 100 MB");
    if (length > size_ - kLengthBytes) {
      fail("claims a header of " + std::to_string(length) + " bytes, but only " + std::to_string(size_ - kLengthBytes) +
           " follow");
    }
    if (length == 0 || bytes_[kLengthBytes] != std::byte{'{'}) fail("has a header that does not begin with {");
    return static_cast<std::size_t>(length);
  }

  SafetensorsHeader parse_json(std::size_t length) const {
    const char* const begin = reinterpret_cast<const char*>(bytes_) + kLengthBytes;
    // The parser would take a NUL for the end of the header and ignore the rest.
    if (std::memchr(begin, 0, length) != nullptr) fail("has a header with a NUL in it");
    const auto refuse = [this](const std::string& why) { fail(why); };
    SafetensorsHeaderEvents events(refuse);
    nlohmann::json::sax_parse(begin, begin + length, &events);
    return events.finish();
  }

  /// In the order of their offsets, tensors must follow each other from the first byte of the data to the last.
  void check_coverage(const SafetensorsHeader& header) const {
    using Named = std::pair<const std::string, TensorInfo>;
    std::vector<const Named*> ordered;
    for (const Named& tensor : header.tensors) ordered.push_back(&tensor);
    std::sort(ordered.begin(), ordered.end(), [](const Named* a, const Named* b) {
      return std::tie(a->second.begin, a->second.end, a->first) < std::tie(b->second.begin, b->second.end, b->first);
    });
    const std::size_t data_size = size_ - header.data_begin;
    std::size_t covered = 0;
    for (const Named* tensor : ordered) {
      const auto& [name, info] = *tensor;
      if (info.end > data_size) {
        fail(name, "ends at byte " + std::to_string(info.end) + " of the data, which has " + std::to_string(data_size));
      }
      if (info.begin < covered) fail(name, "overlaps the tensor before it");
      if (info.begin > covered) fail(name, "leaves a gap of unused bytes before it");
      covered = info.end;
    }
    if (covered != data_size) {
      fail("has " + std::to_string(data_size - covered) + " bytes after the last tensor");
    }
  }

  const std::byte* bytes_;
  std::size_t size_;
  std::string file_;
};

}  // namespace diffattn::inline v0_1::detail
