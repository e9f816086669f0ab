// Reading: every element type from bytes by hand, shapes, conversions, and what a file is asked that it cannot answer.

#include <diffattn/io/safetensors_reader.hpp>

#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

#ifndef _WIN32
#include <sys/stat.h>
#endif

namespace {

using diffattn::Dtype;
using diffattn::FormatError;
using diffattn::Index;
using diffattn::Matrix;
using diffattn::Safetensors;
using files::bytes_of;
using files::Scratch;
using support::thrown_by;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// The values of a file of one rank-1 tensor.
template <typename T>
std::vector<T> values(const std::string& dtype, const std::string& data, Index count) {
  const Scratch folder;
  files::write(folder / "t", files::one_tensor(dtype, nlohmann::json{count}.dump(), data));
  const diffattn::Vector<T> vector = Safetensors(folder / "t").vector<T>("t");
  return {vector.data(), vector.data() + vector.size()};
}

/// The one value of a file, of which nothing is said but its type; or what reading it throws.
template <typename T, typename Stored>
T value(const std::string& dtype, Stored stored) {
  return values<T>(dtype, bytes_of(stored), 1)[0];
}

template <typename T, typename Stored>
std::string refusal(const std::string& dtype, Stored stored) {
  const std::string message = thrown_by<FormatError>([&] { value<T>(dtype, stored); });
  return message.substr(message.find(": ") + 2);
}

/// Rows and columns that a shape becomes; the vector must have as many elements.
std::string extents(const std::string& shape, std::size_t count) {
  const Scratch folder;
  files::write(folder / "t", files::one_tensor("F32", shape, std::string(count * 4, '\0')));
  const Safetensors file(folder / "t");
  CHECK(file.vector<float>("t").size() == static_cast<Index>(count));
  const Matrix<float> matrix = file.matrix<float>("t");
  return std::to_string(matrix.rows()).append(" x ").append(std::to_string(matrix.cols()));
}

}  // namespace

TEST_CASE("F64 and F32 are read as their bytes say") {
  const std::string f64("\0\0\0\0\0\0\xf8\x3f\x9a\x99\x99\x99\x99\x99\xb9\xbf\1\0\0\0\0\0\0\0", 24);
  CHECK(values<double>("F64", f64, 3) == std::vector<double>{1.5, -0.1, std::numeric_limits<double>::denorm_min()});
  const std::string f32("\0\0\xc0\x3f\xcd\xcc\xcc\xbd\1\0\0\0\0\0\x80\xff", 16);
  CHECK(values<float>("F32", f32, 4) ==
        std::vector<float>{1.5F, -0.1F, std::numeric_limits<float>::denorm_min(), -static_cast<float>(kInfinity)});
  CHECK(values<double>("F32", f32, 4) == std::vector<double>{1.5, -0.1F, 0x1p-149, -kInfinity});
  CHECK(std::signbit(value<float>("F32", -0.0F)));
  CHECK(std::signbit(value<float>("F64", -0.0)));
  CHECK(std::isnan(value<double>("F32", std::numeric_limits<float>::quiet_NaN())));
}

TEST_CASE("F16 is read as its bits say, subnormals, infinities and NaN among them") {
  const std::string bits =
      bytes_of<std::uint16_t>({0x3c00, 0xc000, 0x7bff, 0x0400, 0x03ff, 0x0001, 0x8001, 0x3555, 0x7c00, 0xfc00, 0x0000});
  const std::vector<double> expected{1,          -2,        65504,      0x1p-14, 0x1.ff8p-15, 0x1p-24, -0x1p-24,
                                     0x1.554p-2, kInfinity, -kInfinity, 0};
  CHECK(values<double>("F16", bits, 11) == expected);
  CHECK(values<float>("F16", bits, 11) == std::vector<float>(expected.begin(), expected.end()));
  CHECK(std::isnan(value<float>("F16", std::uint16_t{0x7e00})));
  CHECK(std::isnan(value<double>("F16", std::uint16_t{0xfc01})));
  CHECK(std::signbit(value<double>("F16", std::uint16_t{0x8000})));
}

