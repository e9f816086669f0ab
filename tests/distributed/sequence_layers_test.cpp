// Layers and a decoder whose rows are spread over ranks: what one rank computes, forward and backward.

#include "diffattn/distributed/sequence_parallel.hpp"
#include "diffattn/distributed/thread_communicator.hpp"
#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/multihead_diff_attention_v2.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/models/decoder.hpp"
#include "distributed/expect.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

using namespace support;
using diffattn::CausalMask;
using diffattn::Index;
using diffattn::Matrix;
using diffattn::SequenceParallel;
using diffattn::ThreadCommunicator;
using diffattn::Workspace;

namespace {

/// All parameters of a layer or model, one behind the other.
template <typename Module>
std::vector<double> numbers_of(const Module& module) {
  std::vector<double> numbers;
  diffattn::visit_parameters(module, [&](std::string_view, const auto& matrix) {
    numbers.insert(numbers.end(), matrix.data(), matrix.data() + matrix.size());
  });
  return numbers;
}

/// The gradients of the parameters are shares: over all ranks they add up.
template <typename Module>
void add_up(ThreadCommunicator& communicator, Module& grad) {
  diffattn::visit_parameters(grad, [&](std::string_view, auto& matrix) {
    communicator.all_reduce(std::span<double>(matrix.data(), static_cast<std::size_t>(matrix.size())));
  });
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

template <typename Layer>
void check_layer(const typename Layer::Config& config) {
  constexpr Index kRows = 41;
  const Layer layer(config);
  Rng rng = make_rng();
  const auto x = random_matrix<double>(kRows, config.embed_dim, rng),
             dy = random_matrix<double>(kRows, config.embed_dim, rng);
  typename Layer::Tape tape;
  const Matrix<double> y = layer.forward(x, CausalMask{}, tape);
  Layer grad = diffattn::zeros_like(layer);
  const Matrix<double> dx = layer.backward(dy, tape, grad);
  for (const Index size : {1, 3}) {
    INFO(size << " ranks");
    diffattn::run_ranks(size, [&](ThreadCommunicator& communicator) {
      SequenceParallel ranks(communicator, kRows);
      const auto& placement = ranks.placement();
      Workspace workspace;
      typename Layer::Tape my_tape;
      Layer my_grad = diffattn::zeros_like(layer);
      Matrix<double> my_y(placement.mine(), config.embed_dim), my_dx(placement.mine(), config.embed_dim);
      layer.forward_into(my_y, placement.rows_of(x), CausalMask{}, workspace, ranks);
      const Matrix<double> without_tape = ranks.gather(my_y);
      layer.forward_into(my_y, placement.rows_of(x), CausalMask{}, my_tape, workspace, ranks);
      layer.backward_into(my_dx, placement.rows_of(dy), my_tape, my_grad, workspace, ranks);
      const Matrix<double> all_y = ranks.gather(my_y), all_dx = ranks.gather(my_dx);
      add_up(communicator, my_grad);
      if (communicator.rank() != 0) return;
      CHECK(without_tape == all_y);
      CHECK((all_y - y).cwiseAbs().maxCoeff() <= 1e-13);
      CHECK((all_dx - dx).cwiseAbs().maxCoeff() <= 1e-12);
      CHECK(largest_difference(numbers_of(my_grad), numbers_of(grad)) <= 1e-11);
    });
  }
}

}  // namespace

TEST_CASE("Layers over ranks are those of one", "[distributed]") {
  check_layer<diffattn::MultiheadAttention<double>>(
      {.embed_dim = 16, .num_heads = 4, .num_kv_heads = 2, .rotary = diffattn::RotaryConfig{}});
  check_layer<diffattn::MultiheadDiffAttention<double>>(
      {.embed_dim = 16, .num_heads = 4, .num_kv_heads = 1, .num_noise_heads = 2, .rotary = diffattn::RotaryConfig{}});
  check_layer<diffattn::MultiheadDiffAttentionV2<double>>(
      {.embed_dim = 16, .num_heads = 2, .num_kv_heads = 1, .rotary = diffattn::RotaryConfig{}});
}

TEST_CASE("A decoder over ranks is that of one", "[distributed]") {
  using Decoder = diffattn::Decoder<double, diffattn::MultiheadDiffAttention<double>>;
  constexpr Index kTokens = 30;
  const Decoder decoder({.vocab_size = 23,
                         .num_layers = 2,
                         .hidden_dim = 24,
                         .attention = {.embed_dim = 16, .num_heads = 2, .rotary = diffattn::RotaryConfig{}}});
  std::vector<Index> tokens;
  for (Index i = 0; i < kTokens; ++i) tokens.push_back(7 * i % 23);
  Rng rng = make_rng(1);
  const auto dlogits = random_matrix<double>(kTokens, 23, rng);
  typename Decoder::Tape tape;
  const Matrix<double> logits = decoder.logits(tokens, {kTokens}, tape);
  Decoder grad = diffattn::zeros_like(decoder);
  decoder.backward(dlogits, tape, grad);
  for (const bool recompute : {false, true}) {
    diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
      SequenceParallel ranks(communicator, kTokens);
      const auto& placement = ranks.placement();
      Workspace workspace;
      typename Decoder::Tape my_tape;
      my_tape.recompute = recompute;
      Decoder my_grad = diffattn::zeros_like(decoder);
      Matrix<double> mine(placement.mine(), 23);
      const auto my_tokens = placement.elements_of(tokens);
      decoder.logits_into(mine, my_tokens, CausalMask{}, workspace, ranks);
      const Matrix<double> without_tape = ranks.gather(mine);
      decoder.logits_into(mine, my_tokens, {placement.mine()}, my_tape, workspace, ranks);
      decoder.backward(placement.rows_of(dlogits), my_tape, my_grad, workspace, ranks);
      const Matrix<double> all = ranks.gather(mine);
      add_up(communicator, my_grad);
      if (communicator.rank() != 0) return;
      CHECK(without_tape == all);
      CHECK((all - logits).cwiseAbs().maxCoeff() <= 1e-12);
      CHECK(largest_difference(numbers_of(my_grad), numbers_of(grad)) <= 1e-11);
    });
  }
}

