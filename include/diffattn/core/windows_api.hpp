#pragma once

// What files need of Windows, declared by hand: <windows.h> would bring its macros (min, max, near, ERROR, …) into every
// program that reads a file. The declarations are the same as there, so that a program may include it as well. Empty on
// other systems.

#include "diffattn/core/version.hpp"

#ifdef _WIN32

#include <cstddef>
#include <string>
#include <system_error>
#include <utility>

struct _SECURITY_ATTRIBUTES;
struct _OVERLAPPED;

extern "C" {
__declspec(dllimport) unsigned long __stdcall GetLastError();
__declspec(dllimport) unsigned long __stdcall GetCurrentProcessId();
__declspec(dllimport) int __stdcall CloseHandle(void* handle);
__declspec(dllimport) void* __stdcall CreateFileW(const wchar_t* name, unsigned long access, unsigned long share,
                                                  _SECURITY_ATTRIBUTES* security, unsigned long disposition,
                                                  unsigned long flags, void* model);
__declspec(dllimport) int __stdcall WriteFile(void* file, const void* data, unsigned long size, unsigned long* written,
                                              _OVERLAPPED* overlapped);
__declspec(dllimport) int __stdcall FlushFileBuffers(void* file);
__declspec(dllimport) unsigned long __stdcall GetFileType(void* file);
__declspec(dllimport) unsigned long __stdcall GetFileAttributesW(const wchar_t* name);
__declspec(dllimport) void* __stdcall CreateFileMappingW(void* file, _SECURITY_ATTRIBUTES* security,
                                                         unsigned long protection, unsigned long size_high,
                                                         unsigned long size_low, const wchar_t* name);
__declspec(dllimport) void* __stdcall MapViewOfFile(void* mapping, unsigned long access, unsigned long offset_high,
                                                    unsigned long offset_low, std::size_t size);
__declspec(dllimport) int __stdcall UnmapViewOfFile(const void* address);
__declspec(dllimport) unsigned long __stdcall GetFileSize(void* file, unsigned long* high);
__declspec(dllimport) int __stdcall MoveFileExW(const wchar_t* from, const wchar_t* to, unsigned long flags);
__declspec(dllimport) int __stdcall DeleteFileW(const wchar_t* name);
__declspec(dllimport) void* __stdcall CreateMutexW(_SECURITY_ATTRIBUTES* security, int owned, const wchar_t* name);
__declspec(dllimport) int __stdcall ReleaseMutex(void* mutex);
__declspec(dllimport) void __stdcall Sleep(unsigned long milliseconds);
__declspec(dllimport) unsigned long __stdcall WaitForSingleObject(void* handle, unsigned long milliseconds);
}

namespace diffattn::inline v0_1::detail::windows {

// Windows' own names and values.
inline constexpr unsigned long kGenericRead = 0x80000000, kGenericWrite = 0x40000000;
inline constexpr unsigned long kShareRead = 1, kShareWrite = 2, kShareDelete = 4;
inline constexpr unsigned long kCreateNew = 1, kOpenExisting = 3;
inline constexpr unsigned long kAttributeDirectory = 0x10, kAttributeNormal = 0x80, kInvalidAttributes = 0xFFFFFFFF;
inline constexpr unsigned long kTypeDisk = 1, kInvalidSize = 0xFFFFFFFF;
inline constexpr unsigned long kPageReadonly = 2, kMapRead = 4;
inline constexpr unsigned long kReplaceExisting = 1, kWriteThrough = 8;
inline constexpr unsigned long kInfinite = 0xFFFFFFFF;
inline constexpr unsigned long kErrorAccessDenied = 5, kErrorSharingViolation = 32, kErrorFileExists = 80;

/// Closes a handle with its own end. Can be moved, not copied.
class Handle {
 public:
  /// Takes over what CreateFileW or CreateFileMappingW has returned, success or not.
  explicit Handle(void* handle) : handle_(handle) {}
  ~Handle() { close(); }
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }

  /// Whether there is one.
  bool is_open() const { return handle_ != nullptr && handle_ != reinterpret_cast<void*>(-1); }
  /// For the functions above.
  void* get() const { return handle_; }
  /// Closes it now; whether that went well.
  bool close() {
    const bool closed = !is_open() || CloseHandle(handle_) != 0;
    handle_ = nullptr;
    return closed;
  }

 private:
  void* handle_;
};

/// Whether `name` is a directory; false if there is nothing of that name.
inline bool is_directory(const wchar_t* name) {
  const unsigned long attributes = GetFileAttributesW(name);
  return attributes != kInvalidAttributes && (attributes & kAttributeDirectory) != 0;
}

/// The text of an error of Windows: that of other systems, in English, where they know the error too.
inline std::string message(unsigned long error) {
  const std::error_condition condition = std::system_category().default_error_condition(static_cast<int>(error));
  return condition.message();
}

}  // namespace diffattn::inline v0_1::detail::windows

#endif