TEST_CASE("BF16 is read as its bits say") {
  const std::string bits =
      bytes_of<std::uint16_t>({0x3f80, 0xc049, 0x7f7f, 0x0080, 0x0001, 0x8001, 0x7f80, 0xff80, 0x0000});
  const std::vector<double> expected{1, -3.140625, 0x1.fep127, 0x1p-126, 0x1p-133, -0x1p-133, kInfinity, -kInfinity, 0};
  CHECK(values<double>("BF16", bits, 9) == expected);
  CHECK(values<float>("BF16", bits, 9) == std::vector<float>(expected.begin(), expected.end()));
  CHECK(std::isnan(value<float>("BF16", std::uint16_t{0x7fc0})));
  CHECK(std::signbit(value<double>("BF16", std::uint16_t{0x8000})));
}

TEST_CASE("I64 and I32 are read as their bytes say") {
  const std::string i64("\2\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0\0\0\0\x80", 24);
  CHECK(values<std::int64_t>("I64", i64, 3) ==
        std::vector<std::int64_t>{2, -1, std::numeric_limits<std::int64_t>::min()});
  CHECK(values<double>("I64", i64, 3) == std::vector<double>{2, -1, -0x1p63});
  const std::string i32("\2\0\0\0\xff\xff\xff\xff\0\0\0\x80\0\0\1\0", 16);
  CHECK(values<std::int32_t>("I32", i32, 4) ==
        std::vector<std::int32_t>{2, -1, std::numeric_limits<std::int32_t>::min(), 65536});
  CHECK(values<std::int64_t>("I32", i32, 4) == std::vector<std::int64_t>{2, -1, -2147483648, 65536});
  CHECK(values<float>("I32", i32, 4) == std::vector<float>{2, -1, -0x1p31F, 65536});
}

TEMPLATE_TEST_CASE("Small integers are the same in every type", "", double, float, Eigen::half, Eigen::bfloat16,
                   std::int64_t, std::int32_t) {
  const auto check = [](const std::string& dtype, const std::string& data) {
    const auto read = values<TestType>(dtype, data, 3);
    CHECK(read[0] == TestType(-2));
    CHECK(read[1] == TestType(0));
    CHECK(read[2] == TestType(96));
  };
  check("I64", bytes_of<std::int64_t>({-2, 0, 96}));
  check("I32", bytes_of<std::int32_t>({-2, 0, 96}));
  if constexpr (!std::is_integral_v<TestType>) {
    check("F64", bytes_of<double>({-2, 0, 96}));
    check("F32", bytes_of<float>({-2, 0, 96}));
    check("F16", bytes_of<std::uint16_t>({0xc000, 0, 0x5600}));
    check("BF16", bytes_of<std::uint16_t>({0xc000, 0, 0x42c0}));
  }
}

TEST_CASE("Floating-point values are rounded to a narrower type") {
  CHECK(value<float>("F64", 0.1) == 0.1F);
  CHECK(value<float>("F64", 1 + 0x1p-24) == 1.0F);
  CHECK(value<float>("F64", 1 + 0x1.8p-23) == 1 + 0x1p-22F);
  CHECK(value<float>("F64", 1e300) == std::numeric_limits<float>::infinity());
  CHECK(value<float>("F64", 1e-300) == 0.0F);
  CHECK(std::isnan(value<float>("F64", std::numeric_limits<double>::quiet_NaN())));
  CHECK(static_cast<float>(value<Eigen::half>("F32", 1 + 0x1p-11F)) == 1.0F);
  CHECK(static_cast<float>(value<Eigen::half>("F32", 1e6F)) == std::numeric_limits<float>::infinity());
  CHECK(static_cast<float>(value<Eigen::bfloat16>("F32", 1 + 0x1p-7F)) == 1 + 0x1p-7F);
  CHECK(static_cast<float>(value<Eigen::bfloat16>("F32", 1 + 0x1p-8F)) == 1.0F);
}

