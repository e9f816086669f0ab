#include <diffattn/io/json_document.hpp>

#include <nlohmann/json.hpp>
#include <string>

#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/throws.hpp"

namespace {

using diffattn::detail::JsonDocument;
using Type = JsonDocument::Type;

const char* const kDocument =
    R"({"a": [1, -2, 2.5e3, [], {}, [[["deep"]]]], "b": {"c": {"d": null, "e": [true, false]}},
  "a long key that is no small string": "a long text that is no small string", "empty": {}, "last": 18446744073709551615})";

std::string complaint(const std::string& text) {
  return support::thrown_by<diffattn::FormatError>([&] { JsonDocument(text, "file"); });
}

/// The document once more, as nlohmann would write it.
nlohmann::json copy_of(const JsonDocument& json, const JsonDocument::Value& value) {
  nlohmann::json copy;
  switch (value.type) {
    case Type::null:
      break;
    case Type::boolean:
      copy = value.number != 0;
      break;
    case Type::integer:
    case Type::number:
      copy = nlohmann::json::parse(value.text);
      CHECK(value.number == copy.get<double>());
      break;
    case Type::text:
      copy = value.text;
      break;
    case Type::list:
      copy = nlohmann::json::array();
      json.for_each(value, [&](const auto& child) { copy.push_back(copy_of(json, child)); });
      break;
    case Type::object:
      copy = nlohmann::json::object();
      json.for_each(value, [&](const auto& child) { copy[child.key] = copy_of(json, child); });
  }
  return copy;
}

}  // namespace

TEST_CASE("A document is what nlohmann's parser makes of the text") {
  for (const std::string text :
       {kDocument, "1", "null", "\"text\"", "[]", "{}", "[{\"a\": [1]}, {}]", "\xef\xbb\xbf{\"a\": 1}",
        "{\"a\": 1, \"a\": [2], \"a\": {\"b\": 3}}", "{\"a\": [[1, 2], {\"b\": [3]}], \"a\": 4, \"c\": 5}"}) {
    CAPTURE(text);
    const JsonDocument json(text, "file");
    CHECK(copy_of(json, json.root()) == nlohmann::json::parse(text));
  }
}

TEST_CASE("A member is found by its key, of equal ones the last, and of its own object only") {
  const JsonDocument json(R"({"a": {"b": 1, "c": {}}, "b": 2, "a": {"d": 3}, "e": null})", "file");
  REQUIRE(json.find(json.root(), "b") != nullptr);
  CHECK(json.find(json.root(), "b")->number == 2);
  const auto* const a = json.find(json.root(), "a");
  REQUIRE(a != nullptr);
  CHECK(json.find(*a, "b") == nullptr);
  CHECK(json.find(*a, "d")->number == 3);
  CHECK(json.find(json.root(), "e")->type == Type::null);
  CHECK(json.find(json.root(), "x") == nullptr);
  CHECK_FALSE(json.is_empty(*a));
  const JsonDocument empty("{}", "file");
  CHECK(empty.is_empty(empty.root()));
}

TEST_CASE("What is no JSON is refused as nlohmann's parser does") {
  for (const std::string text :
       {"", "{", "[1", "{\"a\"}", "{\"a\": 1,}", "[1] 2", "nul", "\"\xff\"", "1e999", "[[[1], {\"a\": [}]]"}) {
    CAPTURE(text);
    std::string said;
    try {
      const auto parsed = nlohmann::json::parse(text);
      FAIL(parsed);
    } catch (const nlohmann::json::exception& error) {
      said = error.what();
    }
    CHECK(complaint(text) == "file: is not valid JSON: " + said);
  }
  CHECK(complaint(std::string("{}\0x", 4)) == "file: is not valid JSON: there is a NUL in it");
  CHECK(complaint("\"" + std::string(100'000, 'x')).size() < 400);  // the parser repeats what it has read
}

TEST_CASE("Depth is no danger") {
  const std::string deep(100'000, '[');
  CHECK(complaint(deep).starts_with("file: is not valid JSON: "));
  const JsonDocument json(deep + std::string(100'000, ']'), "file");
  CHECK(json.root().end == 100'000);
  CHECK(complaint("[" + std::string(2'000'000, '[')).ends_with("it has more than 2,000,000 values"));
}

TEST_CASE("Memory may fail anywhere in a document's life") {
  for (const auto failures : {support::Failures::one, support::Failures::all_later}) {
    const std::string text = kDocument, name = "a name that is no small string";
    const std::size_t failed = support::for_every_failing_allocation([&] { JsonDocument(text, name); },
                                                                     [](bool threw) { CHECK(threw); }, failures);
    CHECK(failed >= (support::fails_allocations() ? 10U : 0U));
    const std::string broken = text.substr(0, text.size() - 1);
    support::for_every_failing_allocation(
        [&] {
          try {
            JsonDocument(broken, name);
          } catch (const diffattn::FormatError&) {
          }
        },
        [](bool) {}, failures);
  }
}
