#pragma once

// The bytes of a file, read-only, mapped into memory: opening it costs nothing, and its pages are read when they are
// first used. A file must not be made shorter while it is mapped. Windows does not let a file be replaced or deleted
// while it is; elsewhere the old bytes stay.

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#ifdef _WIN32
#include <cstdint>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include "diffattn/core/version.hpp"
#include "diffattn/core/windows_api.hpp"

namespace diffattn::inline v0_1::detail {

/// Throws std::runtime_error naming the file and why it cannot be opened.
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_unreadable(const std::filesystem::path& path,
                                                                    const std::string& why) {
  throw std::runtime_error(path.string() + ": cannot be opened for reading: " + why);
}

/// A file's bytes, mapped. Can be moved, not copied.
class FileBytes {
 public:
  /// Throws std::runtime_error with the system's reason if `path` cannot be read or is no regular file.
  explicit FileBytes(const std::filesystem::path& path) { map(path); }
  ~FileBytes() { unmap(); }
  FileBytes(FileBytes&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  FileBytes& operator=(FileBytes&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  /// The first byte; null for an empty file. Valid for the life of this object.
  const std::byte* data() const { return data_; }
  /// The number of bytes.
  std::size_t size() const { return size_; }

 private:
#ifdef _WIN32
  void map(const std::filesystem::path& path) {
    using namespace windows;
    // Others may write to the file, rename and delete it, as they may elsewhere.
    const Handle file(CreateFileW(path.c_str(), kGenericRead, kShareRead | kShareWrite | kShareDelete, nullptr,
                                  kOpenExisting, kAttributeNormal, nullptr));
    if (!file.is_open()) {
      const unsigned long error = GetLastError();
      throw_unreadable(path, is_directory(path.c_str()) ? std::generic_category().message(EISDIR) : message(error));
    }
    if (GetFileType(file.get()) != kTypeDisk) throw_unreadable(path, "it is not a regular file");
    unsigned long high = 0;
    const unsigned long low = GetFileSize(file.get(), &high);
    if (low == kInvalidSize && GetLastError() != 0) throw_unreadable(path, message(GetLastError()));
    const auto size = static_cast<std::size_t>(std::uint64_t{high} << 32 | low);
    if (size == 0) return;
    // The view keeps what it shows: both handles may go.
    const Handle mapping(CreateFileMappingW(file.get(), nullptr, kPageReadonly, 0, 0, nullptr));
    const void* const mapped = mapping.is_open() ? MapViewOfFile(mapping.get(), kMapRead, 0, 0, 0) : nullptr;
    if (mapped == nullptr) throw_unreadable(path, message(GetLastError()));
    data_ = static_cast<const std::byte*>(mapped);
    size_ = size;
  }
  void unmap() {
    if (data_ != nullptr) UnmapViewOfFile(data_);
  }
#else
  void map(const std::filesystem::path& path) {
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
  void unmap() {
    if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  }
#endif

  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace diffattn::inline v0_1::detail
