// The gradients of whole decoders, for all three kinds of attention.

#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/kernels/bias.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>
#include <diffattn/models/decoder.hpp>
#include <map>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/numerical_gradient.hpp"
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
using diffattn::visit_parameters;
using diffattn::zeros_like;
using support::excess;
using support::identical;
using Lengths = std::vector<Index>;

template <typename Attention>
diffattn::DecoderConfig<Attention> config(Index embed_dim, bool tied) {
  return {.vocab_size = 7,
          .num_layers = 2,
          .hidden_dim = embed_dim / 2 + 1,
          .attention = {.embed_dim = embed_dim,
                        .num_heads = 2,
                        .num_kv_heads = 1,
                        .rotary = diffattn::RotaryConfig{.base = 100}},
          .tied_head = tied,
          .norm_eps = 1e-3};
}

/// Parameters of a size at which every part matters and differences are accurate.
template <typename Model>
void randomize(Model& model, support::Rng& rng) {
  visit_parameters(model, [&](std::string_view name, auto& p) {
    using S = typename std::remove_reference_t<decltype(p)>::Scalar;
    const bool of_embedding = name.find("embed") != name.npos;
    p = S(of_embedding ? 1.0 : 0.4) * support::random_matrix<S>(p.rows(), p.cols(), rng);
    if (name.find("norm") != name.npos) p.array() += S(1);
  });
}

template <typename Model>
std::map<std::string, Matrix<double>> named_parameters_of(const Model& model) {
  std::map<std::string, Matrix<double>> parameters;
  visit_parameters(
      model, [&](std::string_view name, const auto& p) { parameters[std::string(name)] = p.template cast<double>(); });
  return parameters;
}

std::vector<int> random_tokens(Index count, support::Rng& rng) {
  std::vector<int> tokens;
  for (Index i = 0; i < count; ++i) tokens.push_back(std::uniform_int_distribution<int>(0, 6)(rng));
  return tokens;
}

}  // namespace

TEMPLATE_TEST_CASE("A two-layer decoder's gradients are what differences say", "[models][decoder_tape]",
                   MultiheadDiffAttention<double>, MultiheadDiffAttentionV2<double>, MultiheadAttention<double>) {
  auto rng = support::make_rng();
  for (const bool tied : {false, true}) {
    INFO("tied head: " << tied);
    Decoder<double, TestType> model(config<TestType>(8, tied));
    randomize(model, rng);
    const std::vector<int> tokens = {3, 1, 3, 3, 0, 6, 1, 3, 5};  // repeated ones add up; 2 and 4 do not appear
    const Lengths lengths = {5, 1, 3};
    const Matrix<double> dlogits = support::random_matrix<double>(9, 7, rng);
    typename decltype(model)::Tape tape;
    const auto loss = [&] { return model.logits(tokens, lengths, tape).cwiseProduct(dlogits).sum(); };

    auto grad = zeros_like(model);
    randomize(grad, rng);  // gradients are added to what is there
    const auto before = named_parameters_of(grad);
    loss();
    model.backward(dlogits, tape, grad);
    const auto after = named_parameters_of(grad);
    std::size_t compared = 0;
    visit_parameters(model, [&](std::string_view view, auto& p) {
      const std::string name(view);
      INFO(name);
      CHECK(excess(after.at(name) - before.at(name), support::numerical_gradient(p, loss, 1e-4)) <= 0);
      CHECK_FALSE(after.at(name) == before.at(name));
      ++compared;
    });
    CHECK(compared == after.size());
    if (!tied) CHECK(after.at("embed_tokens.weight").row(2) == before.at("embed_tokens.weight").row(2));
  }
}

TEST_CASE("Gradients under a mask are what differences say, and logits with a tape are those without",
          "[models][decoder_tape]") {
  using Attention = MultiheadDiffAttention<double>;
  auto rng = support::make_rng();
  Decoder<double, Attention> model(config<Attention>(8, true));
  randomize(model, rng);
  const std::vector<int> tokens = {3, 1, 3, 3, 0, 6, 1, 3, 5};
  const Matrix<double> dlogits = support::random_matrix<double>(9, 7, rng);
  const diffattn::SlidingWindowMask mask{3};
  typename decltype(model)::Tape tape;
  CHECK(identical(model.logits(tokens, mask, {9}, tape), model.logits(tokens, mask)));
  CHECK_FALSE(identical(model.logits(tokens, {9}, tape), model.logits(tokens, mask)));
  const auto loss = [&] { return model.logits(tokens, mask, {5, 1, 3}, tape).cwiseProduct(dlogits).sum(); };
  auto grad = zeros_like(model);
  loss();
  model.backward(dlogits, tape, grad);
  const auto gradients = named_parameters_of(grad);
  visit_parameters(model, [&](std::string_view name, auto& p) {
    INFO(name);
    CHECK(excess(gradients.at(std::string(name)), support::numerical_gradient(p, loss, 1e-4)) <= 0);
  });
  tape.recompute = true;
  CHECK(support::thrown_by<std::invalid_argument>(loss) == "Decoder: a tape with recompute takes a CausalMask only");
}

