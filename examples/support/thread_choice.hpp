#pragma once

// How many threads train fastest, found out while training: every number of them gives the same bits, so that nothing
// is lost by trying. Two cores help; those that other programs use, or a hundred for a small model, may not.

#include <algorithm>
#include <diffattn/core/parallel_threads.hpp>
#include <memory>
#include <thread>
#include <vector>

namespace example {

class ThreadChoice {
 public:
  /// Always `threads`; or, for 0, whichever of 1, 2, 4 … and all cores (32 at most) is fastest.
  explicit ThreadChoice(diffattn::Index threads) {
    const auto cores = static_cast<diffattn::Index>(std::max(std::thread::hardware_concurrency(), 1U));
    const diffattn::Index most = threads != 0 ? threads : std::min<diffattn::Index>(cores, 32);
    for (diffattn::Index count = threads != 0 ? threads : 1; count < most; count *= 2) add(count);
    add(most);
  }

  /// For the next step.
  diffattn::ThreadPool& pool() { return *choices_[present_].pool; }

  /// Tells how long that took.
  void took(double seconds) {
    choices_[present_].seconds += seconds;
    if (++steps_ < (trying_ ? kTried : kKept)) return;
    steps_ = 0;
    if (trying_ && present_ + 1 < choices_.size()) {
      ++present_;
      return;
    }
    // Either all have been tried, and the fastest stays for a while, or it is time to try again.
    const auto faster = [](const Choice& a, const Choice& b) { return a.seconds < b.seconds; };
    const auto fastest = std::min_element(choices_.begin(), choices_.end(), faster) - choices_.begin();
    present_ = trying_ ? static_cast<std::size_t>(fastest) : 0;
    trying_ = !trying_;
    for (Choice& choice : choices_) choice.seconds = 0;
  }

 private:
  static constexpr int kTried = 3, kKept = 150;  // steps

  struct Choice {
    std::unique_ptr<diffattn::ThreadPool> pool;
    double seconds;
  };

  void add(diffattn::Index threads) { choices_.push_back({std::make_unique<diffattn::ThreadPool>(threads), 0}); }

  std::vector<Choice> choices_;
  std::size_t present_ = 0;
  int steps_ = 0;
  bool trying_ = true;
};

}  // namespace example
