#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <diffattn/models/decoder.hpp>

#include "diffattn/core/parallel_threads.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

using diffattn::Decoder;
using diffattn::Index;
using diffattn::Matrix;
using diffattn::MultiheadAttention;
using diffattn::MultiheadDiffAttention;
using diffattn::MultiheadDiffAttentionV2;
using diffattn::RotaryConfig;
using support::identical;

template <typename Attention>
diffattn::DecoderConfig<Attention> small(bool tied) {
  return {.vocab_size = 31,
          .num_layers = 3,
          .hidden_dim = 20,
          .attention = {.embed_dim = 16, .num_heads = 2, .rotary = RotaryConfig{}},
          .tied_head = tied,
          .norm_eps = 1e-3,
          .seed = 5};
}

/// x / sqrt(mean(x²) + eps) · w, row by row, in plain loops.
Matrix<double> norm(const Matrix<double>& x, const diffattn::Vector<double>& weight, double eps) {
  Matrix<double> y = x;
  for (Index i = 0; i < x.rows(); ++i) {
    const double scale = 1 / std::sqrt(x.row(i).squaredNorm() / static_cast<double>(x.cols()) + eps);
    for (Index c = 0; c < x.cols(); ++c) y(i, c) = x(i, c) * scale * weight[c];
  }
  return y;
}

/// The decoder written out as the paper has it, attention by the layer of a known quality.
template <typename Attention, typename Mask = diffattn::CausalMask>
Matrix<double> written_out(const Decoder<double, Attention>& model, const std::vector<int>& tokens,
                           const Mask& mask = {}) {
  Matrix<double> x(static_cast<Index>(tokens.size()), model.embedding.cols());
  for (Index i = 0; i < x.rows(); ++i) x.row(i) = model.embedding.row(tokens[static_cast<std::size_t>(i)]);
  for (const auto& block : model.blocks) {
    x += block.attention.forward(norm(x, block.attention_norm.weight, 1e-3), mask);
    const Matrix<double> normed = norm(x, block.feed_forward_norm.weight, 1e-3);
    Matrix<double> gate = normed * block.feed_forward.gate_proj.weight.transpose();
    const Matrix<double> up = normed * block.feed_forward.up_proj.weight.transpose();
    for (Index i = 0; i < gate.size(); ++i) gate.data()[i] *= up.data()[i] / (1 + std::exp(-gate.data()[i]));
    x += gate * block.feed_forward.down_proj.weight.transpose();
  }
  return norm(x, model.norm.weight, 1e-3) * (model.head ? model.head->weight : model.embedding).transpose();
}

template <typename Model>
void randomize_norms(Model& model) {
  auto rng = support::make_rng();
  for (auto& block : model.blocks) {
    block.attention_norm.weight = support::random_matrix<double>(16, 1, rng);
    block.feed_forward_norm.weight = support::random_matrix<double>(16, 1, rng);
  }
  model.norm.weight = support::random_matrix<double>(16, 1, rng);
  model.embedding *= 20;  // 0.02 would leave the norms' eps in charge
}

/// Runs a number of times, then throws.
struct FailingExecutor {
  int runs_left;
  Index concurrency() const { return 1; }
  template <typename F>
  void run(Index tasks, F&& task) {
    if (runs_left-- == 0) throw std::runtime_error("no more");
    for (Index i = 0; i < tasks; ++i) task(i, Index{0});
  }
};

}  // namespace

