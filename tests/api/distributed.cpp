// Several ranks as users write them: it has to compile, nothing of it runs.

#include <span>
#include <vector>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/distributed/cache_parallel.hpp"
#include "diffattn/distributed/collective_check.hpp"
#include "diffattn/distributed/communicator.hpp"
#include "diffattn/distributed/data_parallel.hpp"
#include "diffattn/distributed/generate_over_ranks.hpp"
#include "diffattn/distributed/sequence_parallel.hpp"
#include "diffattn/distributed/thread_communicator.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/training/batch_sampler.hpp"

namespace api {

using namespace diffattn;

template <Communicator C>
void communicator_calls(C& communicator) {
  std::vector<float> values(4), all(4 * static_cast<std::size_t>(communicator.size()));
  const std::vector<Index> counts(static_cast<std::size_t>(communicator.size()), 4);
  communicator.all_reduce(std::span(values));
  communicator.all_reduce(std::span(values), Reduction::max);
  communicator.all_gather(values, std::span(all));
  communicator.all_gather(values, std::span(all), counts);
  communicator.all_to_all(all, counts, std::span(all), counts);
  communicator.broadcast(std::span(values), communicator.rank());
  const std::uint64_t sent = communicator.bytes_sent();
  check_on_all(communicator, "check", [&](Agreed& agreed) { agreed.add("sent", sent); });
  check_on_all(communicator, "check", [] {});
}

template <Communicator C>
void data_parallel_calls(C& communicator, std::span<const std::uint8_t> tokens) {
  MultiheadDiffAttention<float> layer({.embed_dim = 16, .num_heads = 2});
  auto gradient = zeros_like(layer);
  BatchSampler<std::uint8_t> sampler(
      tokens, {.length = 8, .batch_size = 4, .rank = communicator.rank(), .num_ranks = communicator.size()});
  broadcast_parameters(communicator, layer);
  sum_gradients(communicator, gradient);
  average_gradients(communicator, gradient);
  average_gradients(communicator, gradient, 12);
  const double loss = weighted_mean(communicator, 1.5, 12);
  on_rank_0(communicator, "report", [&] { static_cast<void>(loss); });
}

template <Communicator C>
void sequence_parallel_calls(C& communicator, const Matrix<float>& x, Matrix<float>& y) {
  ThreadPool pool(2);
  const SequenceParallel on_pool(communicator, 64, pool);
  SequenceParallel ranks(communicator, 64);
  const SequencePlacement& placement = ranks.placement();
  y = placement.rows_of(x);
  const std::vector<Index> tokens = placement.elements_of(std::vector<Index>(64));
  Workspace workspace;
  attention_into(y, x, x, x, CausalMask{}, {}, workspace, ranks);
  multihead_attention_into(y, x, x, x, Heads{2, 1}, CausalMask{}, {}, workspace, ranks);
  diff_attention_into(y, x, x, x, x, x, 0.5f, CausalMask{}, {}, workspace, ranks);
  multihead_diff_attention_into(y, x, x, x, x, Heads{2, 1}, CausalMask{}, {}, workspace, ranks);
  multihead_attention_backward_into({y, y, y}, x, x, x, x, Heads{2, 1}, CausalMask{}, {}, workspace, ranks);
  multihead_diff_attention_backward_into({y, y, y, y}, x, x, x, x, x, Heads{2, 1}, CausalMask{}, {}, workspace, ranks);
  const MultiheadDiffAttention<float> layer({.embed_dim = 16, .num_heads = 2});
  layer.forward_into(y, x, CausalMask{}, workspace, ranks);
  y = ranks.gather(y);
  const Index pairs = placement.visible_pairs(CausalMask{}), owner = placement.rank_of(pairs % 64);
  static_cast<void>(owner);
  CacheParallel caches(communicator);
  KvCache<float> cache;
  layer.forward_into(y, x, cache, CausalMask{}, workspace, ranks);
  caches.prefilled(placement);
  caches.feed(1);
  layer.forward_into(y, x, cache, workspace, caches);
  caches.take_back();
  caches.take_back(32);
  cache.truncate(caches.kept_before(32));
}

template <Communicator C>
void text_calls(C& communicator) {
  const Decoder<float, MultiheadDiffAttention<float>> model(
      {.vocab_size = 16, .num_layers = 1, .hidden_dim = 8, .attention = {.embed_dim = 8, .num_heads = 1}});
  CacheParallel ranks(communicator);
  auto cache = model.make_cache();
  std::vector<Index> text = generate(model, {1, 2, 3}, {.max_new_tokens = 4}, ranks);
  text = generate(model, text, {.max_new_tokens = 4}, cache, ranks);
  text = generate(model, text, {.max_new_tokens = 4}, cache, CausalMask{}, ranks);
}

void ranks(std::span<const std::uint8_t> tokens) {
  SelfCommunicator self;
  communicator_calls(self);
  data_parallel_calls(self, tokens);
  run_ranks(4, [&](ThreadCommunicator& communicator) {
    communicator_calls(communicator);
    data_parallel_calls(communicator, tokens);
    Matrix<float> x(16, 16), y = x;
    sequence_parallel_calls(communicator, x, y);
    text_calls(communicator);
  });
}

}  // namespace api
