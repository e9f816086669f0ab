// Writing: the bytes by the format's own rules, round trips, refusals, and what is left behind when a write fails.

#include <diffattn/io/safetensors_reader.hpp>
#include <diffattn/io/safetensors_writer.hpp>

#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"

#if __has_include(<sys/resource.h>)
#include <sys/resource.h>

#include <csignal>
#endif

namespace {

using diffattn::Index;
using diffattn::Matrix;
using diffattn::Safetensors;
using diffattn::SafetensorsWriter;
using diffattn::ShapeError;
using files::Scratch;
using support::make_rng;
using support::random_matrix;
using support::thrown_by;

using Metadata = std::map<std::string, std::string>;

/// Any bits, NaN with payloads among them.
template <typename T>
Matrix<T> random_bits(Index rows, Index cols, support::Rng& rng) {
  Matrix<T> matrix(rows, cols);
  for (Index i = 0; i < matrix.size(); ++i) {
    const std::uint64_t bits = rng();
    std::memcpy(static_cast<void*>(matrix.data() + i), &bits, sizeof(T));
  }
  return matrix;
}

template <typename T>
std::string bytes_in(const Matrix<T>& matrix) {
  return matrix.size() == 0 ? ""
                            : std::string(reinterpret_cast<const char*>(matrix.data()),
                                          sizeof(T) * static_cast<std::size_t>(matrix.size()));
}

std::string saved(const SafetensorsWriter& writer) {
  const Scratch folder;
  writer.save(folder / "file");
  CHECK(folder.list() == "file");
  return files::read(folder / "file");
}

/// How a matrix expression comes out as a file: its shape and its bytes.
template <typename... Arguments>
std::pair<std::vector<Index>, std::string> stored(const Arguments&... arguments) {
  SafetensorsWriter writer;
  writer.add("x", arguments...);
  const Scratch folder;
  writer.save(folder / "file");
  const Safetensors file(folder / "file");
  return {file.info("x").shape, bytes_in(file.matrix<float>("x"))};
}

}  // namespace

TEST_CASE("A file, byte for byte") {
  SafetensorsWriter writer;
  CHECK(saved(writer) == files::safetensors("{}      ", ""));  // as the reference implementation's own test has it
  CHECK(saved(SafetensorsWriter(Metadata{{"framework", "pt"}})) ==
        files::safetensors(R"({"__metadata__":{"framework":"pt"}}     )", ""));
  writer.add("x", Matrix<float>{{1.5F, -2.0F}});
  CHECK(saved(writer) == files::safetensors(R"({"x":{"data_offsets":[0,8],"dtype":"F32","shape":[1,2]}})", "") +
                             std::string("\0\0\xc0\x3f\0\0\0\xc0", 8));
}

