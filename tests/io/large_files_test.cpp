// What anybody may have written costs time that grows with its length, however many entries it has and whatever they
// say. Measured in CPU time, since tests run side by side.

#include <diffattn/io/json_document.hpp>
#include <diffattn/io/safetensors.hpp>
#include <diffattn/io/sharded_safetensors.hpp>

#include <ctime>
#include <string>

#include "io/files.hpp"
#include "support/catch.hpp"

namespace {

template <typename F>
double seconds(F&& f) {
  const std::clock_t start = std::clock();
  f();
  return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
}

/// Time for 200,000 entries and its ratio to that for 50,000: 4 if it is linear, 16 if it is a square.
template <typename F>
void check_linear(F&& read) {
  const double few = seconds([&] { read(50'000); }), many = seconds([&] { read(200'000); });
  INFO(few << " s for 50,000, " << many << " s for 200,000");
  CHECK(many < 8 * few + 0.5);
  CHECK(many < 20);  // under 1 s where nothing but this runs, without sanitizers
}

/// {"<before>0<after>", …} with a comma between two.
std::string entries(int count, const std::string& before, const std::string& after) {
  std::string text;
  for (int i = 0; i < count; ++i) text += (i == 0 ? "" : ",") + before + std::to_string(i) + after;
  return text;
}

std::string tensors(int count) {
  std::string text;
  for (int i = 0; i < count; ++i) {
    text += (i == 0 ? "" : ",") + ("\"layers." + std::to_string(i)) +
            R"(.weight":{"dtype":"F32","shape":[1],"data_offsets":[)" + std::to_string(4 * i) + "," +
            std::to_string(4 * i + 4) + "]}";
  }
  return text;
}

template <typename F>
bool is_refused(F&& f) {
  try {
    f();
  } catch (const diffattn::FormatError& error) {
    CHECK(std::string(error.what()).size() < 2000);
    return true;
  }
  return false;
}

}  // namespace

TEST_CASE("A header of 200,000 tensors or metadata is read in linear time") {
  const files::Scratch scratch;
  check_linear([&](int n) {
    files::write(scratch / "t",
                 files::safetensors("{" + tensors(n) + "}", std::string(4 * static_cast<std::size_t>(n), '\0')));
    CHECK(diffattn::Safetensors(scratch / "t").tensors().size() == static_cast<std::size_t>(n));
  });
  check_linear([&](int n) {
    files::write(scratch / "t",
                 files::safetensors("{\"__metadata__\":{" + entries(n, "\"key ", "\":\"value\"") + "}}", ""));
    CHECK(diffattn::Safetensors(scratch / "t").metadata().size() == static_cast<std::size_t>(n));
  });
}

TEST_CASE("A header whose 200,000 entries are wrong is refused in linear time") {
  const files::Scratch scratch;
  const auto check_refused = [&](auto header) {
    check_linear([&](int n) {
      files::write(scratch / "t", files::safetensors("{" + header(n) + "}", ""));
      CHECK(is_refused([&] { diffattn::Safetensors(scratch / "t"); }));
    });
  };
  check_refused([](int n) { return "\"x\":{" + entries(n, "\"", "\":1") + "}"; });  // fields that no tensor has
  check_refused([](int n) { return "\"x\":{\"y\":{" + entries(n, "\"", "\":1") + "}}"; });
  check_refused([](int n) { return "\"x\":{\"dtype\":\"F32\",\"shape\":[" + entries(n, "", "") + "]}"; });
  check_refused([](int n) { return entries(n, "\"", "\":null"); });
  check_refused([](int n) { return entries(n, "\"", "\":{}"); });
  check_refused([](int n) { return "\"" + std::string(50 * static_cast<std::size_t>(n), 'x') + "\":1"; });
  check_refused([](int n) { return "\"x\":" + std::string(50 * static_cast<std::size_t>(n), '['); });
}

TEST_CASE("An index of 200,000 tensors is read in linear time") {
  check_linear([](int n) {
    const std::string text = "{\"weight_map\":{" + entries(n, "\"layers.", "\":\"one.safetensors\"") + "}}";
    CHECK(diffattn::detail::parse_checkpoint_index(text, "index").size() == static_cast<std::size_t>(n));
  });
  check_linear([](int n) {  // the same key again and again
    const std::string text = "{\"weight_map\":{" + entries(n, "\"x\":\"", "\"") + "}}";
    CHECK(diffattn::detail::parse_checkpoint_index(text, "index").size() == 1);
  });
  const files::Scratch scratch;
  check_linear([&](int n) {
    files::write(scratch / "one.safetensors",
                 files::safetensors("{" + tensors(n) + "}", std::string(4 * static_cast<std::size_t>(n), '\0')));
    files::write(scratch / "model.safetensors.index.json",
                 "{\"weight_map\":{" + entries(n, "\"layers.", ".weight\":\"one.safetensors\"") + "}}");
    CHECK(diffattn::ShardedSafetensors(scratch / ".").tensors().size() == static_cast<std::size_t>(n));
  });
}
