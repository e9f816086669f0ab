#pragma once

// Data parallel training: every rank has the whole model and its part of each batch, and the gradients add up.
//
//   broadcast_parameters(communicator, model);                        // once: the weights of rank 0 on every rank
//   BatchSampler sampler(tokens, {.length = 256, .batch_size = 8, .rank = communicator.rank(),
//                                 .num_ranks = communicator.size()});
//   …                                                                 // a step: forward, loss, backward, as alone
//   average_gradients(communicator, gradient, loss.count);            // then clip and step, the same on every rank
//   on_rank_0(communicator, "save", [&] { save_checkpoint(model, optimizer, path, {.windows_drawn = sampler.drawn}); });
//
// Works for whatever visit_parameters visits: a layer, a model, an optimizer's moments. All functions are collective:
// every rank calls them, in the same order.
//
// Order    every number is added up in the order of the ranks, so that the same ranks give the same bits, and the same
//          ones on each rank: models that begin equal stay equal. Against one rank sums are rounded differently.
// Errors   std::invalid_argument on every rank, before anything is changed, if their parameters differ in name or shape.
//          So is a lack of memory on one of them.
// Bytes    about 2 · (size − 1) / size numbers a parameter and rank, in buckets: small parameters travel together.
// Memory   a bucket of at most kBucket numbers here, and as much in the communicator, or as the largest parameter has.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/distributed/collective_check.hpp"
#include "diffattn/distributed/communicator.hpp"
#include "diffattn/layers/parameters.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// The parameters of a model, as memory: those that have at least kBucket numbers are exchanged where they are, and all
/// others are gathered in a bucket and put back.
template <typename Scalar>
class ParameterBucket {
 public:
  static constexpr Index kBucket = Index{1} << 22;

  void add(Scalar* values, Index count) {
    parameters_.push_back({values, static_cast<std::size_t>(count)});
    if (count < kBucket) bucket_size_ = std::min(bucket_size_ + count, kBucket);
    largest_ = std::max(largest_, count);
  }

  /// Finds all memory that is needed, here and in the communicator.
  template <Communicator C>
  void allocate(C& communicator) {
    bucket_.reserve(static_cast<std::size_t>(bucket_size_));
    reserve_in(communicator, std::max(bucket_size_, largest_) * static_cast<Index>(sizeof(Scalar)));
  }

  /// Replaces every number by the sum over the ranks of factor times it.
  template <Communicator C>
  void sum(C& communicator, Scalar factor) {
    const auto scale = [&](std::span<Scalar> values) {
      if (factor == Scalar(1)) return;
      for (Scalar& value : values) value *= factor;
    };
    std::size_t first = 0;  // of those in the bucket
    const auto empty_bucket = [&](std::size_t end) {
      communicator.all_reduce(std::span<Scalar>(bucket_));
      std::size_t at = 0;
      for (; first < end; ++first) {
        if (is_large(parameters_[first])) continue;
        std::copy_n(bucket_.begin() + static_cast<std::ptrdiff_t>(at), parameters_[first].size(),
                    parameters_[first].begin());
        at += parameters_[first].size();
      }
      bucket_.clear();
    };
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const std::span<Scalar> values = parameters_[i];
      scale(values);
      if (is_large(values)) {
        communicator.all_reduce(values);
        continue;
      }
      if (bucket_.size() + values.size() > static_cast<std::size_t>(kBucket)) empty_bucket(i);
      bucket_.insert(bucket_.end(), values.begin(), values.end());
    }
    empty_bucket(parameters_.size());
  }

 private:
  static bool is_large(std::span<const Scalar> values) { return static_cast<Index>(values.size()) >= kBucket; }

  std::vector<std::span<Scalar>> parameters_;
  std::vector<Scalar> bucket_;
  Index bucket_size_ = 0;
  Index largest_ = 0;
};

/// Both kinds of gradients that this library computes.
class GradientBuckets {
 public:
  /// Finds all parameters, and the memory for them.
  template <Communicator C, typename Model>
  void add_all(C& communicator, Model& gradient) {
    visit_parameters(gradient, [&](std::string_view /*name*/, auto& parameter) {
      using Scalar = typename std::decay_t<decltype(parameter)>::Scalar;
      static_assert(std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double>,
                    "diffattn: gradients are float or double");
      if constexpr (std::is_same_v<Scalar, float>) {
        floats_.add(parameter.data(), parameter.size());
      } else {
        doubles_.add(parameter.data(), parameter.size());
      }
    });
    floats_.allocate(communicator);
    doubles_.allocate(communicator);
  }

