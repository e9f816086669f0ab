#pragma once

// A file that is written beside its target and takes its place when it is complete, so that the target is there whole
// or as it was, whatever happens: kill, a full disk, loss of power.
//
//   UnfinishedFile file(path);  file.write(data, size);  file.finish();  file.replace_target();
//
// Name     <name of the target>.<process>-<number>.unfinished, in the target's directory. Every writer has a file of
//          its own, also of several processes. What a killed process leaves behind keeps that name: it can be deleted,
//          and is read by nothing but checkpoint_directory.hpp, which knows what it looks for.
// Target   a symbolic link is followed and stays; what it points to is replaced or, where there is nothing, made. A
//          file that is replaced passes on its mode and, if the system allows it, its owner; other hard links to it
//          keep the old content. What is mapped from the old file stays valid.
// Errors   std::runtime_error naming the target and the system's reason. The target is then as it was, and the
//          unfinished file gone.

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#if __has_include(<sys/file.h>) && __has_include(<unistd.h>)
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#else
#include <fstream>
#include <random>
#endif

#include "diffattn/core/version.hpp"

namespace diffattn::inline v0_1::detail {

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_unwritable(const std::filesystem::path& path,
                                                                    const std::string& why) {
  throw std::runtime_error(path.string() + ": cannot be written: " + why);
}

/// Where a path leads through symbolic links, be there a file or not. Where links go round in a circle, one of them.
inline std::filesystem::path follow_links(std::filesystem::path path) {
  constexpr int kMostLinks = 40;  // as Linux has it
  for (int i = 0; i < kMostLinks; ++i) {
    std::error_code error;
    if (!std::filesystem::is_symlink(std::filesystem::symlink_status(path, error))) break;
    const std::filesystem::path target = std::filesystem::read_symlink(path, error);
    if (error) break;
    path = path.parent_path() / target;  // which is target where that is absolute
  }
  return path;
}

inline constexpr const char* kUnfinishedSuffix = ".unfinished";

/// The name of an unfinished file, another one with every call. `process` tells processes apart.
inline std::filesystem::path unfinished_name(const std::filesystem::path& target, const std::string& process) {
  static std::atomic<std::uint64_t> next{0};
  constexpr std::size_t kLongestName = 200;  // with what is added, file systems take 255 bytes
  std::string name = target.filename().string();
  if (name.size() > kLongestName) name = "long-name";
  return target.parent_path() / (name + "." + process + "-" + std::to_string(next++) + kUnfinishedSuffix);
}

#if __has_include(<sys/file.h>) && __has_include(<unistd.h>)

class UnfinishedFile {
 public:
  /// Makes the unfinished file. `path` names the target, in errors too.
  explicit UnfinishedFile(const std::filesystem::path& path)
      : path_(path), target_(follow_links(path)), directory_(target_.parent_path()) {
    if (directory_.empty()) directory_ = ".";
    if (!target_.has_filename()) throw_unwritable(path_, "the path does not end in the name of a file");
    struct stat old {};
    const bool replaces = ::stat(target_.c_str(), &old) == 0;
    if (!replaces && errno != ENOENT) fail(errno);
    if (replaces && S_ISDIR(old.st_mode)) fail(EISDIR);
    if (replaces && !S_ISREG(old.st_mode)) throw_unwritable(path_, "it is there and not a regular file");

    const std::string process = std::to_string(::getpid());
    do {
      unfinished_ = unfinished_name(target_, process);
      file_ = ::open(unfinished_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, replaces ? 0600 : 0666);
    } while (file_ < 0 && (errno == EEXIST || errno == EINTR));
    if (file_ < 0) fail(errno);
    if (replaces) take_after(old);
  }
  ~UnfinishedFile() {
    if (file_ >= 0) ::close(file_);
    if (!kept_) ::unlink(unfinished_.c_str());
  }
  UnfinishedFile(const UnfinishedFile&) = delete;
  UnfinishedFile& operator=(const UnfinishedFile&) = delete;

  void write(const void* data, std::size_t size) {
    constexpr std::size_t kMost = std::size_t{1} << 30;  // of one call: some systems refuse 2^31 and more
    for (const char* at = static_cast<const char*>(data); size != 0;) {
      const ssize_t written = ::write(file_, at, std::min(size, kMost));
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) fail(written == 0 ? EIO : errno);
      at += written;
      size -= static_cast<std::size_t>(written);
    }
  }

