// malloc and its kin, replaced by what counts and passes on to glibc. Linked into a program that asks for the count.

#include "support/allocations.hpp"

#include <atomic>
#include <cerrno>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define DIFFATTN_TEST_COUNTS 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DIFFATTN_TEST_COUNTS 0
#endif
#endif
#if !defined(DIFFATTN_TEST_COUNTS) && defined(__GLIBC__)
#define DIFFATTN_TEST_COUNTS 1
#endif

namespace {
std::atomic<std::size_t> count{0};
}

namespace support {
bool counts_allocations() { return DIFFATTN_TEST_COUNTS != 0; }
std::size_t allocations() { return count; }
}  // namespace support

#if DIFFATTN_TEST_COUNTS

extern "C" {

void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t number, std::size_t size);
void* __libc_realloc(void* memory, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);

void* malloc(std::size_t size) {
  ++count;
  return __libc_malloc(size);
}
void* calloc(std::size_t number, std::size_t size) {
  ++count;
  return __libc_calloc(number, size);
}
void* realloc(void* memory, std::size_t size) {
  ++count;
  return __libc_realloc(memory, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  ++count;
  return __libc_memalign(alignment, size);
}
void* memalign(std::size_t alignment, std::size_t size) {
  ++count;
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** memory, std::size_t alignment, std::size_t size) {
  ++count;
  *memory = __libc_memalign(alignment, size);
  return *memory == nullptr ? ENOMEM : 0;
}
}

#endif
