// What is said of a file that is something else than safetensors.

#include <diffattn/io/safetensors.hpp>

#include <string>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

namespace {

/// What Safetensors says of a file of these bytes, behind its name.
std::string said_of(const std::string& bytes) {
  const files::Scratch scratch;
  const std::filesystem::path path = scratch / "file";
  files::write(path, bytes);
  const std::string message = support::thrown_by<diffattn::FormatError>([&] { diffattn::Safetensors{path}; });
  REQUIRE(message.starts_with(path.string() + ": "));
  return message.substr(path.string().size() + 2);
}

}  // namespace

TEST_CASE("A file of text, of PyTorch and of others is told so") {
  CHECK(said_of("In the beginning God created the heaven and the earth.") ==
        "begins with \"In the beginning God cre\", which looks like text or JSON, not like safetensors");
  CHECK(said_of("{\n  \"a\": 1234567}") ==
        "begins with \"{\\n  \\\"a\\\": 1234567}\", which looks like text or JSON, not like safetensors (a directory "
        "with a "
        "model.safetensors.index.json is opened by ShardedSafetensors)");
  CHECK(said_of("\xEF\xBB\xBFwith a mark before it").find("looks like text") != std::string::npos);
  const std::string convert =
      ", not safetensors: load it in Python with torch.load and write it with safetensors.torch.save_file";
  CHECK(said_of(std::string("PK\x03\x04\0\0\x08\x08\0\0 archive/data.pkl", 26)) ==
        "is a zip archive, PyTorch's own format (.pt, .pth, .bin)" + convert);
  CHECK(said_of("\x80\x02}q\x01(X\x05 weights") == "is a pickle, PyTorch's old format" + convert);
  CHECK(said_of(std::string("GGUF\x03\0\0\0 and tensors", 20)) ==
        "is a GGUF file, llama.cpp's format, not safetensors");
  CHECK(said_of("\x89HDF\r\n\x1a\n superblock") == "is an HDF5 file, not safetensors");
  CHECK(said_of("\x93NUMPY\x01 array....") == "is a NumPy file, not safetensors");
  CHECK(said_of("version https://git-lfs.github.com/spec/v1\noid sha256:0") ==
        "is a pointer of Git LFS, which stands for the file: get the file itself with git lfs pull");
  // Nothing of these: the length that it claims.
  CHECK(said_of("\x01\x02\x03\x04\x05\x06\x07\x08 bytes") ==
        "claims a header of 578437695752307201 bytes, more than 100 MB");
  CHECK(said_of(std::string("\x80\0 nothing", 10)).find("claims a header of") == 0);
}
