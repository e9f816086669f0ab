#include <diffattn/io/detail/json.hpp>

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>

#include "support/catch.hpp"

using diffattn::detail::JsonObjectText;

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
