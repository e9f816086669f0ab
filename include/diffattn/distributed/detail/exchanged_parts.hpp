#pragma once

// The numbers that ranks exchange to attend to the keys of all of them. A rank that has failed sends a sum that no
// softmax has, and behind the first phase a result that is NaN, so that nothing but the numbers has to be sent. What it
// takes to send them is found before, on all ranks together: who lacks memory for anything else can still say so.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <exception>
#include <limits>
#include <span>
#include <vector>

#include "diffattn/core/matrix.hpp"
#include "diffattn/distributed/collective_check.hpp"
#include "diffattn/distributed/detail/collective_calls.hpp"
#include "diffattn/distributed/detail/error_text.hpp"
#include "diffattn/kernels/partial_attention.hpp"
#include "diffattn/kernels/softmax_statistics.hpp"

namespace diffattn::inline v0_1::detail {

/// What a rank has of one call, kept from one to the next.
template <typename Scalar>
struct PartScratch {
  PartialAttention<Scalar> part;
  DiffSoftmaxStatistics<Scalar> statistics;
};

/// Memory for what is exchanged, and how the next exchange is answered by a rank that cannot take its part in it.
template <typename C>
struct ExchangeRoom {
  /// What an exchange takes for a row: of this room, and of a result that the communicator adds up.
  struct Need {
    Index bytes = 0, reduced = 0;
  };
  using Answer = void (*)(C&, ExchangeRoom&, Index rows, const std::exception_ptr&);

  /// Finds memory for exchanges of so many rows that need as much a row. For a check on all ranks, which then set `rows`
  /// and `a_row`.
  void find_memory(C& communicator, Index of_rows, const Need& need) {
    const auto bytes = static_cast<std::size_t>(of_rows * need.bytes);
    if (memory.size() * sizeof(std::max_align_t) < bytes) memory.resize(bytes / sizeof(std::max_align_t) + 1);
    counts.reserve(static_cast<std::size_t>(communicator.size()));
    reserve_in(communicator, of_rows * need.reduced);
  }
  bool fits(Index of_rows, const Need& need) const {
    return of_rows <= rows && need.bytes <= a_row.bytes && need.reduced <= a_row.reduced;
  }

  std::vector<std::max_align_t> memory;
  std::vector<Index> counts;
  Index rows = 0;  ///< that there is room for, on all ranks
  Need a_row;
  Answer answer = nullptr;  ///< of the last exchange; null: there was none
  Index heads = 0;          ///< of the last exchange
  Index numbers = 0;        ///< of a rank, a row
  Index exchanges = 0;      ///< made since the last feed() or within with_others()
  bool failed_on_all = false;
};

template <typename Scalar, typename C>
class PartExchange {
 public:
  PartExchange(C& communicator, ExchangeRoom<C>& room, const char* where, Index rows, Index heads, Index cols)
      : communicator_(communicator),
        room_(room),
        where_(where),
        rows_(rows),
        size_(rows * heads),
        heads_(heads),
        cols_(cols) {}

  /// Collective. compute() leaves this rank's part in `part`; afterwards it is that of all ranks.
  template <typename Compute>
  void run_one_phase(PartialAttention<Scalar>& part, const Compute& compute) {
    begin(2 * heads_ + cols_, 0);
    const std::exception_ptr error = error_of(compute);
    const Index width = heads_ == 0 ? 0 : cols_ / heads_;
    if (error == nullptr) {
      write(mine(), part.statistics);
      std::copy_n(part.out.data(), size_ * width, mine() + 2 * size_);
    }
    gather(error);
    merge_into(part.statistics, 0);
    part.out.setZero();
    for (Index i = 0; i < size_; ++i) {
      for (Index rank = 0; rank < communicator_.size(); ++rank) {
        const Scalar *const from = of_rank(rank), part_m = from[i], part_l = from[size_ + i];
        if (part_l == Scalar(0)) continue;
        const Scalar share = part_l * std::exp(part_m - part.statistics.m.data()[i]) / part.statistics.l.data()[i];
        for (Index c = 0; c < width; ++c) part.out.data()[i * width + c] += share * from[2 * size_ + i * width + c];
      }
    }
  }

  /// Collective. compute(share, meet) calls meet(statistics) with those of this rank's keys, goes on with those of all,
  /// and leaves its share of the result in `share`. Returns the sum of all.
  template <typename Compute>
  MatrixMap<Scalar> run_two_phases(const Compute& compute) {
    begin(4 * heads_, cols_);
    MatrixMap<Scalar> share(all_ + communicator_.size() * count_, rows_, cols_);
    bool met = false;
    const auto meet = [&](DiffSoftmaxStatistics<Scalar>& statistics) {
      met = true;
      write(mine(), statistics.first);
      write(mine() + 2 * size_, statistics.second);
      gather(nullptr);
      merge_into(statistics.first, 0);
      merge_into(statistics.second, 2 * size_);
    };
    const std::exception_ptr error = error_of([&] { compute(share, meet); });
    if (error != nullptr && room_.failed_on_all) std::rethrow_exception(error);
    if (!met) gather(error);
    add_up(share, error);
    return share;
  }

