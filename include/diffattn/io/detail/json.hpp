#pragma once

// JSON that is written, put together as text: the destructor of a nlohmann::json that holds a list or an object
// allocates, and ends the program where it cannot. json_document.hpp reads.

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>

namespace diffattn::inline v0_1::detail {

/// A number, a text, true, false or null as JSON.
template <typename Scalar>
std::string json_text(const Scalar& value) {
  return nlohmann::json(value).dump();
}

/// A JSON object as text, a line for each field, in the order in which they are added; `indent` spaces stand before its
/// last line, two more before the others.
class JsonObjectText {
 public:
  explicit JsonObjectText(std::size_t indent = 0) : newline_("\n" + std::string(indent, ' ')) {}

  template <typename Scalar>
  void add(const char* key, const Scalar& value) {
    add_json(key, json_text(value));
  }
  /// A field whose value is JSON already.
  void add_json(const char* key, const std::string& json) {
    text_ += (text_.empty() ? "{" : ",") + newline_ + "  " + json_text(key) + ": " + json;
  }
  std::string text() const { return text_.empty() ? "{}" : text_ + newline_ + "}"; }

 private:
  std::string newline_, text_;
};

}  // namespace diffattn::inline v0_1::detail
