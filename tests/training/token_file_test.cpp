#include <cstdint>
#include <diffattn/training/token_file.hpp>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

using diffattn::TokenFile;

TEST_CASE("A token file is numbers one after another", "[training][token_file]") {
  const files::Scratch scratch;
  const std::filesystem::path path = scratch / "tokens.bin";
  std::ofstream(path, std::ios::binary).write("\x01\x02\xff\x00\x10\x20", 6);
  const auto all = [](const auto& file) {
    const auto tokens = file.tokens();
    return std::vector<std::uint64_t>(tokens.begin(), tokens.end());
  };
  CHECK(all(TokenFile<std::uint8_t>(path)) == std::vector<std::uint64_t>{1, 2, 255, 0, 16, 32});
  CHECK(all(TokenFile<std::uint16_t>(path)) == std::vector<std::uint64_t>{0x0201, 0x00ff, 0x2010});
  CHECK(support::thrown_by<diffattn::FormatError>([&] { TokenFile<std::uint32_t>{path}; }) ==
        path.string() + ": 6 bytes are no whole number of tokens of 4");
  std::ofstream(path, std::ios::binary | std::ios::trunc).flush();
  CHECK(TokenFile<std::uint32_t>(path).tokens().empty());
  std::filesystem::remove(path);
  CHECK(support::thrown_by<std::runtime_error>([&] { TokenFile<std::uint8_t>{path}; }) ==
        path.string() + ": cannot be opened for reading: No such file or directory");
}
