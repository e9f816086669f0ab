#pragma once

// Child processes for tests of what happens to files when a process dies, or when several write.

#if __has_include(<sys/wait.h>) && __has_include(<unistd.h>)
#define DIFFATTN_TEST_PROCESSES 1
#else
#define DIFFATTN_TEST_PROCESSES 0
#endif

#if DIFFATTN_TEST_PROCESSES

#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <stdexcept>

#if defined(__linux__)
#include <sys/ptrace.h>
#endif

namespace processes {

/// A child process that runs f and ends with what it returns, or with 99 if it throws. Killed with this object.
class Child {
 public:
  template <typename F>
  explicit Child(F&& f) : id_(::fork()) {
    if (id_ < 0) throw std::runtime_error("cannot fork");
    if (id_ != 0) return;
    int status = 99;
    try {
      status = f();
    } catch (...) {
    }
    ::_exit(status);
  }
  ~Child() { kill(); }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  void kill() {
    if (id_ <= 0) return;
    ::kill(id_, SIGKILL);
    wait();
  }

  /// The exit status, or −1 if a signal ended it.
  int wait() {
    int status = 0;
    while (::waitpid(id_, &status, 0) < 0 && errno == EINTR) {
    }
    id_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  pid_t id() const { return id_; }
  /// It has ended, and somebody else has waited for it.
  void forget() { id_ = 0; }

 private:
  pid_t id_;
};

/// Runs f in a child process that is killed as it enters or leaves a system call, the `stop`-th time; whether it was
/// killed and had not ended before.
template <typename F>
bool killed_at(int stop, F&& f) {
#if defined(__linux__)
  Child child([&] {
    if (::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) return 1;
    ::raise(SIGSTOP);
    f();
    return 0;
  });
  int status = 0;
  for (int i = 0;; ++i) {
    if (::waitpid(child.id(), &status, 0) < 0 || !WIFSTOPPED(status)) break;
    if (i == stop) {
      child.kill();
      return true;
    }
    ::ptrace(PTRACE_SYSCALL, child.id(), nullptr, nullptr);
  }
  child.forget();
#else
  static_cast<void>(stop);
  static_cast<void>(f);
#endif
  return false;
}

}  // namespace processes

#endif
