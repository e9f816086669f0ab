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
// Memory     grows in pages of page_size tokens, which never move; `reserve` tokens at the first use. Without growth
//            nothing is allocated. memory_bytes() is page_size · num_kv_heads · (key maps · head_dim + value columns, in
//            whole strips of at most 32) · sizeof(Storage) a page; an odd head_dim may be rounded up for bfloat16.
// Window     gives back what no later query can see, page by page, so memory is bounded: with a window of w tokens,
//            pages of p and chunks of up to n, where n <= w, it is
//                ceil((w - 2 + max(n, p)) / p) + 1 pages
//            from the call on that fills the window, and no later one allocates, scratch included. A chunk longer than
//            w takes the pages that it needs, and gives them back.
// Pages      small ones fit a window closely, large ones make fewer. Results are the same, bit for bit, whatever the
//            size, as long as all values are finite; chunks of more than 4 tokens copy one head's keys and values where
//            a page is below 256.
// Errors     ShapeError and std::invalid_argument before any work, std::bad_alloc at once for a reserve that the system
//            does not have. Whatever a call throws, its cache is as before.

#include <algorithm>
#include <bit>
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
      std::nullopt;     ///< a query sees the last `window` tokens, its own included; left out: all
  Index page_size = 0;  ///< tokens a page, rounded up to a power of two, 32 at least; 0: 256
};

template <typename StorageType = float>
class KvCache {
 public:
  using Storage = StorageType;

  KvCache() : KvCache(KvCacheOptions{}) {}
  // Copies are forks and cost little, so moving is copying: what is moved from stays a cache that can go on.
  KvCache(const KvCache&) = default;
  KvCache& operator=(const KvCache&) = default;
  explicit KvCache(const KvCacheOptions& options) : options_(options) {
    check_not_negative("reserve", options.reserve);
    check_not_negative("max_tokens", options.max_tokens);
    if (options.window) detail::check_positive("KvCache", "window", *options.window);
    check_not_negative("page_size", options.page_size);
    if (options.page_size > detail::kMostPageKeys) {
      detail::throw_invalid(
          {"KvCache: page_size, tokens a page, must be at most ", detail::kMostPageKeys, ", got ", options.page_size});
    }
    if (options.page_size == 0) options_.page_size = detail::kPageKeys;
    options_.page_size = std::max(detail::kLeastPageKeys,
                                  static_cast<Index>(std::bit_ceil(static_cast<std::size_t>(options_.page_size))));
  }