TEMPLATE_TEST_CASE("A decoder is embedding, pre-norm blocks, norm and head", "[models][decoder]",
                   MultiheadDiffAttention<double>, MultiheadDiffAttentionV2<double>, MultiheadAttention<double>) {
  for (const bool tied : {false, true}) {
    Decoder<double, TestType> model(small<TestType>(tied));
    randomize_norms(model);
    const std::vector<int> tokens = {0, 30, 7, 7, 12, 1, 29};
    const Matrix<double> logits = model.logits(tokens);
    CHECK((logits - written_out(model, tokens)).cwiseAbs().maxCoeff() < 1e-12 * logits.cwiseAbs().maxCoeff());

    const diffattn::Vector<std::int64_t> column = Eigen::VectorXi::Map(tokens.data(), 7).cast<std::int64_t>();
    CHECK(identical(model.logits(column), logits));
    CHECK(identical(model.logits({0, 30, 7, 7, 12, 1, 29}), logits));
    CHECK(model.logits(std::vector<int>{}).rows() == 0);

    diffattn::ThreadPool pool(3);
    diffattn::Workspace workspace;
    Matrix<double> threaded(7, 31);
    model.logits_into(threaded, tokens, workspace, pool);
    CHECK(identical(threaded, logits));
    const std::size_t scratch = workspace.capacity();
    model.logits_into(threaded, tokens, workspace, pool);
    CHECK(workspace.capacity() == scratch);
  }
}

TEST_CASE("Work that fails half way leaves the cache as it was, in every layer", "[models][decoder]") {
  using Attention = MultiheadAttention<float>;
  const Decoder<float, Attention> model(small<Attention>(true));
  const std::vector<int> before = {3, 1, 4}, more = {1, 5};
  diffattn::DecoderCache<float> cache(3);
  model.logits(before, cache);
  diffattn::Workspace workspace;
  Matrix<float> x(2, 16);
  diffattn::MatrixMap<float> hidden(x.data(), 2, 16);
  int failures = 0;
  for (;; ++failures) {
    try {
      model.hidden_into(hidden, more, cache, workspace, FailingExecutor{failures});
      break;
    } catch (const std::runtime_error&) {
      for (const auto& layer : cache.layers) REQUIRE(layer.position() == 3);
    }
  }
  CHECK(failures > 10);
  const Matrix<float> after_failures = x;
  cache.truncate(3);
  model.hidden_into(hidden, more, cache, workspace);
  CHECK(identical(x, after_failures));
}

TEMPLATE_TEST_CASE("A decoder's tokens see what the mask lets them see", "[models][decoder]",
                   MultiheadDiffAttention<double>, MultiheadDiffAttentionV2<double>, MultiheadAttention<double>) {
  Decoder<double, TestType> model(small<TestType>(true));
  randomize_norms(model);
  const std::vector<int> tokens = {0, 30, 7, 7, 12, 1, 29};
  const auto check = [&](const auto& mask) {
    const Matrix<double> logits = model.logits(tokens, mask);
    CHECK((logits - written_out(model, tokens, mask)).cwiseAbs().maxCoeff() < 1e-12 * logits.cwiseAbs().maxCoeff());
    CHECK_FALSE(identical(logits, model.logits(tokens)));
    diffattn::Workspace workspace;
    Matrix<double> y(7, 31);
    model.logits_into(y, tokens, mask, workspace);
    CHECK(identical(y, logits));
  };
  check(diffattn::FullMask{});
  check(diffattn::SlidingWindowMask{2});
}

TEMPLATE_TEST_CASE("Behind a cache a mask is that of all tokens", "[models][decoder]", MultiheadDiffAttention<double>,
                   MultiheadDiffAttentionV2<double>, MultiheadAttention<double>) {
  Decoder<double, TestType> model(small<TestType>(true));
  randomize_norms(model);
  const std::vector<int> tokens = {0, 30, 7, 7, 12, 1, 29};
  const auto check = [&](const auto& mask) {
    const Matrix<double> whole = model.logits(tokens, mask);
    CHECK_FALSE(identical(whole, model.logits(tokens)));
    for (const std::size_t first : {std::size_t{0}, std::size_t{4}}) {  // token by token, or behind four at once
      auto cache = model.make_cache();
      diffattn::Workspace workspace;
      Matrix<double> last(1, 31);
      if (first != 0) model.logits(std::span(tokens).first(first), cache, mask);
      for (std::size_t i = first; i < tokens.size(); ++i) {
        model.last_logits_into(last, std::span(tokens).subspan(i, 1), cache, mask, 1, workspace);
        CHECK((last - whole.row(static_cast<Index>(i))).cwiseAbs().maxCoeff() < 1e-12 * whole.cwiseAbs().maxCoeff());
      }
    }
  };
  check(diffattn::SlidingWindowMask{2});
  check(with_bias(diffattn::CausalMask{}, [](Index head, Index query, Index key, Index n_q, Index n_k) {
    return -0.3 * static_cast<double>((head + 1) * (query + n_k - n_q - key));
  }));
}

