#pragma once

// The bytes of a file, read-only: memory-mapped where the system can, so that opening costs nothing and pages come in
// as they are read; read in one go elsewhere. A file must not be truncated while it is mapped.

#include <cstddef>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <utility>

#if __has_include(<sys/mman.h>)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#include <fstream>
#include <vector>
#endif

namespace diffattn::inline v0_1::detail {

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_unreadable(const std::filesystem::path& path) {
  throw std::runtime_error(path.string() + ": cannot be opened for reading");
}

#if __has_include(<sys/mman.h>)

class FileBytes {
 public:
  explicit FileBytes(const std::filesystem::path& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO would wait for its writer
    if (file < 0) throw_unreadable(path);
    struct stat status {};
    const bool is_file = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    if (is_file && status.st_size > 0) {
      void* const mapped = ::mmap(nullptr, static_cast<std::size_t>(status.st_size), PROT_READ, MAP_PRIVATE, file, 0);
      if (mapped != MAP_FAILED) {
        data_ = static_cast<const std::byte*>(mapped);
        size_ = static_cast<std::size_t>(status.st_size);
      }
    }
    ::close(file);
    if (!is_file || (status.st_size > 0 && data_ == nullptr)) throw_unreadable(path);
  }
  ~FileBytes() {
    if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  }
  FileBytes(FileBytes&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  FileBytes& operator=(FileBytes&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

#else

class FileBytes {
 public:
  explicit FileBytes(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) throw_unreadable(path);
    bytes_.resize(static_cast<std::size_t>(file.tellg()));
    file.seekg(0);
    file.read(reinterpret_cast<char*>(bytes_.data()), static_cast<std::streamsize>(bytes_.size()));
    if (!file) throw_unreadable(path);
  }

  const std::byte* data() const { return bytes_.data(); }
  std::size_t size() const { return bytes_.size(); }

 private:
  std::vector<std::byte> bytes_;
};

#endif

}  // namespace diffattn::inline v0_1::detail
