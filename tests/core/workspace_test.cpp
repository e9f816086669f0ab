// Scratch memory: aligned, apart, nested, reused.

#include "diffattn/core/workspace.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/random.hpp"

using diffattn::Index;
using diffattn::Workspace;

namespace {

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 64 == 0; }

struct Piece {
  char* data;
  Index size;
  char mark;
};

bool intact(const Piece& piece) {
  for (Index i = 0; i < piece.size; ++i) {
    if (piece.data[i] != piece.mark) return false;
  }
  return true;
}

#ifndef __MINGW32__  // where threads keep no workspace
/// Takes memory as a call without a workspace does; whether it found a workspace that holds none yet.
bool took_from_a_new_workspace() {
  diffattn::detail::ThreadWorkspace call;
  Workspace& workspace = call;
  const bool is_new = workspace.capacity() == 0;
  const auto frame = workspace.frame();
  char* const taken = workspace.take<char>(5000);
  std::memset(taken, 1, 5000);
  return is_new;
}

/// Uses a workspace when it is destroyed. `after_it`: the thread's own is destroyed before.
struct CallsAtItsEnd {
  explicit CallsAtItsEnd(bool after) : after_it(after) {}
  CallsAtItsEnd(const CallsAtItsEnd&) = delete;
  CallsAtItsEnd& operator=(const CallsAtItsEnd&) = delete;
  ~CallsAtItsEnd() {
    if (took_from_a_new_workspace() == after_it) return;
    std::fputs("a workspace was used that does not exist any more, or not used while it did\n", stderr);
    std::_Exit(1);
  }
  bool after_it;
};

// Outlives the thread_local workspace of the main thread, which is there: a test below takes from it.
const CallsAtItsEnd static_object(true);
#endif

}  // namespace

TEST_CASE("An unused workspace holds nothing") { CHECK(Workspace().capacity() == 0); }

TEST_CASE("Pieces are aligned, and keep what is written to them") {
  support::Rng rng = support::make_rng();
  std::uniform_int_distribution<Index> sizes(0, 30000);
  Workspace workspace;
  for (int round = 0; round < 4; ++round) {
    const auto frame = workspace.frame();
    std::vector<Piece> pieces;
    for (int i = 0; i < 40; ++i) {
      const Index size = sizes(rng);
      pieces.push_back({workspace.take<char>(size), size, static_cast<char>(i)});
      CHECK(aligned(pieces.back().data));
      std::memset(pieces.back().data, pieces.back().mark, static_cast<std::size_t>(size));
    }
    for (const Piece& piece : pieces) CHECK(intact(piece));
  }
}

TEST_CASE("A frame gives back what was taken inside it, and no more") {
  Workspace workspace;
  const auto outer = workspace.frame();
  int* const kept = workspace.take<int>(100);
  kept[99] = 42;
  double* inside = nullptr;
  {
    const auto inner = workspace.frame();
    inside = workspace.take<double>(10);
    (void)workspace.take<double>(100000);  // grows: what is there must not move
    CHECK(kept[99] == 42);
  }
  CHECK(workspace.take<double>(10) == inside);
  CHECK(kept[99] == 42);
}

TEST_CASE("The same frames again need no more memory") {
  Workspace workspace;
  const auto use = [&] {
    const auto frame = workspace.frame();
    for (const Index size : {10, 5000, 3, 70000, 900}) (void)workspace.take<float>(size);
    const auto inner = workspace.frame();
    (void)workspace.take<float>(40000);
  };
  use();
  use();
  const std::size_t capacity = workspace.capacity();
  CHECK(capacity >= sizeof(float) * (10 + 5000 + 3 + 70000 + 900 + 40000));
  for (int i = 0; i < 10; ++i) use();
  CHECK(workspace.capacity() == capacity);
}

TEST_CASE("After growing, a call's memory is one piece") {
  Workspace workspace;
  const auto take = [&](Index count) {
    const auto frame = workspace.frame();
    char* const first = workspace.take<char>(count * 64);
    char* const second = workspace.take<char>(count * 64);
    return second - first;
  };
  take(1000);
  take(9000);
  CHECK(take(9000) == 9000 * 64);
}

