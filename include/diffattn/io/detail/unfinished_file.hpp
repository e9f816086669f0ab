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
//          keep the old content. What is mapped from the old file stays valid; on Windows it keeps the file from being
//          replaced, which is then an error. There a file that is replaced has the mode of any new file.
// Errors   std::runtime_error naming the target and the system's reason. The target is then as it was, and the
//          unfinished file gone.

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#ifdef _WIN32
#include <chrono>
#include <cwctype>
#else
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include "diffattn/core/version.hpp"
#include "diffattn/core/windows_api.hpp"

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
  constexpr std::size_t kLongestName = 200;        // with what is added, file systems take 255 bytes
  std::filesystem::path name = target.filename();  // as it is: Windows' letters do not all survive being a string
  if (name.native().size() > kLongestName) name = "long-name";
  name += "." + process + "-" + std::to_string(next++) + kUnfinishedSuffix;
  return target.parent_path() / name;
}

#ifndef _WIN32

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
  /// Makes the unfinished file. `path` names the target, in errors too.
  explicit UnfinishedFile(const std::filesystem::path& path)
      : path_(path), target_(follow_links(path)), file_(nullptr) {
    using namespace windows;
    if (!target_.has_filename()) throw_unwritable(path_, "the path does not end in the name of a file");
    if (is_directory(target_.c_str())) throw_unwritable(path_, std::generic_category().message(EISDIR));
    const std::string process = std::to_string(GetCurrentProcessId());
    do {
      unfinished_ = unfinished_name(target_, process);
      file_ = Handle(CreateFileW(unfinished_.c_str(), kGenericWrite, kShareRead | kShareDelete, nullptr, kCreateNew,
                                 kAttributeNormal, nullptr));
    } while (!file_.is_open() && GetLastError() == kErrorFileExists);
    if (!file_.is_open()) fail();
  }
  ~UnfinishedFile() {
    file_.close();
    if (!kept_) DeleteFileW(unfinished_.c_str());
  }
  UnfinishedFile(const UnfinishedFile&) = delete;
  UnfinishedFile& operator=(const UnfinishedFile&) = delete;

  void write(const void* data, std::size_t size) {
    constexpr std::size_t kMost = std::size_t{1} << 30;  // of one call, which takes 32 bits
    for (const char* at = static_cast<const char*>(data); size != 0;) {
      unsigned long written = 0;
      const auto part = static_cast<unsigned long>(std::min(size, kMost));
      if (WriteFile(file_.get(), at, part, &written, nullptr) == 0) fail();
      at += written;
      size -= written;
    }
  }

  /// Nothing is written after this: the file is on the disk when it returns.
  void finish() {
    if (FlushFileBuffers(file_.get()) == 0 || !file_.close()) fail();
  }

  /// Leaves the unfinished file where it is, whatever comes.
  void keep() { kept_ = true; }

  /// The target is the finished file, and stays so through a loss of power. Does not allocate unless it throws. Where
  /// another writer is in the middle of the same, or reads the target, Windows denies access for that moment.
  void replace_target() {
    using namespace windows;
    const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    for (;;) {
      if (MoveFileExW(unfinished_.c_str(), target_.c_str(), kReplaceExisting | kWriteThrough) != 0) break;
      const unsigned long error = GetLastError();
      const bool passes = error == kErrorAccessDenied || error == kErrorSharingViolation;
      if (!passes || std::chrono::steady_clock::now() > patience || is_directory(target_.c_str())) fail(error);
      Sleep(1);
    }
    kept_ = true;
  }

 private:
  [[noreturn, gnu::cold, gnu::noinline]] void fail(unsigned long error = GetLastError()) const {
    throw_unwritable(path_, windows::message(error));
  }

  std::filesystem::path path_, target_, unfinished_;
  windows::Handle file_;
  bool kept_ = false;
};

/// While it lives, no other process or thread has it for the same directory: several files that belong together are
/// put into their places by one writer at a time. Waits for its turn. Windows locks no directories: what is locked is a
/// mutex with a name made of the directory's. Does nothing where that cannot be had.
class DirectoryLock {
 public:
  explicit DirectoryLock(const std::filesystem::path& directory)
      : mutex_(CreateMutexW(nullptr, 0, mutex_name(directory).c_str())) {
    if (mutex_.is_open()) WaitForSingleObject(mutex_.get(), windows::kInfinite);
  }
  ~DirectoryLock() {
    if (mutex_.is_open()) ReleaseMutex(mutex_.get());
  }
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  /// A name may hold no backslash, and is not to depend on case: directories do not.
  static std::wstring mutex_name(const std::filesystem::path& directory) {
    std::error_code error;
    std::filesystem::path whole = std::filesystem::weakly_canonical(directory.empty() ? "." : directory, error);
    std::uint64_t hash = 14695981039346656037u;  // FNV-1a
    for (const wchar_t letter : whole.make_preferred().native()) {
      hash = (hash ^ static_cast<std::uint64_t>(std::towlower(static_cast<std::wint_t>(letter)))) * 1099511628211u;
    }
    return L"Global\\diffattn-" + std::to_wstring(hash);
  }

  windows::Handle mutex_;
};

#endif

}  // namespace diffattn::inline v0_1::detail
