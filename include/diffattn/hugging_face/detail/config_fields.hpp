#pragma once

// The fields of one JSON object that anybody may have written, each checked as it is read. What is null is as absent.
//
// Tested by tests/hugging_face/diffllama_config_test.cpp.

#include <cmath>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/io/json_document.hpp"

namespace diffattn::inline v0_1::detail {

/// No count in a file may be larger: products of two of them fit an Index, with room.
inline constexpr Index kLargestCount = Index{1} << 28;

class ConfigFields {
 public:
  using Value = JsonDocument::Value;
  using Type = JsonDocument::Type;

  /// `prefix` stands before the names of fields in errors.
  ConfigFields(const JsonDocument& json, const Value& object, std::string file, std::string prefix = "")
      : json_(json), object_(object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  [[noreturn, gnu::cold, gnu::noinline]] void fail(const char* key, const std::string& why) const {
    throw FormatError(file_ + ": " + prefix_ + key + " " + why);
  }
  [[noreturn, gnu::cold, gnu::noinline]] void fail(const char* key, const char* expected, const Value& value) const {
    fail(key, std::string("must be ") + expected + ", got " + JsonDocument::shown(value));
  }

  const JsonDocument& json() const { return json_; }

  /// Whether the object has the field, null or not.
  bool has(const char* key) const { return json_.find(object_, key) != nullptr; }

  /// The value, or null if it is absent or null.
  const Value* find(const char* key) const {
    const Value* const found = json_.find(object_, key);
    return found == nullptr || found->type == Type::null ? nullptr : found;
  }

  /// The object `key` of this one, whose fields are called key.… in errors.
  ConfigFields object(const char* key) const {
    const Value* const value = find(key);
    if (value == nullptr) fail(key, "is missing");
    if (value->type != Type::object) fail(key, "an object", *value);
    return ConfigFields(json_, *value, file_, prefix_ + key + ".");
  }

  Index count(const char* key, Index otherwise) const {
    const Value* const value = find(key);
    if (value == nullptr) return otherwise;
    if (value->type != Type::integer || value->number < 1 || value->number > static_cast<double>(kLargestCount)) {
      fail(key, "a whole number from 1 to 2^28", *value);
    }
    return static_cast<Index>(value->number);
  }
  double number(const char* key, double otherwise) const {
    const Value* const value = find(key);
    if (value == nullptr) return otherwise;
    if (value->type != Type::integer && value->type != Type::number) fail(key, "a number", *value);
    return value->number;
  }
  double positive(const char* key, double otherwise) const {
    const double value = number(key, otherwise);
    if (!(value > 0) || !std::isfinite(value)) fail(key, "must be a positive number, got " + std::to_string(value));
    return value;
  }
  double required_positive(const char* key) const {
    if (find(key) == nullptr) fail(key, "is missing");
    return positive(key, 1);
  }
  bool boolean(const char* key, bool otherwise) const {
    const Value* const value = find(key);
    if (value == nullptr) return otherwise;
    if (value->type != Type::boolean) fail(key, "true or false", *value);
    return value->number != 0;
  }
  std::string text(const char* key, const char* otherwise) const {
    const Value* const value = find(key);
    if (value == nullptr) return otherwise;
    if (value->type != Type::text) fail(key, "a string", *value);
    return value->text;
  }
  std::vector<double> required_positives(const char* key, Index size) const {
    const Value* const value = find(key);
    if (value == nullptr) fail(key, "is missing");
    if (value->type != Type::list) fail(key, "a list of numbers", *value);
    std::vector<double> numbers;
    json_.for_each(*value, [&](const Value& child) {
      const bool is_number = child.type == Type::integer || child.type == Type::number;
      if (!is_number || !(child.number > 0)) fail(key, "a list of positive numbers", child);
      numbers.push_back(child.number);
    });
    if (static_cast<Index>(numbers.size()) != size) {
      fail(key,
           "must have " + std::to_string(size) + " numbers, half the head_dim, got " + std::to_string(numbers.size()));
    }
    return numbers;
  }

  /// eos_token_id: none, one or a list. Negative ones stand for none, as no token is called so.
  std::vector<Index> token_ids(const char* key) const {
    std::vector<Index> ids;
    const Value* const value = find(key);
    if (value == nullptr) return ids;
    const auto add = [&](const Value& id) {
      if (id.type != Type::integer || id.number > static_cast<double>(kLargestCount)) fail(key, "token ids", *value);
      if (id.number >= 0) ids.push_back(static_cast<Index>(id.number));
    };
    if (value->type == Type::list) {
      json_.for_each(*value, add);
    } else {
      add(*value);
    }
    return ids;
  }

 private:
  const JsonDocument& json_;
  const Value& object_;
  std::string file_, prefix_;
};

}  // namespace diffattn::inline v0_1::detail