TEST_CASE("What is wrong with a layer's or a model's arguments on one rank is an error on all", "[distributed]") {
  using Decoder = diffattn::Decoder<double, diffattn::MultiheadDiffAttention<double>>;
  const Decoder decoder(
      {.vocab_size = 5, .num_layers = 1, .hidden_dim = 8, .attention = {.embed_dim = 8, .num_heads = 1}});
  const auto& layer = decoder.blocks[0].attention;
  const auto errors_of = [](const auto& call) {
    std::vector<std::string> errors(2);
    diffattn::run_ranks(2, [&](ThreadCommunicator& communicator) {
      SequenceParallel ranks(communicator, 6);
      Workspace workspace;
      errors[static_cast<std::size_t>(communicator.rank())] =
          said_by([&] { call(ranks, communicator.rank() == 1, workspace); });
    });
    return errors;
  };
  using Errors = std::vector<std::string>;
  const Errors rows = errors_of([&](auto& ranks, bool odd, Workspace& workspace) {
    const Matrix<double> x = Matrix<double>::Ones(odd ? 2 : 3, 8);
    Matrix<double> y = x;
    layer.forward_into(y, x, CausalMask{}, workspace, ranks);
  });
  const std::string of_rows =
      "MultiheadDiffAttention: ranks share one sequence, of which this one has 3 rows; got 1 sequence of 2";
  CHECK(rows == Errors{"rank 1: " + of_rows, of_rows});
  const Errors tokens = errors_of([&](auto& ranks, bool odd, Workspace& workspace) {
    Matrix<double> y(3, 5);
    decoder.logits_into(y, std::vector<Index>{1, 2, odd ? 5 : 3}, CausalMask{}, workspace, ranks);
  });
  const std::string of_tokens = "Decoder: token 2 is 5, outside the vocabulary of 5";
  CHECK(tokens == Errors{"rank 1: " + of_tokens, of_tokens});
}
