#pragma once

// Ctrl-C ends a training run between two steps. Pressed again, it ends the program at once.

#include <csignal>

namespace example {

inline volatile std::sig_atomic_t interrupted = 0;

inline void catch_interruption() {
  std::signal(SIGINT, [](int) {
    interrupted = 1;
    std::signal(SIGINT, SIG_DFL);
  });
}

}  // namespace example
