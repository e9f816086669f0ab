#pragma once

// KvCache: the keys and values of the tokens that one attention layer has seen, so that the next ones need not compute
// them again.
//
//   KvCache cache;                                     // or KvCache<Eigen::bfloat16> cache({.window = 4096});
//   y = layer.forward(prompt, cache);                  // whole, or in chunks
//   y = layer.forward(token, cache);                   // one after the other: appends, and attends to all so far
//
// Storage    float (default), double, Eigen::bfloat16 or Eigen::half, no wider than the layer's scalar, in which all
//            arithmetic is done. Keys and values are packed once, as they come, in the form that the kernels read.
// Shape      a cache belongs to one layer: the first that uses it gives it its shape, and one of another shape is
//            refused. An empty cache takes any.
// Positions  the first token stands at position 0; with a window they keep counting when tokens are dropped.
// Forks      a copy shares what is there, and both go on independently: only a page that is not full is copied, when
//            one of them first adds to it. Copies may be used from different threads.
// Memory     grows in pages of some hundred tokens, which never move; `reserve` tokens at the first use. Without growth
//            nothing is allocated. A window gives back what no later query can see, page by page.
// Errors     ShapeError and std::invalid_argument before any work, std::bad_alloc at once for a reserve that the system
//            does not have. Whatever a call throws, its cache is as before.

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/kernels/key_value_pages.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1 {

struct KvCacheOptions {
  Index reserve = 0;     ///< tokens to make room for at the first use
  Index max_tokens = 0;  ///< the longest sequence that is taken; 0: no limit
  std::optional<Index> window =
      std::nullopt;  ///< a query sees the last `window` tokens, its own included; left out: all
};

template <typename StorageType = float>
class KvCache {
 public:
  using Storage = StorageType;

  KvCache() = default;
  // Copies are forks and cost little, so moving is copying: what is moved from stays a cache that can go on.
  KvCache(const KvCache&) = default;
  KvCache& operator=(const KvCache&) = default;
  explicit KvCache(const KvCacheOptions& options) : options_(options) {
    check_not_negative("reserve", options.reserve);
    check_not_negative("max_tokens", options.max_tokens);
    if (options.window) detail::check_positive("KvCache", "window", *options.window);
  }

  const KvCacheOptions& options() const { return options_; }
  /// The window as a mask, of all tokens where there is none: both(mask, cache.window_mask()) is what a query sees.
  SlidingWindowMask window_mask() const { return {options_.window.value_or(std::numeric_limits<Index>::max())}; }
  /// How many tokens have been fed: the position of the next one.
  Index position() const { return position_; }
  /// How many of them are still there to be seen: all, or at most the window.
  Index size() const { return std::min(position_, options_.window.value_or(position_)); }
  bool empty() const { return position_ == 0; }
  /// Bytes of keys and values held, room that is not yet used and pages shared with forks included.
  std::size_t memory_bytes() const {
    return pages_.size() * static_cast<std::size_t>(shape_.page_size()) * sizeof(Storage);
  }

  /// A cache that continues from here on its own and shares what is there.
  [[nodiscard]] KvCache fork() const { return *this; }

  /// Keeps the first `tokens` tokens, and the memory of the others for what comes. Throws std::invalid_argument if
  /// there are not as many, or if the window has dropped what the next query would see.
  void truncate(Index tokens) {
    if (tokens < 0 || tokens > position_) {
      detail::throw_invalid({"KvCache: cannot truncate to ", tokens, " tokens, there are ", position_});
    }
    if (tokens == 0) return clear();
    if (first_visible(tokens) < dropped_) {
      detail::throw_invalid({"KvCache: cannot truncate to ", tokens, " tokens, the window of ", *options_.window,
                             " has dropped those before ", dropped_});
    }
    position_ = tokens;
  }

  /// As new, but for the memory.
  void clear() noexcept { position_ = dropped_ = 0; }

  /// Until release() is called as often, a window keeps what it passes, so that truncate() finds it: for what consists
  /// of several calls, one of which may fail.
  void hold() noexcept { ++holds_; }
  void release() noexcept {
    --holds_;
    drop_passed();
  }

  // What layers do, in this order. `where` names the layer in messages.

  /// The shape of such tokens' pages. Throws ShapeError unless what is there has the same.
  template <typename Scalar>
  PageShape check_shape(const char* where, Index heads, Index key_maps, Index d, Index dv) const {
    static_assert(sizeof(Storage) <= sizeof(Scalar), "diffattn: a cache must not be wider than the layer's scalar");
    const PageShape shape{heads, key_maps, d, dv, detail::Tile<Scalar>::kCols};
    if (position_ != 0 && shape != shape_) throw_other_shape(where, shape);
    return shape;
  }

  /// The same, and checks that there is room for `tokens` tokens.
  template <typename Scalar>
  PageShape check(const char* where, Index heads, Index key_maps, Index d, Index dv, Index tokens) const {
    const PageShape shape = check_shape<Scalar>(where, heads, key_maps, d, dv);
    if (options_.max_tokens != 0 && tokens > options_.max_tokens - position_) {
      detail::throw_invalid({where, ": the cache holds at most ", options_.max_tokens, " tokens and has ", position_,
                             ", cannot append ", tokens});
    }
    return shape;
  }

  /// Checks that they fit, and makes room for them.
  template <typename Scalar>
  void prepare(const char* where, Index heads, Index key_maps, Index d, Index dv, Index tokens) {
    const PageShape shape = check<Scalar>(where, heads, key_maps, d, dv, tokens);
    if (shape != shape_) {
      pages_.clear();
      shape_ = shape;
    }
    const Index held = position_ - dropped_;
    const Index room = std::max(held + tokens, options_.reserve);
    check_memory(where, room);
    while (page_count() * detail::kPageKeys < room) pages_.push_back(std::make_shared<Page>(shape_));
    for (Index page = held / detail::kPageKeys; page * detail::kPageKeys < held + tokens; ++page) own(page, held);
  }

  /// Packs keys (tokens x heads·key_maps·d) and values (tokens x heads·dv) behind what is there.
  template <typename Scalar, Executor E>
  void write(const StridedView<const Scalar>& k, const StridedView<const Scalar>& v, E& executor) {
    using detail::kPageKeys;
    const Index held = position_ - dropped_, first_page = held / kPageKeys, heads = shape_.heads;
    const Index pages = detail::divide_up(held + k.rows, kPageKeys) - first_page;
    executor.run(pages * heads, [&](Index task, Index /*worker*/) {
      const Index page = first_page + task / heads, head = task % heads, width = shape_.key_maps * shape_.d;
      const Index begin = std::max(held, page * kPageKeys), end = std::min(held + k.rows, (page + 1) * kPageKeys);
      pack_into_page(*pages_[static_cast<std::size_t>(page)], shape_, head, begin - page * kPageKeys,
                     k.block(begin - held, head * width, end - begin, width),
                     v.block(begin - held, head * shape_.dv, end - begin, shape_.dv));
    });
  }

  /// What is there and `written` tokens behind it, for the kernels of decode.hpp.
  KeyValuePages<Storage> packed(Index written = 0) const {
    return {pages_.data(), shape_, position_ - dropped_ + written, dropped_};
  }

  /// Makes what was written part of the cache, and drops what the window has left behind.
  void commit(Index written) noexcept {
    position_ += written;
    drop_passed();
  }

 private:
  using Page = detail::Page<Storage>;

  void drop_passed() noexcept {
    if (holds_ != 0) return;
    const Index passed = (first_visible(position_) - dropped_) / detail::kPageKeys;
    if (passed == 0) return;
    std::rotate(pages_.begin(), pages_.begin() + passed, pages_.end());
    dropped_ += passed * detail::kPageKeys;
    // One page more than is needed, so that the next ones are not allocated.
    const Index keep = detail::divide_up(std::max(position_ - dropped_, options_.reserve), detail::kPageKeys) + 1;
    if (keep < page_count()) pages_.erase(pages_.begin() + keep, pages_.end());
  }

  /// Refuses room for more tokens than there is memory for. Taken page by page, a system that promises more than it has
  /// would go on until it ends the program; asked for all of it at once, it says no.
  void check_memory(const char* where, Index tokens) const {
    constexpr Index kManyPages = 64;
    constexpr Index kMostBytes = Index{1} << 40;
    const Index page_bytes = shape_.page_size() * static_cast<Index>(sizeof(Storage));
    if (tokens > kMostBytes / page_bytes * detail::kPageKeys) {
      detail::throw_invalid({where, ": a cache for ", tokens, " tokens would take more than ", kMostBytes, " bytes"});
    }
    const Index missing = detail::divide_up(tokens, detail::kPageKeys) - page_count();
    if (missing < kManyPages) return;
    ::operator delete(::operator new(static_cast<std::size_t>(missing * page_bytes)));
  }

  static void check_not_negative(const char* field, Index value) {
    if (value < 0) detail::throw_invalid({"KvCache: ", field, " must be 0 or more, got ", value});
  }

  [[gnu::cold, gnu::noinline]] void throw_other_shape(const char* where, const PageShape& shape) const {
    detail::throw_shape({where,           ": the cache must hold ",
                         shape.heads,     " heads of ",
                         shape.key_maps,  " x ",
                         shape.d,         " key and ",
                         shape.dv,        " value columns in strips of ",
                         shape.strip,     ", got ",
                         shape_.heads,    " heads of ",
                         shape_.key_maps, " x ",
                         shape_.d,        " and ",
                         shape_.dv,       " in strips of ",
                         shape_.strip});
  }

  Index page_count() const { return static_cast<Index>(pages_.size()); }

  /// The first position that a query at `position` or later sees.
  Index first_visible(Index position) const {
    return options_.window ? std::max<Index>(position - *options_.window + 1, 0) : 0;
  }

  /// Makes a page that a fork shares our own. Only the last one that holds tokens has something to be copied.
  void own(Index page, Index held) {
    std::shared_ptr<Page>& shared = pages_[static_cast<std::size_t>(page)];
    if (shared.use_count() == 1) {
      // What a fork read of the page before it let go of it must have happened before what we write: changing the count
      // that it changed last sees to that. (A fence would, too, but ThreadSanitizer knows none.)
      std::shared_ptr<Page>(shared).reset();
      return;
    }
    auto copy = std::make_shared<Page>(shape_);
    if (page * detail::kPageKeys < held) {
      std::copy_n(shared->data.get(), shape_.page_size(), copy->data.get());
      copy->finite_values = shared->finite_values;
    }
    shared = std::move(copy);
  }

  KvCacheOptions options_;
  PageShape shape_;
  std::vector<std::shared_ptr<Page>> pages_;  // the first holds position dropped_
  Index position_ = 0;
  Index dropped_ = 0;  // positions that the window has left behind, whole pages
  Index holds_ = 0;    // calls of hold() without their release()
};

}  // namespace diffattn::inline v0_1