TEST_CASE("An integer is read exactly or not at all") {
  CHECK(value<std::int32_t>("I64", std::int64_t{2147483647}) == 2147483647);
  CHECK(refusal<std::int32_t>("I64", std::int64_t{2147483648}) == R"(tensor "t" holds 2147483648, which I32 cannot)");
  CHECK(refusal<std::int32_t>("I64", std::int64_t{-2147483649}) == R"(tensor "t" holds -2147483649, which I32 cannot)");
  CHECK(refusal<std::int32_t>("I64", std::int64_t{1} << 32) == R"(tensor "t" holds 4294967296, which I32 cannot)");

  CHECK(value<double>("I64", std::int64_t{1} << 53) == 0x1p53);
  CHECK(refusal<double>("I64", (std::int64_t{1} << 53) + 1) ==
        R"(tensor "t" holds 9007199254740993, which F64 cannot)");
  CHECK(refusal<double>("I64", std::numeric_limits<std::int64_t>::max()) ==
        R"(tensor "t" holds 9223372036854775807, which F64 cannot)");
  CHECK(value<float>("I64", std::numeric_limits<std::int64_t>::min()) == -0x1p63F);
  CHECK(refusal<float>("I64", std::numeric_limits<std::int64_t>::max()) ==
        R"(tensor "t" holds 9223372036854775807, which F32 cannot)");
  CHECK(value<float>("I32", std::int32_t{16777216}) == 16777216.0F);
  CHECK(refusal<float>("I32", std::int32_t{-16777217}) == R"(tensor "t" holds -16777217, which F32 cannot)");
  CHECK(refusal<float>("I32", std::int32_t{2147483647}) == R"(tensor "t" holds 2147483647, which F32 cannot)");
  CHECK(static_cast<float>(value<Eigen::half>("I32", std::int32_t{-2048})) == -2048.0F);
  CHECK(refusal<Eigen::half>("I32", std::int32_t{2049}) == R"(tensor "t" holds 2049, which F16 cannot)");
  CHECK(refusal<Eigen::half>("I64", std::int64_t{65536}) == R"(tensor "t" holds 65536, which F16 cannot)");
  CHECK(refusal<Eigen::half>("I64", std::int64_t{-65536}) == R"(tensor "t" holds -65536, which F16 cannot)");
  CHECK(refusal<Eigen::bfloat16>("I32", std::int32_t{257}) == R"(tensor "t" holds 257, which BF16 cannot)");
}

TEST_CASE("Floating-point values are not read as integers, whole or not") {
  CHECK(refusal<std::int64_t>("F64", 1.0) == R"(tensor "t" holds floating-point values, not integers)");
  CHECK(refusal<std::int32_t>("F32", 1.5F) == R"(tensor "t" holds floating-point values, not integers)");
  CHECK(refusal<std::int64_t>("F16", std::uint16_t{0x3c00}) ==
        R"(tensor "t" holds floating-point values, not integers)");
  CHECK(refusal<std::int32_t>("BF16", std::uint16_t{0}) == R"(tensor "t" holds floating-point values, not integers)");
}

TEST_CASE("A matrix has the last extent for columns and the others for rows") {
  CHECK(extents("[]", 1) == "1 x 1");
  CHECK(extents("[1]", 1) == "1 x 1");
  CHECK(extents("[3]", 3) == "1 x 3");
  CHECK(extents("[2,3]", 6) == "2 x 3");
  CHECK(extents("[2,2,3]", 12) == "4 x 3");
  CHECK(extents("[2,1,3,1,4]", 24) == "6 x 4");
  CHECK(extents("[0]", 0) == "1 x 0");
  CHECK(extents("[0,3]", 0) == "0 x 3");
  CHECK(extents("[3,0]", 0) == "3 x 0");
  CHECK(extents("[2,0,3]", 0) == "0 x 3");
  CHECK(extents("[0,2305843009213693951]", 0) == "0 x 2305843009213693951");
  CHECK(extents("[2305843009213693951,0]", 0) == "2305843009213693951 x 0");

  const Scratch folder;
  files::write(folder / "t", files::one_tensor("F32", "[2,1,3]", bytes_of<float>({1, 2, 3, 4, 5, 6})));
  Matrix<float> expected(2, 3);
  expected << 1, 2, 3, 4, 5, 6;
  CHECK(Safetensors(folder / "t").matrix<float>("t") == expected);
}

TEST_CASE("A file tells its tensors, their types, shapes and places, and its metadata") {
  const Scratch folder;
  const std::string header =
      R"( "b":{"data_offsets":[12,16],"shape":[1,2],"dtype":"F16"} ,"__metadata__":{"a":"1","":"\"\u00e9\n"},)"
      R"("":{"dtype":"I32","shape":[],"data_offsets":[0,4]}, "\u00e9.c":{"dtype":"I64","shape":[1],"data_offsets":[4,12],)"
      R"("of another version":null},"none":{"dtype":"BF16","shape":[3,0,2],"data_offsets":[12,12]})";
  files::write(folder / "file", files::safetensors("{" + header + "} \t\n", std::string(16, '\0')));
  const Safetensors file(folder / "file");

  CHECK(file.path() == (folder / "file").string());
  CHECK(file.metadata() == std::map<std::string, std::string>{{"a", "1"}, {"", "\"é\n"}});
  std::vector<std::string> names;
  for (const auto& [name, info] : file.tensors()) names.push_back(name);
  CHECK(names == std::vector<std::string>{"", "b", "none", "é.c"});

  CHECK(file.info("b").dtype == Dtype::F16);
  CHECK(file.info("b").shape == std::vector<Index>{1, 2});
  CHECK(file.info("b").begin == 12);
  CHECK(file.info("b").end == 16);
  CHECK(file.info("").dtype == Dtype::I32);
  CHECK(file.info("").shape.empty());
  CHECK(file.info("é.c").dtype == Dtype::I64);
  CHECK(file.info("none").dtype == Dtype::BF16);
  CHECK(file.info("none").shape == std::vector<Index>{3, 0, 2});
  CHECK(file.contains("b"));
  CHECK_FALSE(file.contains("B"));
  CHECK_FALSE(file.contains("__metadata__"));
}