TEMPLATE_TEST_CASE("The adjoint law: a step along v changes the loss by what v and the gradient say",
                   "[models][decoder_tape]", MultiheadDiffAttention<double>, MultiheadDiffAttentionV2<double>,
                   MultiheadAttention<double>) {
  auto rng = support::make_rng();
  Decoder<double, TestType> model(config<TestType>(24, true));
  randomize(model, rng);
  const std::vector<int> tokens = random_tokens(90, rng);
  const Lengths lengths = {50, 40};
  const Matrix<double> dlogits = support::random_matrix<double>(90, 7, rng);
  typename decltype(model)::Tape tape;
  auto grad = zeros_like(model);
  model.logits(tokens, lengths, tape);
  model.backward(dlogits, tape, grad);

  auto direction = zeros_like(model);
  randomize(direction, rng);
  double expected = 0;
  const auto gradients = named_parameters_of(grad), along = named_parameters_of(direction);
  for (const auto& [name, g] : gradients) expected += g.cwiseProduct(along.at(name)).sum();
  Matrix<double> step = Matrix<double>::Zero(1, 1);
  const auto start = named_parameters_of(model);
  const auto loss = [&] {
    visit_parameters(model, [&](std::string_view name, auto& p) {
      p = start.at(std::string(name)) + step(0, 0) * along.at(std::string(name));
    });
    return model.logits(tokens, lengths, tape).cwiseProduct(dlogits).sum();
  };
  const double actual = support::numerical_gradient(step, loss, 1e-5)(0, 0);
  CHECK(std::abs(actual - expected) <= 1e-6 * std::abs(expected) + 1e-7);
}

TEMPLATE_TEST_CASE("Recomputation, threads and a used tape change no bit", "[models][decoder_tape]",
                   MultiheadDiffAttention<float>, MultiheadDiffAttentionV2<float>, MultiheadAttention<float>) {
  auto rng = support::make_rng();
  Decoder<float, TestType> model(config<TestType>(24, false));
  randomize(model, rng);
  const std::vector<int> tokens = random_tokens(190, rng);
  const Lengths lengths = {100, 3, 87};
  const Matrix<float> dlogits = support::random_matrix<float>(190, 7, rng);
  typename decltype(model)::Tape used;
  auto expected = zeros_like(model);
  const Matrix<float> logits = model.logits(tokens, lengths, used);
  model.backward(dlogits, used, expected);

  diffattn::Workspace workspace;
  for (const bool recompute : {false, true}) {
    typename decltype(model)::Tape tape;
    tape.recompute = recompute;
    for (const Index threads : {1, 2, 4}) {
      INFO("recompute " << recompute << ", threads " << threads);
      diffattn::ThreadPool pool(threads);
      auto grad = zeros_like(model);
      Matrix<float> y(190, 7);
      model.logits_into(y, tokens, lengths, tape, workspace, pool);
      CHECK(identical(y, logits));
      model.backward(dlogits, tape, grad, workspace, pool);
      CHECK(named_parameters_of(grad) == named_parameters_of(expected));
      model.backward(dlogits, tape, grad, workspace, pool);  // a tape can be read again
      CHECK(grad.norm.weight.isApprox(2 * expected.norm.weight));
    }
    CHECK(tape.blocks.size() == (recompute ? 1 : 2));
  }
  // Shorter and longer batches on the same tape.
  for (const Index n : {7, 190}) {
    const std::vector<int> some(tokens.begin(), tokens.begin() + n);
    typename decltype(model)::Tape fresh;
    auto a = zeros_like(model), b = zeros_like(model);
    CHECK(identical(model.logits(some, Lengths{n}, used), model.logits(some, Lengths{n}, fresh)));
    model.backward(dlogits.topRows(n), used, a);
    model.backward(dlogits.topRows(n), fresh, b);
    CHECK(named_parameters_of(a) == named_parameters_of(b));
  }
}

TEST_CASE("Stacked sequences have the gradients of each alone", "[models][decoder_tape]") {
  auto rng = support::make_rng();
  Decoder<double, MultiheadDiffAttention<double>> model(config<MultiheadDiffAttention<double>>(16, false));
  randomize(model, rng);
  const std::vector<int> tokens = random_tokens(37, rng);
  const Matrix<double> dlogits = support::random_matrix<double>(37, 7, rng);
  decltype(model)::Tape tape;
  auto together = zeros_like(model), apart = zeros_like(model);
  const Matrix<double> logits = model.logits(tokens, Lengths{25, 12}, tape);
  model.backward(dlogits, tape, together);
  const std::vector<int> first(tokens.begin(), tokens.begin() + 25), second(tokens.begin() + 25, tokens.end());
  CHECK(model.logits(first, Lengths{25}, tape).isApprox(logits.topRows(25), 1e-13));
  model.backward(dlogits.topRows(25), tape, apart);
  CHECK(model.logits(second, Lengths{12}, tape).isApprox(logits.bottomRows(12), 1e-13));
  model.backward(dlogits.bottomRows(12), tape, apart);
  const auto expected = named_parameters_of(apart);
  for (const auto& [name, gradient] : named_parameters_of(together)) {
    INFO(name);
    CHECK(gradient.isApprox(expected.at(name), 1e-11));
  }
}