  /// Nothing is written after this: the file is on the disk when it returns.
  void finish() {
    while (::fsync(file_) != 0) {
      if (errno == EINVAL) break;  // a file system that cannot
      if (errno != EINTR) fail(errno);
    }
    const int closed = ::close(std::exchange(file_, -1));
    if (closed != 0 && errno != EINTR) fail(errno);
  }

  /// Leaves the unfinished file where it is, whatever comes.
  void keep() { kept_ = true; }

  /// The target is the finished file, and stays so through a loss of power. Does not allocate unless it throws.
  void replace_target() {
    if (::rename(unfinished_.c_str(), target_.c_str()) != 0) fail(errno);
    kept_ = true;
    // The target is there either way: an error of what follows would say that it is not.
    const int directory = ::open(directory_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0) return;
    ::fsync(directory);
    ::close(directory);
  }

 private:
  [[noreturn, gnu::cold, gnu::noinline]] void fail(int error) const {
    throw_unwritable(path_, std::generic_category().message(error));
  }

  /// Owner and mode of the file that is replaced. Without the right to give it its owner it is ours, as any new file.
  void take_after(const struct stat& old) const {
    if (::fchown(file_, old.st_uid, old.st_gid) != 0 && ::fchown(file_, static_cast<uid_t>(-1), old.st_gid) != 0) {
      errno = 0;
    }
    ::fchmod(file_, old.st_mode & 0777);
  }

  std::filesystem::path path_, target_, directory_, unfinished_;
  int file_ = -1;
  bool kept_ = false;
};

/// While it lives, no other process or thread has it for the same directory: several files that belong together are
/// put into their places by one writer at a time. Waits for its turn. Does nothing on file systems without locks.
class DirectoryLock {
 public:
  explicit DirectoryLock(const std::filesystem::path& directory)
      : directory_(::open(directory.empty() ? "." : directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    while (directory_ >= 0 && ::flock(directory_, LOCK_EX) != 0 && errno == EINTR) {
    }
  }
  ~DirectoryLock() {
    if (directory_ < 0) return;
    ::flock(directory_, LOCK_UN);  // not by close() alone: a child that another thread forked may have a copy
    ::close(directory_);
  }
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  int directory_;
};

#else

class UnfinishedFile {
 public:
  explicit UnfinishedFile(const std::filesystem::path& path) : path_(path), target_(follow_links(path)) {
    std::error_code error;
    const std::filesystem::file_status old = std::filesystem::status(target_, error);
    if (std::filesystem::exists(old) && !std::filesystem::is_regular_file(old)) {
      throw_unwritable(path_, "it is there and not a regular file");
    }
    const std::string process = std::to_string(std::random_device{}());
    do {
      unfinished_ = unfinished_name(target_, process);
    } while (std::filesystem::exists(unfinished_, error));
    file_.open(unfinished_, std::ios::binary | std::ios::trunc);
    if (!file_) fail();
  }
  ~UnfinishedFile() {
    file_.close();
    std::error_code error;
    if (!kept_) std::filesystem::remove(unfinished_, error);
  }
  UnfinishedFile(const UnfinishedFile&) = delete;
  UnfinishedFile& operator=(const UnfinishedFile&) = delete;

  void write(const void* data, std::size_t size) {
    if (!file_.write(static_cast<const char*>(data), static_cast<std::streamsize>(size))) fail();
  }
  void finish() {
    file_.close();
    if (!file_) fail();
  }
  void keep() { kept_ = true; }
  void replace_target() {
    std::error_code error;
    std::filesystem::rename(unfinished_, target_, error);
    if (error) throw_unwritable(path_, error.message());
    kept_ = true;
  }

 private:
  [[noreturn]] void fail() const { throw_unwritable(path_, "the system reports an error"); }

  std::filesystem::path path_, target_, unfinished_;
  std::ofstream file_;
  bool kept_ = false;
};

class DirectoryLock {
 public:
  explicit DirectoryLock(const std::filesystem::path&) {}
};

#endif

}  // namespace diffattn::inline v0_1::detail