TEST_CASE("A file without metadata, or without tensors, is a file") {
  const Scratch folder;
  files::write(folder / "bare", files::one_tensor("F64", "[1]", bytes_of(1.0)));
  CHECK(Safetensors(folder / "bare").metadata().empty());
  files::write(folder / "empty", files::safetensors("{}", ""));
  CHECK(Safetensors(folder / "empty").tensors().empty());
  files::write(folder / "metadata", files::safetensors(R"({"__metadata__":{"a":"b"}})", ""));
  CHECK(Safetensors(folder / "metadata").tensors().empty());
  CHECK(Safetensors(folder / "metadata").metadata().at("a") == "b");
}

TEST_CASE("Data may begin at any byte") {
  const Scratch folder;
  for (std::size_t padding = 0; padding < 8; ++padding) {
    CAPTURE(padding);
    const std::string header = R"({"t":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}})" + std::string(padding, ' ');
    files::write(folder / "t", files::safetensors(header, bytes_of({1.5, -0.25})));
    const Safetensors file(folder / "t");
    CHECK(file.vector<double>("t") == diffattn::Vector<double>{{1.5, -0.25}});
    CHECK(file.vector<float>("t") == diffattn::Vector<float>{{1.5F, -0.25F}});
  }
}

TEST_CASE("read() writes the tensor's elements and no more") {
  const Scratch folder;
  files::write(folder / "t", files::one_tensor("F32", "[2]", bytes_of({1.0F, 2.0F})));
  const Safetensors file(folder / "t");
  std::vector<double> to(4, 7);
  file.read("t", to.data() + 1);
  CHECK(to == std::vector<double>{7, 1, 2, 7});
  files::write(folder / "none", files::one_tensor("F32", "[0]", ""));
  CHECK_NOTHROW(Safetensors(folder / "none").read("t", static_cast<float*>(nullptr)));
}

TEST_CASE("A tensor that is not there is named") {
  const Scratch folder;
  files::write(folder / "t", files::one_tensor("F32", "[1]", bytes_of(1.0F)));
  const Safetensors file(folder / "t");
  const std::string expected = (folder / "t").string() + R"(: has no tensor "T\n")";
  float to = 7;
  CHECK(thrown_by<FormatError>([&] { file.info("T\n"); }) == expected);
  CHECK(thrown_by<FormatError>([&] { file.matrix<float>("T\n"); }) == expected);
  CHECK(thrown_by<FormatError>([&] { file.vector<double>("T\n"); }) == expected);
  CHECK(thrown_by<FormatError>([&] { file.read("T\n", &to); }) == expected);
  CHECK(to == 7);
}

TEST_CASE("What cannot be opened is said to be so, and is no FormatError") {
  const Scratch folder;
  const auto refused = [](const std::filesystem::path& path, const std::string& why) {
    CHECK(thrown_by<std::runtime_error>([&] { Safetensors{path}; }) ==
          path.string() + ": cannot be opened for reading: " + why);
  };
  refused(folder / "nothing", "No such file or directory");
  refused(folder / "", "Is a directory");
  refused("", "No such file or directory");
#ifndef _WIN32
  REQUIRE(::mkfifo((folder / "fifo").c_str(), 0600) == 0);
  refused(folder / "fifo", "it is not a regular file");
#endif
}

TEST_CASE("What was read outlives the file, and an open file its name") {
  const Scratch folder;
  files::write(folder / "t", files::one_tensor("F32", "[2]", bytes_of({1.0F, 2.0F})));
  std::optional<Safetensors> file(folder / "t");
#ifndef _WIN32
  std::filesystem::remove(folder / "t");
#endif
  const Matrix<float> read = file->matrix<float>("t");
  file.reset();
  CHECK(read == Matrix<float>{{1, 2}});
}

