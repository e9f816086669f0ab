#pragma once

// Memory that is fetched a few rows at a time while something else is computed, so that nobody waits for it.
//
//   PrefetchedRows rows(view);   rows.advance(i, n)   has asked for the first i of n equal parts after the call
//
// A request is a hint: nothing is read, and rows that do not exist may be asked for.

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/simd.hpp"

namespace diffattn::inline v0_1::detail {

/// The rows of a matrix; where they are not contiguous they are left to the hardware.
class PrefetchedRows {
 public:
  PrefetchedRows() = default;
  template <typename T>
  explicit PrefetchedRows(const StridedView<T>& rows)
      : data_(reinterpret_cast<const char*>(rows.data)),
        row_stride_(rows.row_stride * static_cast<Index>(sizeof(T))),
        row_size_(rows.cols * static_cast<Index>(sizeof(T))),
        rows_(rows.col_stride == 1 ? rows.rows : 0) {}

  /// Asks for the first part / parts of all rows, less what has been asked for.
  void advance(Index part, Index parts) {
    for (const Index end = rows_ * part / parts; asked_ < end; ++asked_) {
      const char* const row = data_ + asked_ * row_stride_;
      for (Index at = 0; at < row_size_; at += 64) simd::prefetch(row + at);
    }
  }

 private:
  const char* data_ = nullptr;
  Index row_stride_ = 0;  // bytes
  Index row_size_ = 0;
  Index rows_ = 0;
  Index asked_ = 0;
};

}  // namespace diffattn::inline v0_1::detail
