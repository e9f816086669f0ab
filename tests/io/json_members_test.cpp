#include <diffattn/io/json_members.hpp>

#include <nlohmann/json.hpp>
#include <string>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace {

using diffattn::detail::JsonDocument;
using diffattn::detail::JsonMembers;

JsonMembers json_members(const std::string& text) { return JsonMembers(JsonDocument(text, "x.json")); }

}  // namespace

TEST_CASE("Members that are not touched are written as they were read", "[io][json]") {
  const std::string text = R"({"b": 1e-05, "a": [1, [], {}, [{"x": null, "y": [true, false]}, -0.0, 10000.0]],
    "text": "\u00e9 \"quoted\" \\ \n", "": {"deep": {"er": {"est": [[[1]]]}}}, "large": 12345678901234567890123,
    "most": 18446744073709551615, "least": -9223372036854775808, "n": null})";
  JsonMembers members = json_members(text);
  CHECK(nlohmann::json::parse(members.text()) == nlohmann::json::parse(text));
  CHECK(*members.find("b") == "1e-05");  // as it was written
  CHECK(*members.find("large") == "12345678901234567890123");
  CHECK(members.text().find("\"b\"") < members.text().find("\"a\""));
  CHECK(members.find("c") == nullptr);
  CHECK(json_members(members.text()).text() == members.text());
}

TEST_CASE("Members are changed in their place, added behind the others and removed", "[io][json]") {
  JsonMembers members = json_members(R"({"a": 1, "b": {"c": 2}, "a": 3, "d": 4})");
  CHECK(members.text() == "{\n  \"a\": 3,\n  \"b\": {\"c\": 2},\n  \"d\": 4\n}\n");  // the last of equal keys counts
  members.set("b", "[1, 2]");
  members.set("e\"", "5");
  members.remove("a");
  members.remove("x");
  members.set("d", "6");
  CHECK(members.text() == "{\n  \"b\": [1, 2],\n  \"d\": 6,\n  \"e\\\"\": 5\n}\n");
  members.set("a", "7");
  std::string keys;
  members.for_each([&](const std::string& key, const std::string&) { keys += key; });
  CHECK(keys == "bde\"a");
  CHECK(json_members("{}").text() == "{\n}\n");
  CHECK(json_members("[1]").text() == "{\n}\n");
}

TEST_CASE("Neither depth nor length of a text matters to its members", "[io][json]") {
  const std::string deep = "{\"a\": " + std::string(500000, '[') + std::string(500000, ']') + "}";
  CHECK(json_members(deep).text().size() > 1000000);
  std::string many = "{";
  for (int i = 0; i < 200000; ++i)
    many += (i == 0 ? "\"k" : ", \"k") + std::to_string(i % 100000) + "\": " + std::to_string(i);
  const JsonMembers members = json_members(many + "}");
  CHECK(*members.find("k7") == "100007");
}
