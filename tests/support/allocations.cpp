// malloc and its kin, replaced by what counts, fails when a test asks for it, and passes on to glibc or to
// AddressSanitizer. Linked into a program that asks for the count or for a failure.

#include "support/allocations.hpp"

#include <cerrno>
#include <cstdlib>

#include "support/failing_allocations.hpp"

#if defined(__has_feature)
#define DIFFATTN_TEST_FEATURE(name) __has_feature(name)
#else
#define DIFFATTN_TEST_FEATURE(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || DIFFATTN_TEST_FEATURE(address_sanitizer)
#define DIFFATTN_TEST_ADDRESS_SANITIZER 1
#else
#define DIFFATTN_TEST_ADDRESS_SANITIZER 0
#endif
#if defined(__GLIBC__) && !defined(__SANITIZE_THREAD__) && !DIFFATTN_TEST_FEATURE(thread_sanitizer) && \
    !DIFFATTN_TEST_FEATURE(memory_sanitizer)
#define DIFFATTN_TEST_REPLACES 1
#else
#define DIFFATTN_TEST_REPLACES 0
#endif

// Allocations happen before AddressSanitizer has started, so what must_fail() runs is not to be instrumented: builtins,
// and not std::atomic, whose functions are compiled apart without optimisation.
#if DIFFATTN_TEST_ADDRESS_SANITIZER
#define DIFFATTN_TEST_PLAIN __attribute__((no_sanitize("address")))
#else
#define DIFFATTN_TEST_PLAIN
#endif

namespace {

std::size_t count = 0;

// What is to fail. Other threads read this while the test's own thread sets it.
bool armed = false;
bool all_later = false;
bool own_thread_only = false;
std::size_t fails_at = 0;
std::size_t asked = 0;
thread_local bool is_own_thread = false;

/// Counts an allocation; whether it is one that must fail.
[[maybe_unused]] DIFFATTN_TEST_PLAIN bool must_fail() {
  __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED);
  if (!__atomic_load_n(&armed, __ATOMIC_ACQUIRE) || (own_thread_only && !is_own_thread)) return false;
  const std::size_t number = __atomic_add_fetch(&asked, 1, __ATOMIC_RELAXED);
  if (number == fails_at || (all_later && number > fails_at)) {
    errno = ENOMEM;
    return true;
  }
  return false;
}

}  // namespace

namespace support {

bool counts_allocations() { return DIFFATTN_TEST_REPLACES != 0 && DIFFATTN_TEST_ADDRESS_SANITIZER == 0; }
std::size_t allocations() { return __atomic_load_n(&count, __ATOMIC_RELAXED); }

bool fails_allocations() { return DIFFATTN_TEST_REPLACES != 0; }

FailingAllocation::FailingAllocation(std::size_t k, Failures failures, FailingThreads threads) {
  fails_at = k;
  __atomic_store_n(&asked, 0, __ATOMIC_RELAXED);
  all_later = failures == Failures::all_later;
  own_thread_only = threads == FailingThreads::own;
  is_own_thread = true;
  __atomic_store_n(&armed, true, __ATOMIC_RELEASE);
}
FailingAllocation::~FailingAllocation() {
  __atomic_store_n(&armed, false, __ATOMIC_RELEASE);
  is_own_thread = false;
}
bool FailingAllocation::failed() const { return __atomic_load_n(&asked, __ATOMIC_RELAXED) >= fails_at; }

}  // namespace support

#if DIFFATTN_TEST_REPLACES

#if DIFFATTN_TEST_ADDRESS_SANITIZER
#define DIFFATTN_TEST_REAL(name) __interceptor_##name
#else
#define DIFFATTN_TEST_REAL(name) __libc_##name
#endif

extern "C" {

void* DIFFATTN_TEST_REAL(malloc)(std::size_t size);
void* DIFFATTN_TEST_REAL(calloc)(std::size_t number, std::size_t size);
void* DIFFATTN_TEST_REAL(realloc)(void* memory, std::size_t size);
void* DIFFATTN_TEST_REAL(memalign)(std::size_t alignment, std::size_t size);

DIFFATTN_TEST_PLAIN void* malloc(std::size_t size) { return must_fail() ? nullptr : DIFFATTN_TEST_REAL(malloc)(size); }
DIFFATTN_TEST_PLAIN void* calloc(std::size_t number, std::size_t size) {
  return must_fail() ? nullptr : DIFFATTN_TEST_REAL(calloc)(number, size);
}
DIFFATTN_TEST_PLAIN void* realloc(void* memory, std::size_t size) {
  return must_fail() ? nullptr : DIFFATTN_TEST_REAL(realloc)(memory, size);
}
DIFFATTN_TEST_PLAIN void* aligned_alloc(std::size_t alignment, std::size_t size) {
  return must_fail() ? nullptr : DIFFATTN_TEST_REAL(memalign)(alignment, size);
}
DIFFATTN_TEST_PLAIN void* memalign(std::size_t alignment, std::size_t size) {
  return must_fail() ? nullptr : DIFFATTN_TEST_REAL(memalign)(alignment, size);
}
DIFFATTN_TEST_PLAIN int posix_memalign(void** memory, std::size_t alignment, std::size_t size) {
  *memory = must_fail() ? nullptr : DIFFATTN_TEST_REAL(memalign)(alignment, size);
  return *memory == nullptr ? ENOMEM : 0;
}
}

#endif

// AddressSanitizer has an operator new of its own, which would not come here.
#if DIFFATTN_TEST_REPLACES && DIFFATTN_TEST_ADDRESS_SANITIZER

#include <new>

void* operator new(std::size_t size) {
  if (void* const memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void* operator new[](std::size_t size) { return operator new(size); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return std::malloc(size == 0 ? 1 : size); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return std::malloc(size == 0 ? 1 : size); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  if (void* const memory = memalign(static_cast<std::size_t>(alignment), size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void* operator new[](std::size_t size, std::align_val_t alignment) { return operator new(size, alignment); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

#endif