TEST_CASE("What is written keeps to the format") {
  auto rng = make_rng();
  const auto f64 = random_bits<double>(3, 5, rng);
  const auto f32 = random_bits<float>(1, 3, rng), also_f32 = random_bits<float>(2, 2, rng);
  const auto f16 = random_bits<Eigen::half>(3, 1, rng);
  const auto bf16 = random_bits<Eigen::bfloat16>(1, 1, rng);
  const auto i64 = random_bits<std::int64_t>(2, 3, rng);
  const auto i32 = random_bits<std::int32_t>(1, 1, rng);
  for (std::size_t name_length = 1; name_length <= 8; ++name_length) {  // so that headers of any length come up
    SafetensorsWriter writer(Metadata{{"depth", "3"}, {"\"quoted\"", "é\n"}});
    const std::string odd(name_length, 'o');
    writer.add("f", bf16);
    writer.add("e", f16);
    writer.add("d.z", f32);
    writer.add("d.a", also_f32);
    writer.add(odd, i32);
    writer.add("b", f64);
    writer.add("a", i64);
    writer.add("none", Matrix<double>(0, 4));
    const std::string bytes = saved(writer);

    REQUIRE(bytes.size() > 8);
    std::uint64_t length = 0;
    for (std::size_t i = 8; i-- > 0;) length = length << 8 | static_cast<unsigned char>(bytes[i]);
    CHECK(length % 8 == 0);
    REQUIRE(length <= bytes.size() - 8);
    const std::string header = bytes.substr(8, length), data = bytes.substr(8 + length);
    CHECK(header.front() == '{');
    const std::size_t json_end = header.find_last_of('}') + 1;
    CHECK(header.size() - json_end < 8);
    CHECK(header.substr(json_end) == std::string(header.size() - json_end, ' '));

    const auto json = nlohmann::json::parse(header);
    CHECK(json.size() == 9);
    CHECK(json.at("__metadata__") == nlohmann::json({{"depth", "3"}, {"\"quoted\"", "é\n"}}));
    std::size_t offset = 0;
    const auto follows = [&](const std::string& name, const std::string& dtype, const std::vector<Index>& shape,
                             const std::string& content) {
      INFO(name);
      const auto& tensor = json.at(name);
      CHECK(tensor.size() == 3);
      CHECK(tensor.at("dtype") == dtype);
      CHECK(tensor.at("shape") == shape);
      CHECK(tensor.at("data_offsets") == std::vector<std::size_t>{offset, offset + content.size()});
      CHECK(data.substr(offset, content.size()) == content);
      offset += content.size();
    };
    follows("a", "I64", {2, 3}, bytes_in(i64));
    follows("b", "F64", {3, 5}, bytes_in(f64));
    follows("none", "F64", {0, 4}, "");
    follows("d.a", "F32", {2, 2}, bytes_in(also_f32));
    follows("d.z", "F32", {1, 3}, bytes_in(f32));
    follows(odd, "I32", {1, 1}, bytes_in(i32));
    follows("e", "F16", {3, 1}, bytes_in(f16));
    follows("f", "BF16", {1, 1}, bytes_in(bf16));
    CHECK(offset == data.size());
  }
}

TEMPLATE_TEST_CASE("What is written is read, bit for bit", "", double, float, Eigen::half, Eigen::bfloat16,
                   std::int64_t, std::int32_t) {
  auto rng = make_rng();
  const Scratch folder;
  for (const auto& [rows, cols] : std::vector<std::pair<Index, Index>>{{7, 13}, {1, 1}, {300, 41}, {0, 3}, {3, 0}}) {
    CAPTURE(rows, cols);
    const auto matrix = random_bits<TestType>(rows, cols, rng);
    const diffattn::Vector<TestType> vector = matrix.reshaped();
    SafetensorsWriter writer;
    writer.add("matrix", matrix);
    writer.add("vector", vector);
    writer.save(folder / "file");
    const Safetensors file(folder / "file");
    const auto read = file.matrix<TestType>("matrix");
    CHECK(read.rows() == rows);
    CHECK(read.cols() == cols);
    CHECK(bytes_in(read) == bytes_in(matrix));
    CHECK(bytes_in(Matrix<TestType>(file.vector<TestType>("vector"))) == bytes_in(Matrix<TestType>(vector)));
  }
}

TEST_CASE("Any expression is stored row by row; a vector type has rank 1") {
  auto rng = make_rng();
  const Matrix<float> x = random_matrix<float>(4, 6, rng);
  const auto as_matrix = [](const Matrix<float>& m) {
    return std::pair(std::vector<Index>{m.rows(), m.cols()}, bytes_in(m));
  };
  const auto as_vector = [](const Matrix<float>& m) { return std::pair(std::vector<Index>{m.size()}, bytes_in(m)); };
  CHECK(stored(x) == as_matrix(x));
  CHECK(stored(Eigen::MatrixXf(x)) == as_matrix(x));
  CHECK(stored(x.transpose()) == as_matrix(x.transpose()));
  CHECK(stored(x.block(1, 2, 3, 2)) == as_matrix(x.block(1, 2, 3, 2)));
  CHECK(stored(x + x) == as_matrix(2 * x));
  CHECK(stored(x.array() + 1) == as_matrix((x.array() + 1).matrix()));
  CHECK(stored(Eigen::Map<const Matrix<float>>(x.data(), 3, 8)) ==
        as_matrix(Eigen::Map<const Matrix<float>>(x.data(), 3, 8)));
  CHECK(stored(x.topRows(1)) == as_matrix(x.topRows(1)));
  CHECK(stored(x.row(2)) == as_vector(x.row(2)));
  CHECK(stored(x.col(2)) == as_vector(x.col(2)));
  CHECK(stored(diffattn::Vector<float>(x.col(2))) == as_vector(x.col(2)));
  CHECK(stored(diffattn::Vector<float>(0)) == std::pair(std::vector<Index>{0}, std::string()));
}