  /// As they were given, page_size as it became.
  const KvCacheOptions& options() const { return options_; }
  /// The window as a mask, of all tokens where there is none: both(mask, cache.window_mask()) is what a query sees.
  SlidingWindowMask window_mask() const { return {options_.window.value_or(std::numeric_limits<Index>::max())}; }
  /// How many tokens have been fed: the position of the next one.
  Index position() const { return position_; }
  /// How many of them are still there to be seen: all, or at most the window.
  Index size() const { return std::min(position_, options_.window.value_or(position_)); }
  /// Whether no token was ever fed.
  bool empty() const { return position_ == 0; }
  /// Bytes of keys and values held, room that is not yet used and pages shared with forks included.
  std::size_t memory_bytes() const {
    if (pages_.empty()) return 0;  // which has no shape yet
    return pages_.size() * static_cast<std::size_t>(shape_.template size<Stored>()) * sizeof(Stored);
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
  void clear() noexcept { position_ = dropped_ = longest_chunk_ = 0; }

  /// Until release() is called as often, a window keeps what it passes, so that truncate() finds it: for what consists
  /// of several calls, one of which may fail.
  void hold() noexcept { ++holds_; }
  /// Ends what hold() began.
  void release() noexcept {
    --holds_;
    drop_passed();
  }

  // What layers do, in this order. `where` names the layer in messages.

  /// The shape of such tokens' pages. Throws ShapeError unless what is there has the same.
  template <typename Scalar>
  PageShape check_shape(const char* where, Index heads, Index key_maps, Index d, Index dv) const {
    static_assert(sizeof(Storage) <= sizeof(Scalar), "diffattn: a cache must not be wider than the layer's scalar");
    const PageShape shape{heads, key_maps, d, dv, detail::Tile<detail::ArithmeticOf<Scalar>>::kCols, page_size()};
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
    Index room = std::max(held + tokens, options_.reserve);
    if (fills_window(tokens)) room = std::max(room, tokens_kept(longest_chunk(tokens)));
    check_memory(where, room);
    while (page_count() * page_size() < room) pages_.push_back(std::make_shared<Page>(shape_));
    for (Index page = held / page_size(); page * page_size() < held + tokens; ++page) own(page, held);
  }

  /// Packs keys (tokens x heads·key_maps·d) and values (tokens x heads·dv) behind what is there.
  template <typename Scalar, Executor E>
  void write(const StridedView<const Scalar>& k, const StridedView<const Scalar>& v, E& executor) {
    const Index held = position_ - dropped_, size = page_size(), first_page = held / size, heads = shape_.heads;
    const Index pages = detail::divide_up(held + k.rows, size) - first_page;
    executor.run(pages * heads, [&](Index task, Index /*worker*/) {
      const Index page = first_page + task / heads, head = task % heads, width = shape_.key_maps * shape_.d;
      const Index begin = std::max(held, page * size), end = std::min(held + k.rows, (page + 1) * size);
      pack_into_page(*pages_[static_cast<std::size_t>(page)], shape_, head, begin - page * size,
                     k.block(begin - held, head * width, end - begin, width),
                     v.block(begin - held, head * shape_.dv, end - begin, shape_.dv));
    });
  }

  /// What is there and `written` tokens behind it, for the kernels of decode.hpp.
  KeyValuePages<Storage> packed(Index written = 0) const {
    KeyValuePages<Storage> pages{pages_.data(), shape_, position_ - dropped_ + written, dropped_};
    // From half of the window on scratch is taken for all of it: it is there before the window is full.
    if (options_.window && position_ + written >= *options_.window / 2) {
      pages.most_seen = *options_.window - 1 + written;
    }
    return pages;
  }

  /// Makes what was written part of the cache, and drops what the window has left behind.
  void commit(Index written) noexcept {
    if (fills_window(written)) longest_chunk_ = longest_chunk(written);
    position_ += written;
    drop_passed();
  }

 private:
  using Page = detail::Page<Storage>;
  using Stored = detail::StoredAs<Storage>;

  void drop_passed() noexcept {
    if (holds_ != 0) return;
    const Index passed = (first_visible(position_) - dropped_) / page_size();
    if (passed == 0) return;
    std::rotate(pages_.begin(), pages_.begin() + passed, pages_.end());
    dropped_ += passed * page_size();
    const Index keep = detail::divide_up(std::max(tokens_kept(longest_chunk_), options_.reserve), page_size());
    if (keep < page_count()) pages_.erase(pages_.begin() + keep, pages_.end());
  }

  /// Whether the window is full once so many more tokens are there.
  bool fills_window(Index tokens) const { return options_.window && position_ + tokens >= *options_.window; }

  /// The longest chunk that memory is kept for if the next one has so many tokens.
  Index longest_chunk(Index tokens) const {
    return tokens > *options_.window ? longest_chunk_ : std::max(longest_chunk_, tokens);
  }

  /// Room that a full window keeps, for chunks of up to `chunk` tokens: there may be a page less one token in front of
  /// what the next query sees, which are the window less one token.
  Index tokens_kept(Index chunk) const {
    const Index most = *options_.window - 1 + page_size() - 1 + std::max(page_size(), chunk);
    return options_.max_tokens == 0 ? most : std::min(most, options_.max_tokens);
  }

  Index page_size() const { return options_.page_size; }

  /// Refuses room for more tokens than there is memory for. Taken page by page, a system that promises more than it has
  /// would go on until it ends the program; asked for all of it at once, it says no.
  void check_memory(const char* where, Index tokens) const {
    constexpr Index kManyPages = 64;
    constexpr Index kMostBytes = Index{1} << 40;
    const Index page_bytes = shape_.template size<Stored>() * static_cast<Index>(sizeof(Stored));
    if (tokens > kMostBytes / page_bytes * page_size()) {
      detail::throw_invalid({where, ": a cache for ", tokens, " tokens would take more than ", kMostBytes, " bytes"});
    }
    const Index missing = detail::divide_up(tokens, page_size()) - page_count();
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
    if (page * page_size() < held) {
      std::copy_n(shared->data.get(), shape_.template size<Stored>(), copy->data.get());
      copy->finite_values = shared->finite_values;
    }
    shared = std::move(copy);
  }

  KvCacheOptions options_;
  PageShape shape_;
  std::vector<std::shared_ptr<Page>> pages_;  // the first holds position dropped_
  Index position_ = 0;
  Index dropped_ = 0;        // positions that the window has left behind, whole pages
  Index longest_chunk_ = 0;  // that came to a full window
  Index holds_ = 0;          // calls of hold() without their release()
};

}  // namespace diffattn::inline v0_1