TEST_CASE("A file can be moved") {
  const Scratch folder;
  files::write(folder / "a", files::one_tensor("F32", "[1]", bytes_of(1.0F)));
  files::write(folder / "b", files::one_tensor("F32", "[2]", bytes_of({2.0F, 3.0F})));
  std::optional<Safetensors> a(folder / "a");
  Safetensors moved = std::move(*a);
  a.reset();
  CHECK(moved.matrix<float>("t") == Matrix<float>{{1}});
  {
    Safetensors b(folder / "b");
    moved = std::move(b);
  }
  CHECK(moved.path() == (folder / "b").string());
  CHECK(moved.matrix<float>("t") == Matrix<float>{{2, 3}});
}

TEST_CASE("Files that PyTorch's library wrote are read, every byte from its place") {
  int files_read = 0;
  for (const auto& entry : std::filesystem::directory_iterator(DIFFATTN_TEST_DATA "/golden")) {
    INFO(entry.path());
    const std::string bytes = files::read(entry.path());
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof(length));
    auto header = nlohmann::json::parse(bytes.substr(8, length));

    const Safetensors file(entry.path());
    CHECK(nlohmann::json(file.metadata()) == header.at("__metadata__"));
    header.erase("__metadata__");
    REQUIRE(file.tensors().size() == header.size());
    for (const auto& [name, tensor] : header.items()) {
      INFO(name);
      CHECK(file.info(name).dtype == Dtype::F64);
      CHECK(file.info(name).shape == tensor["shape"].get<std::vector<Index>>());
      const std::size_t begin = tensor["data_offsets"][0], end = tensor["data_offsets"][1];
      const Matrix<double> matrix = file.matrix<double>(name);
      REQUIRE(static_cast<std::size_t>(matrix.size()) * sizeof(double) == end - begin);
      CHECK(std::memcmp(matrix.data(), bytes.data() + 8 + length + begin, end - begin) == 0);
    }
    ++files_read;
  }
  CHECK(files_read >= 11);
}

TEST_CASE("Tensors of types that are not read stand beside those that are", "[io][safetensors]") {
  struct Type {
    const char* name;
    std::size_t bits;
  };
  const files::Scratch scratch;
  for (const Type& type : std::initializer_list<Type>{{"U64", 64},
                                                      {"C64", 64},
                                                      {"U32", 32},
                                                      {"I16", 16},
                                                      {"U16", 16},
                                                      {"I8", 8},
                                                      {"U8", 8},
                                                      {"BOOL", 8},
                                                      {"F8_E4M3", 8},
                                                      {"F8_E5M2", 8},
                                                      {"F8_E8M0", 8},
                                                      {"F8_E4M3FNUZ", 8},
                                                      {"F8_E5M2FNUZ", 8},
                                                      {"F6_E2M3", 6},
                                                      {"F6_E3M2", 6},
                                                      {"F4", 4}}) {
    INFO(type.name);
    const std::size_t bytes = 8 * type.bits / 8, end = 8 + bytes;
    files::write(scratch / "t",
                 files::safetensors(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":")" +
                                        std::string(type.name) + R"(","shape":[2,4],"data_offsets":[8,)" +
                                        std::to_string(end) + "]}}",
                                    files::bytes_of<float>({1.5f, -2}) + std::string(bytes, '\1')));
    const Safetensors file(scratch / "t");
    CHECK(file.vector<float>("x")[1] == -2);
    CHECK(file.info("y").shape == std::vector<Index>{2, 4});
    const std::string expected = (scratch / "t").string() + ": tensor \"y\" is of type " + type.name +
                                 ", which is not read; convert it to F32, F16, BF16 or I32 (also read: F64, I64)";
    CHECK(support::thrown_by<FormatError>([&] { file.matrix<float>("y"); }) == expected);
    CHECK(support::thrown_by<FormatError>([&] { file.vector<std::int32_t>("y"); }) == expected);
    CHECK(file.mapped<float>("y") == nullptr);
  }
}

TEST_CASE("Metadata may be null", "[io][safetensors]") {
  const files::Scratch scratch;
  files::write(
      scratch / "t",
      files::safetensors(R"({"__metadata__": null, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})",
                         files::bytes_of<float>(1.5f)));
  const Safetensors file(scratch / "t");
  CHECK(file.metadata().empty());
  CHECK(file.vector<float>("x")[0] == 1.5f);
}