TEST_CASE("A tensor can be given a shape of as many elements") {
  auto rng = make_rng();
  const Matrix<float> x = random_matrix<float>(4, 6, rng), one = x.topLeftCorner(1, 1), none(0, 0);
  for (const auto& shape : std::vector<std::vector<Index>>{{24}, {2, 3, 4}, {24, 1, 1, 1}}) {
    CHECK(stored(x, shape) == std::pair(shape, bytes_in(x)));
  }
  CHECK(stored(one, std::vector<Index>{}) == std::pair(std::vector<Index>{}, bytes_in(one)));
  CHECK(stored(none, std::vector<Index>{3, 0, 2}) == std::pair(std::vector<Index>{3, 0, 2}, std::string()));
}

TEST_CASE("A shape of another size is refused, whatever its product wraps around to") {
  SafetensorsWriter writer;
  const Matrix<float> x = Matrix<float>::Ones(2, 3), none(0, 0);
  const auto refused = [&](const Matrix<float>& matrix, const std::vector<Index>& shape) {
    CHECK(thrown_by<ShapeError>([&] { writer.add("x\n", matrix, shape); }) ==
          R"(SafetensorsWriter: the shape of "x\n" does not hold its )" + std::to_string(matrix.size()) + " elements");
  };
  refused(x, {});
  refused(x, {5});
  refused(x, {2, 3, 2});
  refused(x, {0, 6});
  refused(x, {-2, -3});
  refused(x, {(Index{1} << 62) + 3, 2, 2, 1, 2});
  refused(x, {(Index{1} << 61) * 3 + 6, 1});
  refused(none, {});
  refused(none, {0, -1});
  refused(none, {Index{1} << 62, 4});
  refused(none, {Index{1} << 62, 4, 0});
  refused(none, {0, Index{1} << 62, 4});
  CHECK(saved(writer) == saved(SafetensorsWriter{}));
}

TEST_CASE("A name that is taken, reserved or no text is refused, and the writer is as it was") {
  SafetensorsWriter writer;
  const Matrix<float> x{{1, 2}}, other{{3}};
  writer.add("x", x);
  const std::string before = saved(writer);
  const auto refusal = [&](const std::string& name) {
    return thrown_by<std::invalid_argument>([&] { writer.add(name, other); });
  };
  CHECK(refusal("x") == R"(SafetensorsWriter: a tensor cannot be named "x" twice)");
  CHECK(refusal("__metadata__") == R"(SafetensorsWriter: a tensor cannot be named "__metadata__")");
  CHECK(refusal("go\xffod") == "SafetensorsWriter: a name is not UTF-8: \"go\uFFFDod\"");
  CHECK(refusal("\xed\xa0\x80").find("a name is not UTF-8") != std::string::npos);
  CHECK(saved(writer) == before);

  CHECK(thrown_by<std::invalid_argument>([] {
          SafetensorsWriter{Metadata{{"a", "\xc3"}}};
        }).find("metadata is not UTF-8") != std::string::npos);
  CHECK(thrown_by<std::invalid_argument>([] {
          SafetensorsWriter{Metadata{{"\xc3", "a"}}};
        }).find("metadata is not UTF-8") != std::string::npos);
}

