#pragma once

// JsonDocument: a JSON text as a flat list of its values, in the order of the text. Unlike a tree it is made, searched
// and destroyed without recursion, in time that grows with the text whatever is in it, and destroying it allocates
// nothing, so that running out of memory is an exception like any other.
//
//   const JsonDocument json(text, "config.json");
//   const JsonDocument::Value* value = json.find(json.root(), "hidden_size");       null if there is none
//   json.for_each(*value, [](const JsonDocument::Value& child) { … });               of a list or an object
//
// Of equal keys the last one counts, as in Python. Errors: FormatError naming the file.

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/io/safetensors_header.hpp"

namespace diffattn::inline v0_1::detail {

class JsonDocument {
 public:
  enum class Type { null, boolean, integer, number, text, list, object };

  struct Value {
    Type type;
    std::string key;      // of a member of an object
    std::string text;     // a string, or a number as it was written
    double number;        // of a number; 0 or 1 of a boolean
    std::size_t end = 0;  // the index behind its last child
  };

  JsonDocument(const std::string& text, const std::string& file) {
    const auto fail = [&](const std::string& why) { throw FormatError(file + ": is not valid JSON: " + why); };
    if (text.size() > kLongest) fail("it has " + std::to_string(text.size()) + " bytes, more than 100 MB");
    // The parser would take a NUL for the end of the text and ignore the rest.
    if (text.find('\0') != text.npos) fail("there is a NUL in it");
    Events<decltype(fail)> events{values_, {}, {}, fail};
    nlohmann::json::sax_parse(text, &events);
  }

  const Value& root() const { return values_.front(); }

  const Value* find(const Value& object, const std::string& key) const {
    const Value* found = nullptr;
    for_each(object, [&](const Value& child) {
      if (child.key == key) found = &child;
    });
    return found;
  }

  template <typename F>
  void for_each(const Value& parent, F&& f) const {
    for (std::size_t i = index_of(parent) + 1; i < parent.end; i = values_[i].end) {
      f(values_[i]);
    }
  }

  bool is_empty(const Value& parent) const { return parent.end == index_of(parent) + 1; }

  /// A value as JSON on one line: numbers as they were written, members in their order.
  std::string text_of(const Value& value) const {
    std::string text;
    std::vector<const Value*> open;  // lists and objects that have not ended
    const std::size_t first = index_of(value);
    for (std::size_t i = first; i < value.end; ++i) {
      const Value& here = values_[i];
      if (i != first) {
        if (i != index_of(*open.back()) + 1) text += ", ";
        if (open.back()->type == Type::object) text += in_json(here.key) + ": ";
      }
      switch (here.type) {
        case Type::text:
          text += in_json(here.text);
          break;
        case Type::list:
        case Type::object:
          text += here.type == Type::list ? '[' : '{';
          open.push_back(&here);
          break;
        case Type::integer:
        case Type::number:
          text += here.text;
          break;
        default:
          text += shown(here);
      }
      for (; !open.empty() && open.back()->end == i + 1; open.pop_back()) {
        text += open.back()->type == Type::list ? ']' : '}';
      }
    }
    return text;
  }

  /// A string as JSON has it.
  static std::string in_json(const std::string& text) { return nlohmann::json(text).dump(); }

  /// A value in an error message.
  static std::string shown(const Value& value) {
    switch (value.type) {
      case Type::null:
        return "null";
      case Type::boolean:
        return value.number != 0 ? "true" : "false";
      case Type::text:
        return in_quotes(value.text);
      case Type::list:
        return "a list";
      case Type::object:
        return "an object";
      default:
        return shortened(value.text, 80);
    }
  }

 private:
  static constexpr std::size_t kLongest = 100'000'000;
  static constexpr std::size_t kMost = 2'000'000;

  /// What nlohmann's parser calls.
  template <typename Fail>
  struct Events {
    std::vector<Value>& values;
    std::vector<std::size_t> open;  // lists and objects that have not ended
    std::string next_key;
    const Fail& fail;

    bool add(Type type, std::string text, double number) {
      if (values.size() == kMost) fail("it has more than 2,000,000 values");
      values.push_back({type, std::exchange(next_key, {}), std::move(text), number, values.size() + 1});
      return true;
    }
    bool null() { return add(Type::null, {}, 0); }
    bool boolean(bool value) { return add(Type::boolean, {}, value ? 1 : 0); }
    bool number_integer(std::int64_t value) {
      return add(Type::integer, std::to_string(value), static_cast<double>(value));
    }
    bool number_unsigned(std::uint64_t value) {
      return add(Type::integer, std::to_string(value), static_cast<double>(value));
    }
    bool number_float(double value, const std::string& written) { return add(Type::number, written, value); }
    bool string(std::string& value) { return add(Type::text, std::move(value), 0); }
    bool binary(const std::vector<std::uint8_t>&) { return false; }  // JSON has none
    bool key(std::string& value) {
      next_key = std::move(value);
      return true;
    }
    bool start(Type type) {
      add(type, {}, 0);
      open.push_back(values.size() - 1);
      return true;
    }
    bool end() {
      values[open.back()].end = values.size();
      open.pop_back();
      return true;
    }
    bool start_object(std::size_t) { return start(Type::object); }
    bool start_array(std::size_t) { return start(Type::list); }
    bool end_object() { return end(); }
    bool end_array() { return end(); }
    bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& error) {
      fail(shortened(error.what(), 300));
      return false;
    }
  };

  std::size_t index_of(const Value& value) const { return static_cast<std::size_t>(&value - values_.data()); }

  std::vector<Value> values_;
};

}  // namespace diffattn::inline v0_1::detail
