#pragma once

// The numbers that ranks exchange to attend to the keys of all of them. A rank that has failed sends a sum that no
// softmax has, so that nothing but the numbers has to be sent.

#include <algorithm>
#include <cmath>
#include <exception>
#include <span>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/distributed/collective_check.hpp"
#include "diffattn/kernels/partial_attention.hpp"
#include "diffattn/kernels/softmax_statistics.hpp"

namespace diffattn::inline v0_1::detail {

/// What a rank has of one call, kept from one to the next.
template <typename Scalar>
struct PartScratch {
  PartialAttention<Scalar> part;
  DiffSoftmaxStatistics<Scalar> statistics;
};

template <typename Scalar, typename C>
class PartExchange {
 public:
  PartExchange(C& communicator, const char* where, Index rows, Index heads, Workspace& workspace)
      : communicator_(communicator), where_(where), size_(rows * heads), heads_(heads), workspace_(workspace) {}

  /// Collective. compute() leaves this rank's part in `part`, of `cols` columns of results; afterwards it is that of all
  /// ranks.
  template <typename Compute>
  void run_one_phase(PartialAttention<Scalar>& part, Index cols, const Compute& compute) {
    std::exception_ptr error;
    try {
      compute();
    } catch (...) {
      error = std::current_exception();
    }
    const auto frame = workspace_.frame();
    const Index width = heads_ == 0 ? 0 : cols / heads_;
    Scalar* const mine = begin(size_ * (2 + width));
    if (error == nullptr) {
      write(mine, part.statistics);
      std::copy_n(part.out.data(), size_ * width, mine + 2 * size_);
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

  /// Collective. compute(meet) calls meet(statistics) with those of this rank's keys, and goes on with those of all.
  template <typename Compute>
  void run_two_phases(const Compute& compute) {
    bool met = false;
    std::exception_ptr error;
    const auto frame = workspace_.frame();
    Scalar* const mine = begin(4 * size_);
    const auto meet = [&](DiffSoftmaxStatistics<Scalar>& statistics) {
      met = true;
      write(mine, statistics.first);
      write(mine + 2 * size_, statistics.second);
      gather(nullptr);
      merge_into(statistics.first, 0);
      merge_into(statistics.second, 2 * size_);
    };
    try {
      compute(meet);
    } catch (...) {
      if (met) throw;
      error = std::current_exception();
    }
    if (error != nullptr) gather(error);
  }

 private:
  /// Room for the numbers of all ranks; returns that for this one's.
  Scalar* begin(Index count) {
    count_ = count;
    all_ = workspace_.take<Scalar>(communicator_.size() * count);
    counts_ = workspace_.take<Index>(communicator_.size());
    std::fill_n(counts_, communicator_.size(), count);
    return all_ + communicator_.rank() * count;
  }
  const Scalar* of_rank(Index rank) const { return all_ + rank * count_; }

  void write(Scalar* to, const SoftmaxStatistics<Scalar>& statistics) const {
    std::copy_n(statistics.m.data(), size_, to);
    std::copy_n(statistics.l.data(), size_, to + size_);
  }

  /// Throws on all ranks if one of them has failed.
  void gather(const std::exception_ptr& error) {
    Scalar* const mine = all_ + communicator_.rank() * count_;
    if (error != nullptr) std::fill_n(mine, count_, kFailed);
    communicator_.all_gather(std::span<const Scalar>(mine, static_cast<std::size_t>(count_)),
                             std::span<Scalar>(all_, static_cast<std::size_t>(communicator_.size() * count_)),
                             std::span<const Index>(counts_, static_cast<std::size_t>(communicator_.size())));
    bool failed = error != nullptr;
    for (Index rank = 0; rank < communicator_.size(); ++rank) failed |= size_ > 0 && of_rank(rank)[size_] == kFailed;
    if (!failed) return;
    check_on_all(communicator_, where_, [&] {
      if (error != nullptr) std::rethrow_exception(error);
    });
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
  const char* where_;
  Index size_;  // rows · heads
  Index heads_;
  Workspace& workspace_;
  Index count_ = 0;  // numbers of a rank
  Scalar* all_ = nullptr;
  Index* counts_ = nullptr;
};

}  // namespace diffattn::inline v0_1::detail
