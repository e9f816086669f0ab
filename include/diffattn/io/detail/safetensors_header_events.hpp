#pragma once

// What the JSON of a safetensors header says, taken from the events of nlohmann's parser as they come: names, element
// types, shapes and places, each checked by itself. That the tensors cover the data, and the bytes around the JSON, are
// safetensors_header.hpp's business.
//
// Errors   by the caller's fail(why). Equal keys at once; else the first problem, once the whole text is known to be
//          JSON.
// Cost     one pass and no tree: time and memory grow with the length of the header, whatever is in it.
//
// Tested by tests/io/bad_files_test.cpp, mutations_test.cpp and tests/fuzz.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/io/dtype.hpp"

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

/// The beginning of a text that may be as long as a file.
inline std::string shortened(const std::string& text, std::size_t most = 200) {
  return text.size() <= most ? text : text.substr(0, most) + "…";
}

/// A name of a file's choosing, as JSON writes it: a NUL in it cannot end a message, nor a control character garble it.
inline std::string in_quotes(const std::string& text) {
  return nlohmann::json(shortened(text)).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

inline std::string shape_text(const std::vector<Index>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

/// The elements of a tensor, or nothing if an extent is negative, or they or their bytes are too many for an Index. A
/// zero excuses nothing: what is computed from the other extents must not overflow either.
template <typename Extent>
std::optional<std::uint64_t> element_count(Dtype dtype, const std::vector<Extent>& shape) {
  constexpr auto most_bytes = static_cast<std::uint64_t>(std::numeric_limits<Index>::max());
  const std::size_t bits = describe(dtype).bits;
  const std::uint64_t most = bits < 8 ? most_bytes : most_bytes / (bits / 8);
  std::uint64_t count = 1;
  bool empty = false;
  for (const Extent signed_extent : shape) {
    const auto extent = static_cast<std::uint64_t>(signed_extent);
    if (extent == 0) {
      empty = true;
    } else if (count > most / extent) {
      return std::nullopt;
    } else {
      count *= extent;
    }
  }
  return empty ? 0 : count;
}

/// The bytes that they take. Those of less than 8 bits must fill whole bytes.
template <typename Extent>
std::optional<std::uint64_t> byte_size(Dtype dtype, const std::vector<Extent>& shape) {
  const std::optional<std::uint64_t> count = element_count(dtype, shape);
  const std::size_t bits = describe(dtype).bits;
  return count ? std::optional(*count / 8 * bits + *count % 8 * bits / 8) : std::nullopt;
}

/// Takes the events of nlohmann's parser and makes a header of them, in one pass and without a tree: time and memory
/// grow with the header's length, whatever is in it. `fail(why)` throws.
template <typename Fail>
class SafetensorsHeaderEvents {
 public:
  explicit SafetensorsHeaderEvents(const Fail& fail) : fail_(fail) {}

  /// What was read. Throws if a tensor is not described as the format says.
  SafetensorsHeader finish() {
    if (!problem_.empty()) fail_(problem_);
    return std::move(header_);
  }

  bool null() { return value("null"); }
  bool boolean(bool value_) { return value(value_ ? "true" : "false"); }
  bool number_integer(std::int64_t number) { return value(std::to_string(number)); }
  bool number_float(double number, const std::string&) { return value(nlohmann::json(number).dump()); }
  bool number_unsigned(std::uint64_t number) {
    if (place() != Place::numbers) return value(std::to_string(number));
    list().push_back(number);
    return true;
  }
  bool string(std::string& text) {
    if (place() == Place::metadata) {
      metadata_->second = std::move(text);
    } else if (place() == Place::tensor && field_ == Field::dtype) {
      dtype_ = dtype_from_name(text);
      if (!dtype_) note("has the unknown dtype " + in_quotes(text) + " (known: " + known_dtypes() + ")");
    } else {
      return value(in_quotes(text));
    }
    return true;
  }
  bool binary(const std::vector<std::uint8_t>&) { return false; }  // JSON has none

  bool start_object(std::size_t) {
    open(true);
    return true;
  }
  bool start_array(std::size_t) {
    open(false);
    return true;
  }
  bool end_object() {
    if (place() == Place::tensor) end_tensor();
    --depth_;
    return true;
  }
  bool end_array() {
    --depth_;
    return true;
  }

  bool key(std::string& text) {
    // The format forbids equal keys; a reader that takes one of them would hide the other.
    bool is_new = true;
    switch (place()) {
      case Place::file:
        name_ = text;
        if (text == "__metadata__") {
          is_new = !std::exchange(has_metadata_, true);
        } else {
          std::tie(tensor_, is_new) = header_.tensors.try_emplace(std::move(text));
        }
        break;
      case Place::metadata:
        std::tie(metadata_, is_new) = header_.metadata.try_emplace(std::move(text));
        break;
      case Place::tensor:
        field_ = text == "dtype"          ? Field::dtype
                 : text == "shape"        ? Field::shape
                 : text == "data_offsets" ? Field::data_offsets
                                          : Field::other;
        is_new = !std::exchange(has_[static_cast<std::size_t>(field_)], true);
        if (field_ == Field::other) is_new = others_[depth_].insert(text).second;
        break;
      default:
        is_new = others_[depth_].insert(text).second;
    }
    if (!is_new) {
      const std::string& what = place() == Place::file ? name_ : place() == Place::metadata ? metadata_->first : text;
      fail_("has a header with the key " + in_quotes(what) + (depth_ == 1 ? "" : " of " + in_quotes(name_)) + " twice");
    }
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& error) {
    fail_("has a header that is not valid JSON: " + shortened(error.what(), 300));
    return false;
  }

 private:
  enum class Place { outside, file, tensor, metadata, numbers, ignored };
  enum class Field { dtype, shape, data_offsets, other };
  static constexpr std::size_t kDeepest = 3;  // file, tensor, list

  Place place() const { return places_[depth_]; }
  std::vector<std::uint64_t>& list() { return field_ == Field::shape ? shape_ : data_offsets_; }

  static std::string known_dtypes() {
    std::string text;
    for (const DtypeName& known : kDtypes) text += (text.empty() ? "" : ", ") + std::string(known.name);
    return text;
  }

  /// The first problem with what is described is kept until the whole text is known to be JSON.
  void note(const std::string& why) {
    if (problem_.empty()) problem_ = "tensor " + in_quotes(name_) + " " + why;
  }
  void note_metadata(const std::string& why) {
    if (problem_.empty()) problem_ = "has a __metadata__ " + why;
  }

  void open(bool object) {
    if (depth_ == kDeepest) fail_("has a header that nests " + in_quotes(name_) + " too deeply");
    Place next = Place::ignored;
    if (place() == Place::outside) next = Place::file;
    if (place() == Place::file && object) next = name_ == "__metadata__" ? Place::metadata : Place::tensor;
    const bool numbers = !object && (field_ == Field::shape || field_ == Field::data_offsets);
    if (place() == Place::tensor && numbers) next = Place::numbers;
    const bool unknown = place() == Place::tensor && field_ == Field::other;
    if (next == Place::ignored && !unknown) value(object ? "an object" : "a list");
    places_[++depth_] = next;
    others_[depth_].clear();
    if (next == Place::numbers) list().clear();
    if (next == Place::tensor) {
      dtype_.reset();
      std::fill(std::begin(has_), std::end(has_), false);
    }
  }

  /// A value that is not what its place asks for; `shown` is how to say it.
  bool value(const std::string& shown) {
    if (place() == Place::file) {
      if (name_ != "__metadata__") note("is not described by an object");
      if (name_ == "__metadata__" && shown != "null") note_metadata("that is not an object");
    } else if (place() == Place::metadata) {
      note_metadata("whose " + in_quotes(metadata_->first) + " is not a string");
    } else if (place() == Place::numbers) {
      note(std::string("has a ") + field_name() + " with " + shown + " in it");
    } else if (place() == Place::tensor && field_ != Field::other) {
      note(std::string("has a ") + field_name() + " that is not a " + (field_ == Field::dtype ? "string" : "list"));
    }
    return true;
  }

  const char* field_name() const {
    return field_ == Field::dtype ? "dtype" : field_ == Field::shape ? "shape" : "data_offsets";
  }

  void end_tensor() {
    for (const Field field : {Field::dtype, Field::shape, Field::data_offsets}) {
      field_ = field;
      if (!has_[static_cast<std::size_t>(field)]) note(std::string("has no ") + field_name());
    }
    if (!problem_.empty()) return;
    const std::optional<std::uint64_t> count = element_count(*dtype_, shape_), bytes = byte_size(*dtype_, shape_);
    if (!count) return note("has a shape whose size overflows");
    if (*count % 8 * describe(*dtype_).bits % 8 != 0) return note("has a shape that does not fill whole bytes");
    if (data_offsets_.size() != 2) return note("has data_offsets that are not a pair");
    const std::uint64_t begin = data_offsets_[0], end = data_offsets_[1];
    if (begin > end) return note("has data_offsets that end before they begin");
    if (end - begin != *bytes) {
      return note("has data_offsets of " + std::to_string(end - begin) + " bytes, but its shape takes " +
                  std::to_string(*bytes));
    }
    tensor_->second = {*dtype_, std::vector<Index>(shape_.begin(), shape_.end()), static_cast<std::size_t>(begin),
                       static_cast<std::size_t>(end)};
  }

  const Fail& fail_;
  SafetensorsHeader header_;
  std::string problem_;
  std::size_t depth_ = 0;
  Place places_[kDeepest + 1] = {Place::outside};
  std::string name_;  // the last key of the file
  std::map<std::string, TensorInfo>::iterator tensor_{};
  std::map<std::string, std::string>::iterator metadata_{};
  bool has_metadata_ = false;
  std::set<std::string> others_[kDeepest + 1];  // keys of an object that are none of the format's
  Field field_ = Field::other;
  bool has_[4] = {};  // which fields the tensor has
  std::optional<Dtype> dtype_;
  std::vector<std::uint64_t> shape_, data_offsets_;
};

}  // namespace detail
}  // namespace diffattn::inline v0_1
