// Whatever the bytes are, they are read within their bounds or refused with a FormatError. Under ASan this sees every
// wild read: the parser is given exactly as many bytes as it is told.

#include <diffattn/io/safetensors.hpp>

#include <string>
#include <vector>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using diffattn::FormatError;
using diffattn::Index;
using diffattn::Safetensors;
using files::bytes_of;

const std::string kHeader =
    R"({"__metadata__":{"depth":"3","a\u00e9":"\n"},"w.x":{"dtype":"F32","shape":[2,1,2],"data_offsets":[8,24]},)"
    R"("w.y":{"dtype":"BF16","shape":[3],"data_offsets":[24,30]},"none":{"dtype":"F64","shape":[3,0],"data_offsets":)"
    R"([24,24]},"n":{"dtype":"I64","shape":[],"data_offsets":[0,8]}})";
const std::string kData =
    bytes_of<std::int64_t>(-7) + bytes_of<float>({1, 2, 3, 4}) + bytes_of<std::uint16_t>({1, 2, 3});
const std::string kFile = files::safetensors(kHeader, kData);

/// Whether `bytes` are a file. Anything but an answer or a FormatError of this file is a failure.
bool is_file(const std::string& bytes) {
  const std::vector<char> exactly(bytes.begin(), bytes.end());  // a string has a NUL behind it
  try {
    const auto header = diffattn::detail::SafetensorsHeaderParser(reinterpret_cast<const std::byte*>(exactly.data()),
                                                                  exactly.size(), "name")
                            .parse();
    std::size_t covered = 0;
    for (const auto& [name, info] : header.tensors) {
      std::size_t size = diffattn::detail::describe(info.dtype).bits;
      bool natural = true;
      for (const Index extent : info.shape) {
        size *= static_cast<std::size_t>(extent);
        natural = natural && extent >= 0;
      }
      size /= 8;
      if (!natural || info.begin > info.end || info.end - info.begin != size ||
          info.end > bytes.size() - header.data_begin) {
        FAIL_CHECK("accepted with tensor " << name << " out of bounds: " << bytes);
      }
      covered += size;
    }
    if (header.data_begin + covered != bytes.size()) FAIL_CHECK("accepted with bytes of no tensor: " << bytes);
    return true;
  } catch (const FormatError& error) {
    if (std::string(error.what()).rfind("name: ", 0) != 0) FAIL_CHECK("anonymous: " << error.what());
  } catch (const std::exception& error) {
    FAIL_CHECK("not a FormatError: " << error.what() << ", for " << bytes);
  }
  return false;
}

/// The same from a file on disk, of which everything is read.
bool opens(const std::filesystem::path& path, const std::string& bytes) {
  files::write(path, bytes);
  try {
    const Safetensors file(path);
    for (const auto& [name, info] : file.tensors()) {
      if (!diffattn::detail::is_readable(info.dtype)) continue;
      if (diffattn::detail::is_integer(info.dtype)) {
        static_cast<void>(file.matrix<std::int64_t>(name));
      } else {
        static_cast<void>(file.matrix<double>(name));
      }
    }
    return true;
  } catch (const FormatError&) {
    return false;
  }
}

template <typename T>
const T& pick(const std::vector<T>& from, support::Rng& rng) {
  return from[rng() % from.size()];
}

/// A few edits of the header, such as hostile hands or bad disks would make.
std::string mutated(std::string header, support::Rng& rng) {
  static const std::vector<std::string> kNumbers = {"0",
                                                    "1",
                                                    "4",
                                                    "8",
                                                    "24",
                                                    "30",
                                                    "31",
                                                    "-1",
                                                    "-0",
                                                    "1.0",
                                                    "2e0",
                                                    "1e400",
                                                    "2147483648",
                                                    "4294967296",
                                                    "4611686018427387904",
                                                    "9223372036854775807",
                                                    "9223372036854775808",
                                                    "18446744073709551608",
                                                    "18446744073709551615",
                                                    "18446744073709551616",
                                                    "99999999999999999999999"};
  static const std::vector<std::string> kTokens = {"{",
                                                   "}",
                                                   "[",
                                                   "]",
                                                   ",",
                                                   ":",
                                                   "\"",
                                                   "\\",
                                                   "null",
                                                   "true",
                                                   "[[",
                                                   "]]",
                                                   "{}",
                                                   "[]",
                                                   "\"n\"",
                                                   "\"dtype\"",
                                                   "\"shape\"",
                                                   "\"data_offsets\"",
                                                   "\"__metadata__\"",
                                                   "F64",
                                                   "\\u0000",
                                                   "\\ud800",
                                                   "\xff",
                                                   "\xc3",
                                                   " ",
                                                   "\n",
                                                   std::string(1, '\0')};
  for (std::uint64_t edits = 1 + rng() % 3; edits > 0 && !header.empty(); --edits) {
    const std::size_t at = rng() % header.size(), count = std::min<std::size_t>(1 + rng() % 12, header.size() - at);
    switch (rng() % 6) {
      case 0:
        header[at] = static_cast<char>(rng());
        break;
      case 1:
        header.erase(at, count);
        break;
      case 2:
        header.insert(at, pick(kTokens, rng));
        break;
      case 3:
        header.insert(rng() % header.size(), header.substr(at, count));
        break;
      default:  // a number, where there is one
        const std::size_t digit = header.find_first_of("0123456789", at);
        if (digit == std::string::npos) break;
        const std::size_t end = header.find_first_not_of("0123456789", digit);
        header.replace(digit, end - digit, pick(kNumbers, rng));
    }
  }
  return header;
}

}  // namespace

