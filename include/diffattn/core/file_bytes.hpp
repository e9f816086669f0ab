#pragma once

// The bytes of a file, read-only. Where the system can, the file is mapped into memory: opening it costs nothing, and
// its pages are read when they are first used. Elsewhere it is read whole. A file must not be made shorter while it is
// mapped.

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>
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

#include "diffattn/core/version.hpp"

namespace diffattn::inline v0_1::detail {

/// Throws std::runtime_error naming the file and why it cannot be opened.
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_unreadable(const std::filesystem::path& path,
                                                                    const std::string& why) {
  throw std::runtime_error(path.string() + ": cannot be opened for reading: " + why);
}

#if __has_include(<sys/mman.h>)

/// A file's bytes, mapped. Can be moved, not copied.
class FileBytes {
 public:
  /// Throws std::runtime_error with the system's reason if `path` cannot be read or is no regular file.
  explicit FileBytes(const std::filesystem::path& path) {
    int file = -1;
    do {
      file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO would wait for its writer
    } while (file < 0 && errno == EINTR);
    int error = file < 0 ? errno : 0;
    struct stat status {};
    if (error == 0 && ::fstat(file, &status) != 0) error = errno;
    if (error == 0 && S_ISDIR(status.st_mode)) error = EISDIR;
    const bool is_file = error == 0 && S_ISREG(status.st_mode);
    if (is_file && status.st_size > 0) {
      void* const mapped = ::mmap(nullptr, static_cast<std::size_t>(status.st_size), PROT_READ, MAP_PRIVATE, file, 0);
      if (mapped == MAP_FAILED) {
        error = errno;
      } else {
        data_ = static_cast<const std::byte*>(mapped);
        size_ = static_cast<std::size_t>(status.st_size);
      }
    }
    if (file >= 0) ::close(file);
    if (error != 0) throw_unreadable(path, std::generic_category().message(error));
    if (!is_file) throw_unreadable(path, "it is not a regular file");
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

  /// The first byte; null for an empty file that is mapped. Valid for the life of this object.
  const std::byte* data() const { return data_; }
  /// The number of bytes.
  std::size_t size() const { return size_; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

#else

/// A file's bytes, read whole, where the system cannot map files.
class FileBytes {
 public:
  /// Throws std::runtime_error if `path` cannot be read.
  explicit FileBytes(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) throw_unreadable(path, kReason);
    bytes_.resize(static_cast<std::size_t>(file.tellg()));
    file.seekg(0);
    file.read(reinterpret_cast<char*>(bytes_.data()), static_cast<std::streamsize>(bytes_.size()));
    if (!file) throw_unreadable(path, kReason);
  }

  /// The first byte; null for an empty file that is mapped. Valid for the life of this object.
  const std::byte* data() const { return bytes_.data(); }
  /// The number of bytes.
  std::size_t size() const { return bytes_.size(); }

 private:
  static constexpr const char* kReason = "the system reports an error";
  std::vector<std::byte> bytes_;
};

#endif

}  // namespace diffattn::inline v0_1::detail