TEST_CASE("Cached logits go into a matrix of yours, the same for any threads, without the heap", "[models][decoder]") {
  using Attention = MultiheadDiffAttention<float>;
  const Decoder<float, Attention> model(small<Attention>(false));
  const std::vector<int> prompt = {3, 1, 4, 1, 5}, more = {9, 2};
  auto by_value = model.make_cache();
  const Matrix<float> first = model.logits(prompt, by_value), second = model.logits(more, by_value);

  diffattn::ThreadPool pool(2);
  diffattn::Workspace workspace;
  auto cache = model.make_cache({.reserve = 20});
  CHECK(cache.layers.size() == 3);
  CHECK(cache.options().reserve == 20);
  Matrix<float> y(5, 31), z(2, 31), last(1, 31);
  const auto feed = [&] {
    cache.clear();
    model.logits_into(y, prompt, cache, workspace, pool);
    model.logits_into(z, more, cache, workspace, pool);
  };
  feed();
  CHECK(identical(y, first));
  CHECK(identical(z, second));
  CHECK(cache.position() == 7);
  feed();
  std::size_t before = support::allocations();
  feed();
  CHECK(support::allocations() == before);
  CHECK(identical(z, second));

  // The last row alone, however many tokens are fed at once.
  const std::vector<int> all = {3, 1, 4, 1, 5, 9, 2};
  for (const Index chunk : {1, 3, 7, 100}) {
    cache.clear();
    model.last_logits_into(last, all, cache, diffattn::CausalMask{}, chunk, workspace, pool);
    CHECK(cache.position() == 7);
    CHECK((last - second.bottomRows(1)).cwiseAbs().maxCoeff() < 1e-5f);
  }
  cache.truncate(6);
  const std::vector<int> token = {2};
  model.last_logits_into(last, token, cache, diffattn::CausalMask{}, 1, workspace, pool);
  cache.truncate(6);
  before = support::allocations();
  model.last_logits_into(last, token, cache, diffattn::CausalMask{}, 1, workspace, pool);
  CHECK(support::allocations() == before);
  CHECK(model.make_cache<Eigen::bfloat16>().layers.size() == 3);
}

