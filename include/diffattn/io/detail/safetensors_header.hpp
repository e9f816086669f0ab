#pragma once

// The header of a safetensors file, parsed and checked to the letter of the format
// (github.com/huggingface/safetensors): 8 bytes of header length, little-endian; a JSON object {name: {dtype, shape,
// data_offsets}} with an optional "__metadata__" of strings; then the data, which the tensors must cover without gap or
// overlap. What a reader of ours may be handed is anybody's file, so every rule is checked before a single offset is
// believed.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/io/detail/dtype.hpp"

namespace diffattn::inline v0_1 {

static_assert(std::endian::native == std::endian::little, "diffattn: safetensors are little-endian, like this reader");

/// One tensor of a file: its element type, its shape (row-major, rank 0 upwards) and where its bytes are in the data.
struct TensorInfo {
  Dtype dtype;
  std::vector<Index> shape;
  std::size_t begin;
  std::size_t end;
};

namespace detail {

struct SafetensorsHeader {
  std::map<std::string, TensorInfo> tensors;
  std::map<std::string, std::string> metadata;
  std::size_t data_begin = 0;  // bytes before the data
};

/// A name of a file's choosing, as JSON writes it: a NUL in it cannot end a message, nor a control character garble it.
inline std::string in_quotes(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

inline std::string shape_text(const std::vector<Index>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

/// The bytes that a tensor takes, or nothing if an extent is negative or the product too large for an Index. A zero
/// excuses nothing: what is computed from the other extents must not overflow either.
template <typename Extent>
std::optional<std::uint64_t> byte_size(Dtype dtype, const std::vector<Extent>& shape) {
  constexpr auto most = static_cast<std::uint64_t>(std::numeric_limits<Index>::max());
  std::uint64_t bytes = describe(dtype).size;
  bool empty = false;
  for (const Extent signed_extent : shape) {
    const auto extent = static_cast<std::uint64_t>(signed_extent);
    if (extent == 0) {
      empty = true;
    } else if (bytes > most / extent) {
      return std::nullopt;
    } else {
      bytes *= extent;
    }
  }
  return empty ? 0 : bytes;
}

/// Parses `size` bytes of a whole file; `file` names it in errors. Throws FormatError.
class SafetensorsHeaderParser {
 public:
  SafetensorsHeaderParser(const std::byte* bytes, std::size_t size, std::string file)
      : bytes_(bytes), size_(size), file_(std::move(file)) {}

  SafetensorsHeader parse() const {
    const std::size_t length = header_length();
    const nlohmann::json json = parse_json(length);
    SafetensorsHeader header;
    header.data_begin = kLengthBytes + length;
    for (const auto& [name, value] : json.items()) {
      if (name == "__metadata__") {
        header.metadata = metadata(value);
      } else {
        header.tensors.emplace(name, tensor(name, value));
      }
    }
    check_coverage(header);
    return header;
  }

 private:
  static constexpr std::size_t kLengthBytes = 8;
  static constexpr std::size_t kLongestHeader = 100'000'000;  // the limit of the reference implementation
  static constexpr int kDeepestJson = 3;                      // file, tensor, list

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
    if (length > kLongestHeader) fail("claims a header of " + std::to_string(length) + " bytes, more than 100 MB");
    if (length > size_ - kLengthBytes) {
      fail("claims a header of " + std::to_string(length) + " bytes, but only " + std::to_string(size_ - kLengthBytes) +
           " follow");
    }
    if (length == 0 || bytes_[kLengthBytes] != std::byte{'{'}) fail("has a header that does not begin with {");
    return static_cast<std::size_t>(length);
  }

  nlohmann::json parse_json(std::size_t length) const {
    const char* const begin = reinterpret_cast<const char*>(bytes_) + kLengthBytes;
    // The parser would take a NUL for the end of the header and ignore the rest.
    if (std::memchr(begin, 0, length) != nullptr) fail("has a header with a NUL in it");
    // A DOM keeps the last of two equal keys and says nothing; the format forbids them.
    std::vector<std::set<std::string>> keys(kDeepestJson + 1);
    std::string described;  // the last key of the outermost object: a tensor, mostly
    using Json = nlohmann::json;
    const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
      const bool opens = event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start;
      if (opens && depth >= kDeepestJson) fail("has a header that nests " + in_quotes(described) + " too deeply");
      if (event == Json::parse_event_t::object_start) keys[static_cast<std::size_t>(depth)].clear();
      if (event == Json::parse_event_t::key) {
        const auto& key = parsed.get_ref<const std::string&>();
        if (depth == 1) described = key;
        if (!keys[static_cast<std::size_t>(depth - 1)].insert(key).second) {
          fail("has a header with the key " + in_quotes(key) + (depth == 1 ? "" : " of " + in_quotes(described)) +
               " twice");
        }
      }
      return true;
    };
    try {
      return Json::parse(begin, begin + length, check);
    } catch (const Json::exception& error) {
      fail(std::string("has a header that is not valid JSON: ") + error.what());
    }
  }

  std::map<std::string, std::string> metadata(const nlohmann::json& value) const {
    if (!value.is_object()) fail("has a __metadata__ that is not an object");
    std::map<std::string, std::string> result;
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string()) fail("has a __metadata__ whose " + in_quotes(key) + " is not a string");
      result.emplace(key, text.template get<std::string>());
    }
    return result;
  }

