#pragma once

// Data parallel training on any communicator.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <diffattn/distributed/data_parallel.hpp>
#include <diffattn/layers/linear.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/batch_sampler.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <diffattn/training/gradient_norm.hpp>
#include <string>
#include <vector>

#include "distributed/expect.hpp"
#include "support/parameters_of.hpp"

namespace data_parallel_cases {

using diffattn::Communicator;
using diffattn::Index;
using support::expect;
using Model = diffattn::Decoder<float, diffattn::MultiheadDiffAttention<float>>;

struct Trained {
  std::vector<double> losses;
  std::vector<double> parameters;
};

/// Six steps on six sequences of 12 tokens each. Some targets are ignored: more of the first sequences than of the last,
/// so that ranks differ in how many count.
template <Communicator C>
Trained train(C& communicator) {
  std::vector<std::uint8_t> text;
  for (int i = 0; i < 600; ++i) text.push_back(static_cast<std::uint8_t>((i * i / 3 + i) % 11));
  Model model({.vocab_size = 11,
               .num_layers = 1,
               .hidden_dim = 24,
               .attention = {.embed_dim = 16, .num_heads = 1, .rotary = diffattn::RotaryConfig{}},
               .seed = 7 + static_cast<std::uint64_t>(communicator.rank())});
  diffattn::broadcast_parameters(communicator, model);
  diffattn::AdamW<float> optimizer(model, {.learning_rate = 0.01});
  diffattn::BatchSampler<std::uint8_t> sampler(
      text, {.length = 12, .batch_size = 6, .seed = 3, .rank = communicator.rank(), .num_ranks = communicator.size()});
  Model gradient = zeros_like(model);
  diffattn::Workspace workspace;
  Model::Tape tape;
  diffattn::Batch batch;
  Trained trained;
  for (int step = 0; step < 6; ++step) {
    sampler.next(batch);
    for (std::size_t i = 0; i < batch.targets.size(); ++i) {
      if (batch.targets[i] < 3 && batch.inputs[i] % 2 == 0) batch.targets[i] = diffattn::kIgnoreTarget;
    }
    diffattn::Matrix<float> logits = model.logits(batch.inputs, batch.lengths, tape);
    const auto loss = cross_entropy_into(logits, logits, batch.targets, diffattn::kIgnoreTarget, workspace);
    set_zero(gradient);
    model.backward(logits, tape, gradient);
    average_gradients(communicator, gradient, loss.count);
    clip_gradient_norm(gradient, 0.5);
    optimizer.step(model, gradient);
    trained.losses.push_back(diffattn::weighted_mean(communicator, loss.mean, static_cast<double>(loss.count)));
  }
  trained.parameters = support::parameters_of(model);
  return trained;
}

template <Communicator C>
void learns_what_one_rank_learns(C& communicator) {
  const Trained several = train(communicator), again = train(communicator);
  expect(several.losses == again.losses && several.parameters == again.parameters, "the same bits every time");
  diffattn::SelfCommunicator self;
  const Trained alone = train(self);
  for (std::size_t i = 0; i < alone.losses.size(); ++i) {
    expect(std::abs(several.losses[i] - alone.losses[i]) < 2e-5 * alone.losses[i],
           "a loss of " + std::to_string(alone.losses[i]) + " at step " + std::to_string(i) + ", got " +
               std::to_string(several.losses[i]));
  }
  expect(alone.losses.back() < alone.losses.front() - 0.05, "a loss that falls");
  // All ranks have the same parameters.
  std::vector<double> largest = several.parameters, smallest = several.parameters;
  for (double& value : smallest) value = -value;
  communicator.all_reduce(std::span<double>(largest), diffattn::Reduction::max);
  communicator.all_reduce(std::span<double>(smallest), diffattn::Reduction::max);
  for (double& value : smallest) value = -value;
  expect(largest == several.parameters && smallest == several.parameters, "the same parameters on all ranks");
}

/// A model whose parameters fill several buckets, with one that is larger than a bucket.
struct Large {
  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visitor("small", self.small);
    visitor("large", self.large);
    visitor("half", self.half);
    visitor("double", self.in_double);
    visitor("other_half", self.other_half);
    visitor("empty", self.empty);
    visitor("last", self.last);
  }

