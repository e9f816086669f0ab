// Scratch memory: aligned, apart, nested, reused.

#include "diffattn/core/workspace.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "support/catch.hpp"
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
