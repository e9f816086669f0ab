#pragma once

// Workspace: scratch memory that is allocated once and used again.
//
// A call opens a frame, takes what it needs from it, and gives everything back when the frame goes out of scope. Frames
// nest like calls. Memory is kept between frames, so once a workspace has seen its largest call it never touches the
// heap again. Pointers are aligned to 64 bytes and stay valid for the life of their frame. Two threads must not use one
// workspace at once: a call that runs on several threads takes shares for them first. An exception closes the frames
// that it passes; after it the workspace can be used as before.

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

/// Scratch memory for calls of this library: pass the same one again and again, and it stops allocating.
class Workspace {
 public:
  /// Empty; allocates when memory is first taken.
  Workspace() = default;
  Workspace(Workspace&&) = default;
  Workspace& operator=(Workspace&&) = default;
  /// A copy is empty: scratch memory is no part of the value of the object that owns it.
  Workspace(const Workspace&) noexcept {}
  Workspace& operator=(const Workspace&) noexcept { return *this; }

  /// Gives back, when it goes out of scope, all that was taken since it was opened.
  class Frame {
   public:
    /// Opens a frame of `workspace`.
    explicit Frame(Workspace& workspace) : workspace_(workspace), block_(workspace.block_), used_(workspace.used_) {}
    ~Frame() { workspace_.release(block_, used_); }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;

   private:
    Workspace& workspace_;
    std::size_t block_;
    std::size_t used_;
  };

  /// Opens a frame: keep it in a local variable.
  [[nodiscard]] Frame frame() & { return Frame(*this); }

  /// `count` uninitialised values, valid until the innermost open frame closes. O(1); allocates only when it must grow.
  /// Throws std::bad_alloc, also if `count` is negative or its bytes are more than an Index can count.
  template <typename T>
  [[nodiscard]] T* take(Index count) {
    static_assert(std::is_trivially_destructible_v<T>);
    constexpr Index kMost = (std::numeric_limits<Index>::max() - kAlignment) / static_cast<Index>(sizeof(T));
    if (count < 0 || count > kMost) throw std::bad_array_new_length();
    return reinterpret_cast<T*>(take_bytes(static_cast<std::size_t>(count) * sizeof(T)));
  }

  /// A workspace for each of `count` tasks that run at once. The tasks must be done before another call uses this
  /// workspace. The shares are kept, and all grow to the size of the largest, so that nothing is allocated if next time
  /// the work falls to other tasks.
  [[nodiscard]] std::span<Workspace> shares(Index count) {
    if (shares_.size() < static_cast<std::size_t>(count)) shares_.resize(static_cast<std::size_t>(count));
    std::size_t most = 0;
    for (const Workspace& share : shares_) most = std::max(most, share.capacity());
    for (Workspace& share : shares_) {
      if (share.capacity() < most) share.add_block(most - share.capacity());
    }
    return std::span(shares_).first(static_cast<std::size_t>(count));
  }

  /// Whether something has been taken and not been given back.
  [[nodiscard]] bool in_use() const { return block_ != 0 || used_ != 0; }

  /// Bytes held, whether in use or not.
  [[nodiscard]] std::size_t capacity() const {
    std::size_t total = 0;
    for (const Block& block : blocks_) total += block.size;
    for (const Workspace& share : shares_) total += share.capacity();
    return total;
  }

 private:
  static constexpr Index kAlignment = 64;
  static constexpr std::size_t kSmallestBlock = 16 * 1024;

  struct Free {
    void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{kAlignment}); }
  };
  struct Block {
    std::unique_ptr<std::byte, Free> memory;
    std::size_t size;
  };

  std::byte* take_bytes(std::size_t bytes) {
    bytes = (bytes + std::size_t{kAlignment} - 1) / std::size_t{kAlignment} * std::size_t{kAlignment};
    if (block_ == 0 && used_ == 0 && blocks_.size() > 1) merge_blocks();
    std::size_t block = block_, used = used_;
    while (block < blocks_.size() && blocks_[block].size - used < bytes) {
      ++block;
      used = 0;
    }
    // More small requests usually follow the first, so a block has room for several.
    if (block == blocks_.size()) add_block(std::max(bytes, kSmallestBlock));
    std::byte* const result = blocks_[block].memory.get() + used;
    block_ = block;
    used_ = used + bytes;
    return result;
  }

  void add_block(std::size_t bytes) {
    auto* memory = static_cast<std::byte*>(::operator new (bytes, std::align_val_t{kAlignment}));
    blocks_.push_back({std::unique_ptr<std::byte, Free>(memory), bytes});
  }

  // There are several blocks when the last call needed more than there was: the next call finds one block of their sum.
  void merge_blocks() {
    std::size_t total = 0;
    for (const Block& block : blocks_) total += block.size;
    blocks_.clear();
    add_block(total);
  }

  void release(std::size_t block, std::size_t used) noexcept {
    block_ = block;
    used_ = used;
  }

  std::vector<Block> blocks_;
  std::vector<Workspace> shares_;
  std::size_t block_ = 0;  // the block in use
  std::size_t used_ = 0;   // bytes taken from it
};

namespace detail {

/// The workspace of calls that are given none. Each thread keeps one, since for a small problem an allocation would
/// take longer than the work. A call that leaves more than kMostKept bytes in it frees them when it ends. A call made
/// after the thread's workspace has been destroyed, from the destructor of a static object for example, has a workspace
/// of its own; so has every call under MinGW.
class ThreadWorkspace {
 public:
  static constexpr std::size_t kMostKept = 1 << 20;

  ThreadWorkspace() = default;
  ThreadWorkspace(const ThreadWorkspace&) = delete;
  ThreadWorkspace& operator=(const ThreadWorkspace&) = delete;
  ~ThreadWorkspace() {
    // It is in use if this call was made from within another one, by a mask for example.
    if (kept_ != nullptr && !kept_->in_use() && kept_->capacity() > kMostKept) *kept_ = Workspace();
  }

  /// The workspace to use for this call.
  operator Workspace&() { return kept_ != nullptr ? *kept_ : own_; }

 private:
#ifdef __MINGW32__
  // MinGW frees the memory of a thread's variables before it destroys them, so that none may own anything.
  static Workspace* of_this_thread() { return nullptr; }
#else
  struct Kept {
    ~Kept() { gone_ = true; }
    Workspace workspace;
  };

  static Workspace* of_this_thread() {
    if (gone_) return nullptr;
    thread_local Kept kept;
    return &kept.workspace;
  }

  // A bool has no destructor, so it can be read until the thread ends.
  inline static constinit thread_local bool gone_ = false;
#endif

  Workspace* kept_ = of_this_thread();
  Workspace own_;
};

}  // namespace detail
}  // namespace diffattn::inline v0_1
