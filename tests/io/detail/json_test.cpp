#include <diffattn/io/detail/json.hpp>

#include <limits>
#include <nlohmann/json.hpp>
#include <string>

#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/throws.hpp"

using diffattn::detail::JsonObjectText;
using diffattn::detail::JsonTree;

namespace {

const char* const kDocument =
    R"({"a": [1, -2, 2.5e3, [], {}, [[["deep"]]]], "b": {"c": {"d": null, "e": [true, false]}},
  "a long key that is no small string": "a long text that is no small string", "empty": {}, "last": 18446744073709551615})";

std::string complaint(const std::string& text) {
  return support::thrown_by<diffattn::FormatError>([&] { JsonTree(text, "file: "); });
}

}  // namespace

TEST_CASE("A tree is what nlohmann's parser makes of the text") {
  for (const std::string text :
       {kDocument, "1", "null", "\"text\"", "[]", "{}", "[{\"a\": [1]}, {}]",
        "{\"a\": 1, \"a\": [2], \"a\": {\"b\": 3}}", "{\"a\": [[1, 2], {\"b\": [3]}], \"a\": 4, \"c\": 5}"}) {
    CAPTURE(text);
    CHECK(JsonTree(text, "").root() == nlohmann::json::parse(text));
  }
}

TEST_CASE("What is no JSON is refused as nlohmann's parser does, and so is what nests too deeply") {
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
    CHECK(complaint(text) == "file: " + said);
  }
  const std::string deep(100'000, '[');
  CHECK(complaint(deep) == "file: it nests too deeply");
  CHECK(JsonTree(std::string(500, '[') + std::string(500, ']'), "").root().size() == 1);
}

TEST_CASE("An object is written a line a field, as nlohmann writes the values") {
  JsonObjectText inner(2), outer;
  CHECK(JsonObjectText().text() == "{}");
  inner.add("x", 1.5);
  outer.add("text\n", "quoted \"é\"");
  outer.add("number", 1e-6);
  outer.add("count", std::numeric_limits<std::int64_t>::min());
  outer.add("flag", true);
  outer.add("nothing", nullptr);
  outer.add_json("inner", inner.text());
  nlohmann::ordered_json expected;
  expected["text\n"] = "quoted \"é\"";
  expected["number"] = 1e-6;
  expected["count"] = std::numeric_limits<std::int64_t>::min();
  expected["flag"] = true;
  expected["nothing"] = nullptr;
  expected["inner"]["x"] = 1.5;
  CHECK(outer.text() == expected.dump(2));
}

TEST_CASE("Memory may fail anywhere in a tree's life") {
  for (const auto failures : {support::Failures::one, support::Failures::all_later}) {
    const std::string text = kDocument;
    const std::size_t failed = support::for_every_failing_allocation(
        [&] { JsonTree(text, "a complaint that is no small string"); }, [](bool threw) { CHECK(threw); }, failures);
    CHECK(failed >= (support::fails_allocations() ? 30U : 0U));
    const std::string broken = text.substr(0, text.size() - 1);
    support::for_every_failing_allocation(
        [&] {
          try {
            JsonTree(broken, "a complaint that is no small string");
          } catch (const diffattn::FormatError&) {
          }
        },
        [](bool) {}, failures);
  }
}