TEST_CASE("A tape or gradient that does not fit is refused before any work", "[models][decoder_tape]") {
  using Model = Decoder<float, MultiheadDiffAttention<float>>;
  const auto base = config<MultiheadDiffAttention<float>>(16, false);
  auto three_layers = base, tied = base, narrow = base;
  three_layers.num_layers = 3;
  tied.tied_head = true;
  narrow.hidden_dim = 4;
  const Model model(base);
  Model grad = zeros_like(model);
  Model::Tape tape, other;
  const std::vector<int> tokens = {1, 2, 3};
  const Matrix<float> dlogits = Matrix<float>::Ones(3, 7);
  const auto invalid = [&](Model::Tape& with) {
    return support::thrown_by<std::invalid_argument>([&] { model.backward(dlogits, with, grad); });
  };
  const auto shape = [&](const Matrix<float>& d, Model& to) {
    return support::thrown_by<diffattn::ShapeError>([&] { model.backward(d, tape, to); });
  };
  CHECK(invalid(tape) == "Decoder: backward needs a tape that logits(tokens, lengths, tape) has filled");
  Model(three_layers).logits(tokens, Lengths{3}, other);
  CHECK(invalid(other) == "Decoder: the tape was filled by a decoder of another configuration");
  model.logits(tokens, Lengths{3}, tape);
  CHECK(shape(dlogits.topRows(2), grad) == "Decoder: dlogits must be 3 x 7, got 2 x 7");
  CHECK(shape(dlogits.leftCols(6), grad) == "Decoder: dlogits must be 3 x 7, got 3 x 6");
  Model wrong(narrow), without_head(tied), deep(three_layers);
  CHECK(shape(dlogits, wrong) == "Decoder: the gradient's layers.0.mlp.gate_proj.weight must be 9 x 16, got 4 x 16");
  CHECK(shape(dlogits, without_head) == "Decoder: the gradient lacks lm_head.weight");
  CHECK(shape(dlogits, deep) ==
        "Decoder: the gradient has a layers.2.input_layernorm.weight, and the layer has none there");
  for (const auto& [name, gradient] : named_parameters_of(grad)) CHECK(gradient.isZero(0));

  CHECK_THROWS_AS(model.logits(std::vector<int>{1, 7}, Lengths{2}, tape), std::invalid_argument);
  CHECK_THROWS_AS(model.logits(tokens, Lengths{2}, tape), diffattn::ShapeError);
}

TEST_CASE("A bias that all layers of a decoder share is learned", "[models][decoder_tape]") {
  using Attention = MultiheadDiffAttention<double>;
  auto rng = support::make_rng();
  Decoder<double, Attention> model(config<Attention>(8, true)), grad = zeros_like(model), again = grad;
  randomize(model, rng);
  Matrix<double> table = support::random_matrix<double>(2, 5, rng), dbias = support::random_matrix<double>(2, 5, rng);
  const Matrix<double> before = dbias, dlogits = support::random_matrix<double>(9, 7, rng);
  const std::vector<int> tokens = random_tokens(9, rng);
  const Lengths lengths = {5, 1, 3};
  const auto mask = with_bias(diffattn::CausalMask{}, diffattn::RelativeBias(table));
  typename decltype(model)::Tape tape;
  const auto loss = [&] { return model.logits(tokens, mask, lengths, tape).cwiseProduct(dlogits).sum(); };
  loss();
  model.backward(dlogits, tape, grad, dbias);
  CHECK(excess(dbias - before, support::numerical_gradient(table, loss, 1e-4)) <= 0);
  CHECK_FALSE((dbias - before).leftCols(3).isZero(1e-3));
  CHECK((dbias - before).rightCols(2).isZero(0));  // no query of a causal mask reads them

  loss();
  model.backward(dlogits, tape, again);
  CHECK(named_parameters_of(grad) == named_parameters_of(again));
  Matrix<double> narrow = table.leftCols(3);
  CHECK_THROWS_AS(model.backward(dlogits, tape, grad, narrow), diffattn::ShapeError);
  model.logits(tokens, lengths, tape);
  CHECK_THROWS_AS(model.backward(dlogits, tape, grad, dbias), std::invalid_argument);
  CHECK(named_parameters_of(grad) == named_parameters_of(again));  // nothing was added
}