TEST_CASE("Shares are apart, give back what was taken, and stop growing whichever task is the largest") {
  Workspace workspace;
  const auto outer = workspace.frame();
  char* const own = workspace.take<char>(3000);
  std::memset(own, 'o', 3000);
  const auto use = [&](Index large) {
    const auto shares = workspace.shares(4);
    REQUIRE(shares.size() == 4);
    std::vector<Piece> pieces;
    for (Index i = 0; i < 4; ++i) {
      Workspace& share = shares[static_cast<std::size_t>(i)];
      const auto frame = share.frame();
      const Index size = i == large ? 200000 : 100;
      for (const char mark : {'a', 'b'}) {
        pieces.push_back({share.take<char>(size), size, static_cast<char>(mark + 2 * i)});
        CHECK(aligned(pieces.back().data));
        std::memset(pieces.back().data, pieces.back().mark, static_cast<std::size_t>(size));
      }
      CHECK(share.in_use());
    }
    for (const Piece& piece : pieces) CHECK(intact(piece));  // a share keeps its memory after its frame
    for (const Workspace& share : shares) CHECK(!share.in_use());
  };
  use(0);
  use(0);
  (void)workspace.shares(4);  // all grow to the size of the first
  const std::size_t capacity = workspace.capacity();
  CHECK(capacity >= 4 * 2 * 200000 + 3000);
  for (const Index large : {3, 1, 2, 0}) {
    use(large);
    CHECK(workspace.capacity() == capacity);
  }
  CHECK(workspace.shares(2).size() == 2);  // fewer: the others are kept
  CHECK(workspace.capacity() == capacity);
  CHECK(workspace.shares(6).size() == 6);
  CHECK(workspace.capacity() > capacity);
  CHECK(intact({own, 3000, 'o'}));
}

TEST_CASE("A workspace moves with its memory, and copies without") {
  Workspace workspace;
  {
    const auto frame = workspace.frame();
    (void)workspace.take<char>(1000);
  }
  const std::size_t capacity = workspace.capacity();
  const Workspace copy(workspace);
  CHECK(copy.capacity() == 0);
  Workspace moved(std::move(workspace));
  CHECK(moved.capacity() == capacity);
  const auto frame = moved.frame();
  CHECK(moved.take<char>(1000) != nullptr);
  CHECK(moved.capacity() == capacity);
}

TEST_CASE("A size that no memory has is refused, and the workspace goes on") {
  Workspace workspace;
  const auto frame = workspace.frame();
  char* const first = workspace.take<char>(64);
  for (const Index count : {Index{1} << 60, Index{1} << 61, Index{1} << 62, std::numeric_limits<Index>::max(),
                            std::numeric_limits<Index>::max() / 4, Index{-1}, std::numeric_limits<Index>::min()}) {
    INFO(count);
    CHECK_THROWS_AS((void)workspace.take<double>(count), std::bad_alloc);
    CHECK_THROWS_AS((void)workspace.take<Piece>(count), std::bad_alloc);
  }
  CHECK_THROWS_AS((void)workspace.take<char>(std::numeric_limits<Index>::max() - 1), std::bad_alloc);
  CHECK(workspace.take<char>(64) == first + 64);
}

TEST_CASE("When there is no memory, nothing is taken") {
  Workspace workspace;
  const auto use = [&](Index count) {
    const auto frame = workspace.frame();
    char* const first = workspace.take<char>(100);
    std::memset(first, 5, 100);
    for (int i = 0; i < 3; ++i) std::memset(workspace.take<char>(count), 7, static_cast<std::size_t>(count));
    CHECK(std::count(first, first + 100, 5) == 100);
  };
  Index count = 10000;
  const std::size_t failures = support::for_every_failing_allocation([&] { use(count *= 2); },
                                                                     [&](bool threw) {
                                                                       CHECK(threw);
                                                                       CHECK(!workspace.in_use());
                                                                       use(10);
                                                                     });
  CHECK((failures > 0) == support::fails_allocations());

  // A frame that is still open keeps what it has, and takes from where it was.
  const auto frame = workspace.frame();
  char* const before = workspace.take<char>(64);
  support::for_every_failing_allocation([&] { (void)workspace.take<char>(Index{1} << 24); },
                                        [&](bool threw) {
                                          CHECK(threw);
                                          CHECK(workspace.take<char>(0) == before + 64);
                                        });
}

#ifndef __MINGW32__
TEST_CASE("calls while a thread or the program ends find a workspace") {
  (void)took_from_a_new_workspace();  // for static_object
  std::thread([] {
    thread_local const CallsAtItsEnd made_before(true);  // is destroyed after the workspace, which comes later
    (void)took_from_a_new_workspace();
    thread_local const CallsAtItsEnd made_after(false);
  }).join();
  std::thread([] { thread_local const CallsAtItsEnd first_to_call(true); }).join();
}

TEST_CASE("calls without a workspace share their thread's, which keeps little") {
  using diffattn::detail::ThreadWorkspace;
  const auto capacity = [] {
    ThreadWorkspace call;
    return static_cast<Workspace&>(call).capacity();
  };
  {
    ThreadWorkspace outer;
    Workspace& workspace = outer;
    const auto frame = workspace.frame();
    double* const taken = workspace.take<double>(8);
    std::fill(taken, taken + 8, 1.0);
    {
      ThreadWorkspace inner;
      Workspace& same = inner;
      CHECK(&same == &workspace);
      const auto inner_frame = same.frame();
      double* const large = same.take<double>(ThreadWorkspace::kMostKept);
      std::fill(large, large + ThreadWorkspace::kMostKept, 2.0);
    }
    CHECK(workspace.capacity() > ThreadWorkspace::kMostKept);
    CHECK(std::count(taken, taken + 8, 1.0) == 8);
  }
  CHECK(capacity() <= ThreadWorkspace::kMostKept);
}
#endif