TEST_CASE("Cached logits refuse what does not fit, and the cache is as before", "[models][decoder]") {
  using Attention = MultiheadAttention<float>;
  const Decoder<float, Attention> model(small<Attention>(true));
  diffattn::Workspace workspace;
  auto cache = model.make_cache({.max_tokens = 4});
  diffattn::DecoderCache<float> of_another(2);
  model.logits({3, 1}, cache);
  Matrix<float> y(3, 31), row(1, 31);
  const std::vector<int> three = {1, 2, 3}, unknown = {1, 31, 3}, two = {1, 2};
  const auto refusal = [&](auto&& f) {
    const std::string message = support::thrown_by<std::invalid_argument>(f);
    CHECK(cache.position() == 2);
    return message;
  };
  CHECK(refusal([&] { model.logits_into(y, three, cache, workspace); }) ==
        "Decoder: the cache holds at most 4 tokens and has 2, cannot append 3");
  CHECK(refusal([&] { model.logits_into(y, unknown, cache, workspace); }) ==
        "Decoder: token 1 is 31, outside the vocabulary of 31");
  using Shape = diffattn::ShapeError;
  CHECK(support::thrown_by<Shape>([&] { model.logits_into(y, two, cache, workspace); }) ==
        "Decoder: logits must be 2 x 31, got 3 x 31");
  CHECK(refusal([&] { model.logits_into(y, three, of_another, workspace); }) ==
        "Decoder: the cache must have 3 layers, got 2");
  CHECK(refusal([&] { model.last_logits_into(row, three, cache, diffattn::CausalMask{}, 1, workspace); }) ==
        "Decoder: the cache holds at most 4 tokens and has 2, cannot append 3");
  CHECK(refusal([&] { model.last_logits_into(row, unknown, cache, diffattn::CausalMask{}, 1, workspace); }) ==
        "Decoder: token 1 is 31, outside the vocabulary of 31");
  CHECK(refusal([&] { model.last_logits_into(row, two, cache, diffattn::CausalMask{}, 0, workspace); }) ==
        "Decoder: chunk must be at least 1, got 0");
  CHECK(support::thrown_by<Shape>([&] {
          model.last_logits_into(y, two, cache, diffattn::CausalMask{}, 1, workspace);
        }) == "Decoder: logits must be 1 x 31, got 3 x 31");
  CHECK(refusal([&] {
          model.last_logits_into(row, std::vector<int>{}, cache, diffattn::CausalMask{}, 1, workspace);
        }) == "Decoder: there is no last one of no tokens");
}

TEST_CASE("A prompt in chunks that fails half way leaves a cache with a window as it was", "[models][decoder]") {
  using Attention = MultiheadAttention<float>;
  const Decoder<float, Attention> model(small<Attention>(true));
  const std::vector<int> before(600, 3), more(300, 5);  // pages are dropped on the way
  auto cache = model.make_cache({.window = 20});
  model.logits(before, cache);
  auto untouched = cache.fork();
  diffattn::Workspace workspace;
  Matrix<float> y(1, 31), expected(1, 31);
  int failures = 5;
  for (;; failures += 7) {
    try {
      model.last_logits_into(y, more, cache, diffattn::CausalMask{}, 100, workspace, FailingExecutor{failures});
      break;
    } catch (const std::runtime_error&) {
      REQUIRE(cache.position() == 600);
      auto fork = cache.fork(), other = untouched.fork();
      REQUIRE(identical(model.logits({1, 2}, fork), model.logits({1, 2}, other)));
    }
  }
  CHECK(failures > 40);
  model.last_logits_into(expected, more, untouched, diffattn::CausalMask{}, 100, workspace);
  CHECK(identical(y, expected));
}

TEST_CASE("The seed fixes a decoder's parameters, and depth sets λ_init layer by layer", "[models][decoder]") {
  using Model = Decoder<double, MultiheadDiffAttention<double>>;
  const auto config = small<MultiheadDiffAttention<double>>(false);
  const Model model(config), again(config);
  CHECK(identical(model.logits({1, 2, 3}), again.logits({1, 2, 3})));
  CHECK_FALSE(identical(model.blocks[0].attention.q_proj.weight, model.blocks[1].attention.q_proj.weight));
  CHECK_FALSE(identical(model.blocks[0].feed_forward.up_proj.weight, model.blocks[1].feed_forward.up_proj.weight));
  for (const Index layer : {0, 1, 2}) {
    CHECK(model.blocks[static_cast<std::size_t>(layer)].attention.lambda.init ==
          diffattn::lambda_init(static_cast<double>(layer)));
  }
  auto other = config;
  other.seed = 6;
  CHECK_FALSE(identical(Model(other).logits({1, 2, 3}), model.logits({1, 2, 3})));
}