  static constexpr Index kBucket = diffattn::detail::ParameterBucket<float>::kBucket;
  diffattn::Matrix<float> small{2, 3}, large{1, kBucket}, half{1, kBucket / 2 + 1}, other_half{1, kBucket / 2 + 1};
  diffattn::Matrix<double> in_double{3, 3};
  diffattn::Vector<float> empty{0}, last{5};
};

template <Communicator C>
void sums_every_parameter(C& communicator) {
  Large gradient;
  const auto rank = static_cast<double>(communicator.rank()), size = static_cast<double>(communicator.size());
  diffattn::visit_parameters(gradient, [&](std::string_view, auto& p) {
    using Scalar = typename std::decay_t<decltype(p)>::Scalar;
    for (Index i = 0; i < p.size(); ++i) p.data()[i] = static_cast<Scalar>((rank + 1) * static_cast<double>(i % 1001));
  });
  const auto expect_times = [&](double factor, const char* what) {
    diffattn::visit_parameters(gradient, [&](std::string_view name, const auto& p) {
      Index wrong = 0;
      for (Index i = 0; i < p.size(); ++i) {
        const double expected = factor * static_cast<double>(i % 1001), got = static_cast<double>(p.data()[i]);
        wrong += std::abs(got - expected) <= 1e-6 * expected ? 0 : 1;
      }
      expect(wrong == 0, std::string(what) + " in " + std::string(name));
    });
  };
  diffattn::sum_gradients(communicator, gradient);
  expect_times(size * (size + 1) / 2, "the sum");
  // Weight r of rank r, except that a single rank has 1.
  diffattn::average_gradients(communicator, gradient, size == 1 ? 1 : communicator.rank());
  expect_times(size * (size + 1) / 2, "the mean of what is the same everywhere");
}

template <Communicator C>
void errors_reach_all_ranks(C& communicator) {
  if (communicator.size() == 1) return;
  const Index rank = communicator.rank();
  diffattn::Linear<float> layer(3, rank == 1 ? 2 : 4);
  const std::string shapes = ": ranks disagree on how many numbers the parameters have: rank 0 has 12, rank 1 has 6";
  expect(support::said_by([&] { sum_gradients(communicator, layer); }) == "sum_gradients" + shapes, "an error");
  expect(support::said_by([&] { broadcast_parameters(communicator, layer); }) == "broadcast_parameters" + shapes,
         "an error");
  diffattn::Linear<float> turned(rank == 1 ? 4 : 3, rank == 1 ? 3 : 4);
  expect(support::said_by([&] { average_gradients(communicator, turned); }) ==
             "average_gradients: ranks disagree on the names and shapes of the parameters",
         "an error");
  diffattn::Linear<float> good(3, 4);
  const std::string negative = "average_gradients: a weight must be 0 or more, got -1";
  expect(support::said_by([&] { average_gradients(communicator, good, rank == 1 ? -1 : 1); }) ==
             (rank == 1 ? negative : "rank 1: " + negative),
         "an error");
  expect(support::said_by([&] { average_gradients(communicator, good, 0); }) ==
             "average_gradients: the weights of all ranks are 0",
         "an error");
  expect(support::said_by([&] { diffattn::weighted_mean(communicator, 1, 0); }) ==
             "weighted_mean: the weights of all ranks are 0",
         "an error");
  const std::string full = support::said_by(
      [&] { diffattn::on_rank_0(communicator, "save", [] { throw std::runtime_error("the disk is full"); }); });
  expect(full == (rank == 0 ? "the disk is full" : "rank 0: the disk is full"), "an error, got " + full);
}

template <Communicator C>
void rank_0_alone(C& communicator) {
  Index calls = 0;
  diffattn::on_rank_0(communicator, "count", [&] { ++calls; });
  expect(calls == (communicator.rank() == 0 ? 1 : 0), "a call on rank 0 only");
}

template <Communicator C>
void all_of_them(C& communicator) {
  learns_what_one_rank_learns(communicator);
  errors_reach_all_ranks(communicator);
  rank_0_alone(communicator);
}

}  // namespace data_parallel_cases