  TensorInfo tensor(const std::string& name, const nlohmann::json& value) const {
    if (!value.is_object()) fail(name, "is not described by an object");
    const auto field = [&](const char* key) -> const nlohmann::json& {
      const auto found = value.find(key);
      if (found == value.end()) fail(name, std::string("has no ") + key);
      return *found;
    };
    const nlohmann::json& dtype_name = field("dtype");
    if (!dtype_name.is_string()) fail(name, "has a dtype that is not a string");
    const auto dtype = dtype_from_name(dtype_name.get_ref<const std::string&>());
    if (!dtype) {
      fail(name, "has the unknown dtype " + dtype_name.dump() + " (known: F64, F32, F16, BF16, I64, I32)");
    }

    const std::vector<std::uint64_t> shape = unsigned_list(name, "shape", field("shape"));
    const std::optional<std::uint64_t> bytes = byte_size(*dtype, shape);
    if (!bytes) fail(name, "has a shape whose size overflows");
    const std::vector<std::uint64_t> offsets = unsigned_list(name, "data_offsets", field("data_offsets"));
    if (offsets.size() != 2) fail(name, "has data_offsets that are not a pair");
    if (offsets[0] > offsets[1]) fail(name, "has data_offsets that end before they begin");
    if (offsets[1] - offsets[0] != *bytes) {
      fail(name, "has data_offsets of " + std::to_string(offsets[1] - offsets[0]) + " bytes, but its shape takes " +
                     std::to_string(*bytes));
    }
    return {*dtype, std::vector<Index>(shape.begin(), shape.end()), static_cast<std::size_t>(offsets[0]),
            static_cast<std::size_t>(offsets[1])};
  }

  std::vector<std::uint64_t> unsigned_list(const std::string& name, const char* key, const nlohmann::json& list) const {
    if (!list.is_array()) fail(name, std::string("has a ") + key + " that is not a list");
    std::vector<std::uint64_t> values;
    for (const nlohmann::json& value : list) {
      if (!value.is_number_unsigned()) fail(name, std::string("has a ") + key + " with " + value.dump() + " in it");
      values.push_back(value.get<std::uint64_t>());
    }
    return values;
  }

  /// In the order of their offsets, tensors must follow each other from the first byte of the data to the last.
  void check_coverage(const SafetensorsHeader& header) const {
    using Named = std::pair<const std::string, TensorInfo>;
    std::vector<const Named*> ordered;
    for (const Named& tensor : header.tensors) ordered.push_back(&tensor);
    std::stable_sort(ordered.begin(), ordered.end(), [](const Named* a, const Named* b) {
      return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
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

}  // namespace detail
}  // namespace diffattn::inline v0_1