  /// Collective: what a rank does in the place of an exchange of so many rows like the last one.
  static void answer(C& communicator, ExchangeRoom<C>& room, Index rows, const std::exception_ptr& error) {
    PartExchange exchange(communicator, room, "attention", rows, room.heads, 0);
    exchange.begin_gather(room.numbers);
    exchange.gather(error);
  }

 private:
  /// Room for `numbers` numbers a row of every rank, and for as many of the result as are added up.
  void begin(Index numbers, Index reduced) {
    const Index size = communicator_.size(), bytes = sizeof(Scalar);
    room_.failed_on_all = false;
    const typename ExchangeRoom<C>::Need need{(size * numbers + reduced) * bytes, reduced * bytes};
    if (!room_.fits(rows_, need)) {
      room_.failed_on_all = true;
      check_on_all(communicator_, where_, [&](Agreed& agreed) {
        agreed.add("rows", rows_);
        agreed.add("heads", heads_);
        agreed.add("columns", cols_);
        room_.find_memory(communicator_, rows_, need);
      });
      room_.failed_on_all = false;
      room_.rows = rows_;
      room_.a_row = need;
    }
    room_.heads = heads_;
    room_.numbers = numbers;
    room_.answer = &PartExchange::answer;
    begin_gather(numbers);
  }
  void begin_gather(Index numbers) {
    count_ = rows_ * numbers;
    all_ = reinterpret_cast<Scalar*>(room_.memory.data());
    room_.counts.assign(static_cast<std::size_t>(communicator_.size()), count_);
  }
  Scalar* mine() { return all_ + communicator_.rank() * count_; }
  const Scalar* of_rank(Index rank) const { return all_ + rank * count_; }

  void write(Scalar* to, const SoftmaxStatistics<Scalar>& statistics) const {
    std::copy_n(statistics.m.data(), size_, to);
    std::copy_n(statistics.l.data(), size_, to + size_);
  }

  /// Throws on all ranks if one of them has failed.
  void gather(const std::exception_ptr& error) {
    if (error != nullptr) std::fill_n(mine(), count_, kFailed);
    communicator_.all_gather(std::span<const Scalar>(mine(), static_cast<std::size_t>(count_)),
                             std::span<Scalar>(all_, static_cast<std::size_t>(communicator_.size() * count_)),
                             std::span<const Index>(room_.counts));
    ++room_.exchanges;
    bool failed = error != nullptr;
    for (Index rank = 0; rank < communicator_.size(); ++rank) failed |= size_ > 0 && of_rank(rank)[size_] == kFailed;
    if (failed) throw_on_all(error);
  }

  /// The sum of all shares; that of a rank which has failed is NaN, and then all ask who it was.
  void add_up(MatrixMap<Scalar>& share, const std::exception_ptr& error) {
    if (error != nullptr) share.setConstant(std::numeric_limits<Scalar>::quiet_NaN());
    communicator_.all_reduce(std::span<Scalar>(share.data(), static_cast<std::size_t>(share.size())));
    if (error != nullptr || share.hasNaN()) throw_on_all(error);
  }

  /// Throws on all ranks what one of them has thrown.
  void throw_on_all(const std::exception_ptr& error) {
    room_.failed_on_all = true;
    check_on_all(communicator_, where_, [&] { rethrow_if_any(error); });
    room_.failed_on_all = false;
  }

  /// From the numbers of all ranks, `offset` behind the first of each.
  void merge_into(SoftmaxStatistics<Scalar>& statistics, Index offset) const {
    for (Index i = 0; i < size_; ++i) {
      merge_row(statistics.m.data()[i], statistics.l.data()[i], Index{communicator_.size()}, [&](Index rank) {
        const Scalar* const from = of_rank(rank) + offset;
        return RowOfStatistics<Scalar>{from[i], from[size_ + i]};
      });
    }
  }

  static constexpr Scalar kFailed = -1;  // where l is, which is no less than 0

  C& communicator_;
  ExchangeRoom<C>& room_;
  const char* where_;
  Index rows_;
  Index size_;  // rows · heads
  Index heads_;
  Index cols_;
  Index count_ = 0;  // numbers of a rank
  Scalar* all_ = nullptr;
};

}  // namespace diffattn::inline v0_1::detail