TEST_CASE("The file that the others are made from is one") {
  CHECK(is_file(kFile));
  const files::Scratch folder;
  CHECK(opens(folder / "file", kFile));
}

TEST_CASE("No shorter or longer file is one") {
  const files::Scratch folder;
  for (std::size_t size = 0; size < kFile.size(); ++size) {
    CAPTURE(size);
    CHECK_FALSE(is_file(kFile.substr(0, size)));
    CHECK_FALSE(opens(folder / "file", kFile.substr(0, size)));
  }
  CHECK_FALSE(is_file(kFile + '\0'));
  CHECK_FALSE(is_file(kFile + kFile));
}

TEST_CASE("No header cut short is one, though its length says so") {
  for (std::size_t size = 0; size < kHeader.size(); ++size) {
    CAPTURE(size);
    CHECK_FALSE(is_file(files::safetensors(kHeader.substr(0, size), kData)));
  }
}

TEST_CASE("Any byte of the length may be any other, any of the header one that means something") {
  const std::string meaningful = std::string("{}[]\":,\\/0189+-.eEtfnu \n\x7f\x80\xc3\xff") + '\0';
  int accepted = 0;
  for (std::size_t at = 0; at < 8 + kHeader.size(); ++at) {
    std::string bytes = kFile;
    for (int change = 0; change < (at < 8 ? 256 : static_cast<int>(meaningful.size())); ++change) {
      bytes[at] = at < 8 ? static_cast<char>(change) : meaningful[static_cast<std::size_t>(change)];
      accepted += is_file(bytes) ? 1 : 0;
    }
  }
  CHECK(accepted > 300);  // other names and other metadata are as good
}

TEST_CASE("Any bit of a file on disk may be flipped") {
  const files::Scratch folder;
  int accepted = 0;
  for (std::size_t at = 0; at < kFile.size(); ++at) {
    std::string bytes = kFile;
    for (int bit = 0; bit < 8; ++bit) {
      bytes[at] = static_cast<char>(kFile[at] ^ (1 << bit));
      const bool opened = opens(folder / "file", bytes);
      if (at >= 8 + kHeader.size()) CHECK(opened);  // values are anybody's
      accepted += opened ? 1 : 0;
    }
  }
  CHECK(accepted > 300);
}

TEST_CASE("Headers edited at random are read within bounds or refused") {
  auto rng = support::make_rng();
  int accepted = 0;
  for (int mutant = 0; mutant < 20000; ++mutant) {
    const std::string header = mutated(kHeader, rng);
    std::string bytes =
        files::safetensors(header, kData.substr(0, rng() % 4 == 0 ? rng() % kData.size() : kData.size()));
    if (rng() % 8 == 0) bytes[rng() % 8] = static_cast<char>(rng());
    accepted += is_file(bytes) ? 1 : 0;
  }
  CHECK(accepted > 100);
  CHECK(accepted < 10000);
}

TEST_CASE("Bytes at random are no file") {
  auto rng = support::make_rng(1);
  for (int trial = 0; trial < 2000; ++trial) {
    std::string bytes(rng() % 200, '\0');
    for (char& byte : bytes) byte = static_cast<char>(rng());
    CHECK_FALSE(is_file(bytes));
    CHECK_FALSE(is_file(files::safetensors("{" + bytes, "")));
  }
}
