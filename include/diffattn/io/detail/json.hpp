#pragma once

// JSON with nlohmann's values, read and written so that a program survives when memory is short. The destructor of a
// nlohmann::json that holds a list or an object allocates, and ends the program where it cannot: none is destroyed here
// before it has been emptied, and what is written is put together as text.

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"

namespace diffattn::inline v0_1::detail {

/// A JSON text as a tree; of two equal keys the last counts. Throws FormatError: `complaint`, such as "file: is not
/// valid JSON: ", and why.
class JsonTree {
 public:
  JsonTree(const std::string& text, const std::string& complaint) : JsonTree() {
    Builder builder{root_, complaint};
    nlohmann::json::sax_parse(text.data(), text.data() + text.size(), &builder);
  }
  explicit JsonTree(nlohmann::json&& parsed) noexcept : root_(std::move(parsed)) {}
  ~JsonTree() { empty(root_); }
  JsonTree(const JsonTree&) = delete;
  JsonTree& operator=(const JsonTree&) = delete;

  const nlohmann::json& root() const { return root_; }

 private:
  using Json = nlohmann::json;
  static constexpr std::size_t kDeepest = 500;  // empty() calls itself

  JsonTree() = default;

  /// Takes everything out of a value, from the leaves up: containers without content are destroyed without allocating.
  static void empty(Json& value) noexcept {
    if (value.is_array()) {
      auto& list = value.get_ref<Json::array_t&>();
      for (Json& element : list) empty(element);
      list.clear();
    } else if (value.is_object()) {
      auto& object = value.get_ref<Json::object_t&>();
      for (auto& [key, element] : object) empty(element);
      object.clear();
    }
  }

  /// What nlohmann's parser calls.
  struct Builder {
    Json& root;
    const std::string& complaint;
    std::vector<Json*> open{};  // the containers around what comes next
    Json* slot = nullptr;       // of the last key

    bool null() { return add(nullptr); }
    bool boolean(bool value) { return add(value); }
    bool number_integer(std::int64_t value) { return add(value); }
    bool number_unsigned(std::uint64_t value) { return add(value); }
    bool number_float(double value, const std::string& /*text*/) { return add(value); }
    bool string(std::string& value) { return add(std::move(value)); }
    bool binary(Json::binary_t& /*value*/) { return false; }  // JSON has none
    bool start_object(std::size_t /*size*/) { return begin(Json::value_t::object); }
    bool start_array(std::size_t /*size*/) { return begin(Json::value_t::array); }
    bool end_object() { return end(); }
    bool end_array() { return end(); }
    bool key(std::string& name) {
      slot = &open.back()->get_ref<Json::object_t&>()[name];
      empty(*slot);
      return true;
    }
    bool parse_error(std::size_t /*position*/, const std::string& /*token*/, const Json::exception& error) {
      throw FormatError(complaint + error.what());
    }

   private:
    template <typename Value>
    Json& place(Value&& value) {
      if (open.empty()) return root = Json(std::forward<Value>(value));
      if (open.back()->is_object()) return *slot = Json(std::forward<Value>(value));
      return open.back()->get_ref<Json::array_t&>().emplace_back(std::forward<Value>(value));
    }
    template <typename Value>
    bool add(Value&& value) {
      place(std::forward<Value>(value));
      return true;
    }
    bool begin(Json::value_t type) {
      if (open.size() == kDeepest) throw FormatError(complaint + "it nests too deeply");
      open.push_back(&place(type));
      return true;
    }
    bool end() {
      open.pop_back();
      return true;
    }
  };

  Json root_;
};

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