TEST_CASE("Any text is a name, and any text is metadata") {
  const std::vector<std::string> texts = {"",
                                          " ",
                                          "a.b.0",
                                          "\"",
                                          "\\",
                                          "\n\t\x1b",
                                          std::string("a\0b", 3),
                                          "größe",
                                          "尺寸",
                                          "\U0001F600",
                                          "{\"dtype\":",
                                          std::string(3000, 'n')};
  Metadata metadata;
  for (const std::string& text : texts) metadata[text] = text;
  SafetensorsWriter writer(metadata);
  for (std::size_t i = 0; i < texts.size(); ++i) writer.add(texts[i], Matrix<float>{{static_cast<float>(i)}});
  const Scratch folder;
  writer.save(folder / "file");
  const Safetensors file(folder / "file");
  CHECK(file.metadata() == metadata);
  CHECK(file.tensors().size() == texts.size());
  for (std::size_t i = 0; i < texts.size(); ++i) CHECK(file.matrix<float>(texts[i])(0, 0) == static_cast<float>(i));
}

TEST_CASE("A writer keeps copies, and writes them as often as it is asked") {
  SafetensorsWriter writer;
  Matrix<float> x{{1, 2}};
  writer.add("x", x);
  const std::string first = saved(writer);
  x.setZero();
  CHECK(saved(writer) == first);
  writer.add("y", x);
  CHECK(saved(writer) != first);
}

TEST_CASE("An existing file is replaced, be it longer, and be it open") {
  const Scratch folder;
  SafetensorsWriter large, small;
  large.add("x", Matrix<float>(Matrix<float>::Ones(50, 50)));
  small.add("x", Matrix<float>{{2}});
  large.save(folder / "file");
#if __has_include(<sys/mman.h>)
  const Safetensors open(folder / "file");
#endif
  small.save(folder / "file");
  CHECK(folder.list() == "file");
  CHECK(files::read(folder / "file") == saved(small));
#if __has_include(<sys/mman.h>)
  CHECK(open.matrix<float>("x") == Matrix<float>::Ones(50, 50));
#endif
}

TEST_CASE("A place that cannot be written to is named, and nothing is left there") {
  const Scratch folder;
  SafetensorsWriter writer;
  writer.add("x", Matrix<float>{{1}});
  const auto refused = [&](const std::filesystem::path& path, const std::string& why) {
    CHECK(thrown_by<std::runtime_error>([&] { writer.save(path); }) == path.string() + ": cannot be written: " + why);
  };
  files::write(folder / "occupied", "text");
  std::filesystem::create_directories(folder / "folder/inner");
  refused(folder / "nowhere/file", "No such file or directory");
#ifdef _WIN32
  refused(folder / "occupied/file", "No such file or directory");
#else
  refused(folder / "occupied/file", "Not a directory");
#endif
  refused(folder / "folder", "Is a directory");
  CHECK(folder.list() == "folder occupied");
  CHECK(files::read(folder / "occupied") == "text");
  CHECK(std::filesystem::is_directory(folder / "folder/inner"));
}

#if __has_include(<sys/resource.h>)
TEST_CASE("A disk that fills up leaves the old file whole") {
  const Scratch folder;
  SafetensorsWriter small, large;
  small.add("x", Matrix<float>{{1}});
  large.add("x", Matrix<float>(Matrix<float>::Ones(200, 200)));
  small.save(folder / "file");
  const std::string before = files::read(folder / "file");

  // Files of this process may grow to 64 KiB: the header fits, the data does not.
  struct rlimit usual {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &usual) == 0);
  struct rlimit tight = usual;
  tight.rlim_cur = 65536;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  std::string message;
  ::setrlimit(RLIMIT_FSIZE, &tight);
  try {
    large.save(folder / "file");
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  ::setrlimit(RLIMIT_FSIZE, &usual);
  std::signal(SIGXFSZ, handler);

  CHECK(message == (folder / "file").string() + ": cannot be written: File too large");
  CHECK(folder.list() == "file");
  CHECK(files::read(folder / "file") == before);
}
#endif
