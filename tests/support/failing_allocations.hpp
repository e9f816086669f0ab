#pragma once

// Makes the k-th allocation of a test fail, as it does when memory is short: malloc returns null, operator new throws.
//
//   const std::size_t failures = support::for_every_failing_allocation([&] { model.save(path); },
//                                                                      [&](bool threw) { REQUIRE(is_as_before()); });

#include <cstddef>
#include <new>
#include <utility>

namespace support {

/// Whether allocations can be made to fail: with glibc, also under AddressSanitizer, but not under other sanitizers.
bool fails_allocations();

enum class FailingThreads { own, all };  ///< whose allocations are counted
enum class Failures { one, all_later };  ///< whether those after the k-th fail too

/// While this object lives, the k-th allocation fails, counted from 1. One such object at a time.
class FailingAllocation {
 public:
  explicit FailingAllocation(std::size_t k, Failures failures = Failures::one,
                             FailingThreads threads = FailingThreads::own);
  ~FailingAllocation();
  FailingAllocation(const FailingAllocation&) = delete;
  FailingAllocation& operator=(const FailingAllocation&) = delete;

  /// Whether the k-th allocation was asked for.
  bool failed() const;
};

/// Calls f with the k-th allocation failing, for k = 1, 2, … until f asks for fewer than k, and check(threw) after each
/// call in which one failed: threw says whether std::bad_alloc came out. Anything else that f throws is passed on.
/// Returns the number of calls in which an allocation failed.
template <typename F, typename Check>
std::size_t for_every_failing_allocation(F&& f, Check&& check, Failures failures = Failures::one,
                                         FailingThreads threads = FailingThreads::own) {
  if (!fails_allocations()) return 0;
  for (std::size_t k = 1;; ++k) {
    bool threw = false, failed = false;
    {
      const FailingAllocation failing(k, failures, threads);
      try {
        f();
      } catch (const std::bad_alloc&) {
        threw = true;
      }
      failed = failing.failed();
    }
    if (!failed) return k - 1;
    check(threw);
  }
}

}  // namespace support