TEST_CASE("A decoder's parameters are named as Hugging Face names them", "[models][decoder]") {
  auto config = small<MultiheadAttention<float>>(true);
  config.num_layers = 1;
  std::vector<std::string> names;
  const Decoder<float, MultiheadAttention<float>> tied(config);
  const auto collect = [&](std::string_view name, const auto& parameter) {
    names.push_back(std::string(name) + " " + std::to_string(parameter.rows()) + "x" +
                    std::to_string(parameter.cols()));
  };
  visit_parameters(tied, collect);
  CHECK(names == std::vector<std::string>{
                     "embed_tokens.weight 31x16", "layers.0.input_layernorm.weight 16x1",
                     "layers.0.self_attn.q_proj.weight 16x16", "layers.0.self_attn.k_proj.weight 16x16",
                     "layers.0.self_attn.v_proj.weight 16x16", "layers.0.self_attn.out_proj.weight 16x16",
                     "layers.0.post_attention_layernorm.weight 16x1", "layers.0.mlp.gate_proj.weight 20x16",
                     "layers.0.mlp.up_proj.weight 20x16", "layers.0.mlp.down_proj.weight 16x20", "norm.weight 16x1"});
  config.tied_head = false;
  names.clear();
  const Decoder<float, MultiheadAttention<float>> with_head(config);
  visit_parameters(with_head, collect);
  CHECK(names.back() == "lm_head.weight 31x16");
}

TEST_CASE("A decoder refuses what cannot be by name", "[models][decoder]") {
  using Attention = MultiheadAttention<float>;
  const Decoder<float, Attention> model(small<Attention>(false));
  const auto refusal = [](auto&& f) { return support::thrown_by<std::invalid_argument>(f); };
  CHECK(refusal([&] { model.logits({3, 31}); }) == "Decoder: token 1 is 31, outside the vocabulary of 31");
  CHECK(refusal([&] { model.logits({-1}); }) == "Decoder: token 0 is -1, outside the vocabulary of 31");
  const auto with = [](auto change) {
    auto config = small<Attention>(false);
    change(config);
    Decoder<float, Attention> refused(config);
  };
  CHECK(refusal([&] { with([](auto& c) { c.vocab_size = 0; }); }) == "Decoder: vocab_size must be at least 1, got 0");
  CHECK(refusal([&] { with([](auto& c) { c.num_layers = -1; }); }) == "Decoder: num_layers must be at least 1, got -1");
  CHECK(refusal([&] { with([](auto& c) { c.hidden_dim = 0; }); }) == "Decoder: hidden_dim must be at least 1, got 0");
  CHECK(refusal([&] { with([](auto& c) { c.attention.embed_dim = 0; }); }) ==
        "Decoder: attention.embed_dim must be at least 1, got 0");
}

TEST_CASE("Models and caches of sizes that overflow are refused", "[models][decoder]") {
  using Model = diffattn::Decoder<float, diffattn::MultiheadAttention<float>>;
  const auto refused = [](Index vocab_size, Index num_layers, Index hidden_dim) {
    return support::thrown_by<std::invalid_argument>([&] {
      Model model({.vocab_size = vocab_size,
                   .num_layers = num_layers,
                   .hidden_dim = hidden_dim,
                   .attention = {.embed_dim = 8, .num_heads = 1}});
    });
  };
  for (const Index size : {Index{1} << 47, Index{1} << 62, std::numeric_limits<Index>::max()}) {
    CHECK(refused(size, 1, 4).find("Decoder: vocab_size·embed_dim would be more than") == 0);
    CHECK(refused(8, size, 4).find("Decoder: num_layers·hidden_dim·embed_dim would be more than") == 0);
    CHECK(refused(8, 1, size).find("Decoder: num_layers·hidden_dim·embed_dim would be more than") == 0);
    CHECK(support::thrown_by<std::invalid_argument>([&] {
            diffattn::DecoderCache<float> cache(size);
          }).find("DecoderCache: num_layers must be at least 1 and that of the model") == 0);
  }
  for (const Index none : {0, -1}) {
    CHECK_THROWS_AS(diffattn::DecoderCache<float>(none), std::invalid_argument);
  }
}