  template <Communicator C>
  void sum(C& communicator, double factor) {
    floats_.sum(communicator, static_cast<float>(factor));
    doubles_.sum(communicator, factor);
  }

 private:
  ParameterBucket<float> floats_;
  ParameterBucket<double> doubles_;
};

/// Names and shapes of all parameters: what ranks have to agree on.
template <typename Model>
void agree_on_parameters(const Model& model, Agreed& agreed) {
  std::string shapes;
  Index count = 0;
  visit_parameters(model, [&](std::string_view name, const auto& parameter) {
    using Scalar = typename std::decay_t<decltype(parameter)>::Scalar;
    shapes.append(name).append(" ").append(std::to_string(parameter.rows())).append(" x ");
    shapes.append(std::to_string(parameter.cols())).append(" x ").append(std::to_string(sizeof(Scalar))).append("\n");
    count += parameter.size();
  });
  agreed.add("how many numbers the parameters have", count);
  agreed.add("the names and shapes of the parameters", shapes);
}

}  // namespace detail

/// Calls f on rank 0 and returns on every rank once it has returned: for what happens once, such as writing a file. An
/// error of it is an error on every rank, as check_on_all says; `where` is the name of what is done.
template <Communicator C, typename F>
void on_rank_0(C& communicator, const char* where, F&& f) {
  check_on_all(communicator, where, [&] {
    if (Index{communicator.rank()} == 0) f();
  });
}

/// Gives every rank the parameters of rank 0: at the start, or after rank 0 has loaded a checkpoint.
template <Communicator C, typename Model>
void broadcast_parameters(C& communicator, Model& model) {
  check_on_all(communicator, "broadcast_parameters",
               [&](Agreed& agreed) { detail::agree_on_parameters(model, agreed); });
  visit_parameters(model, [&](std::string_view /*name*/, auto& parameter) {
    using Scalar = typename std::decay_t<decltype(parameter)>::Scalar;
    communicator.broadcast(std::span<Scalar>(parameter.data(), static_cast<std::size_t>(parameter.size())), 0);
  });
}

/// The mean of the ranks' values, each with its weight: of losses, by how many targets they are the mean of. The same
/// bits on every rank. Throws std::invalid_argument on every rank for weights that are not positive in sum, or negative.
template <Communicator C>
double weighted_mean(C& communicator, double value, double weight) {
  check_on_all(communicator, "weighted_mean", [&] {
    if (!(weight >= 0) || !std::isfinite(weight)) {
      detail::throw_invalid({"weighted_mean: a weight must be 0 or more, got ", std::to_string(weight).c_str()});
    }
  });
  double sums[2] = {weight == 0 ? 0 : weight * value, weight};
  communicator.all_reduce(std::span<double>(sums));
  if (sums[1] == 0) detail::throw_invalid({"weighted_mean: the weights of all ranks are 0"});
  return sums[0] / sums[1];
}

/// Replaces the gradient of every rank by the sum over the ranks, in one call after backward: for a loss that is a sum.
/// Throws as said above.
template <Communicator C, typename Model>
void sum_gradients(C& communicator, Model& gradient) {
  detail::GradientBuckets buckets;
  check_on_all(communicator, "sum_gradients", [&](Agreed& agreed) {
    detail::agree_on_parameters(gradient, agreed);
    buckets.add_all(communicator, gradient);
  });
  buckets.sum(communicator, 1);
}

/// Replaces the gradient of every rank by the weighted mean over the ranks, in one call after backward. `weight` is what
/// the rank's loss is a mean of, its number of targets (CrossEntropyLoss::count): the result is then the gradient of the
/// mean over all targets, however many each rank has. Throws as said above, and std::invalid_argument on every rank for
/// a weight that is negative, or if all are 0.
template <Communicator C, typename Model>
void average_gradients(C& communicator, Model& gradient, Index weight = 1) {
  detail::GradientBuckets buckets;
  check_on_all(communicator, "average_gradients", [&](Agreed& agreed) {
    if (weight < 0) detail::throw_invalid({"average_gradients: a weight must be 0 or more, got ", weight});
    detail::agree_on_parameters(gradient, agreed);
    buckets.add_all(communicator, gradient);
  });
  Index all = weight;
  communicator.all_reduce(std::span<Index>(&all, 1));
  if (all == 0) detail::throw_invalid({"average_gradients: the weights of all ranks are 0"});
  buckets.sum(communicator, static_cast<double>(weight) / static_cast<double>(all));
}

}  // namespace diffattn::inline v0_1
