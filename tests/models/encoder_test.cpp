// Encoders against plain loops in long double, and what holds for all of them.

#include <cmath>
#include <diffattn/core/parallel_threads.hpp>
#include <diffattn/models/encoder.hpp>
#include <string>
#include <vector>

#include "layers/layer_oracle.hpp"
#include "models/encoders.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/parameters_of.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace encoder_test {

using namespace diffattn;
using support::identical;
using support::random_matrix;
using support::thrown_by;
using Long = Matrix<long double>;
using Weights = oracle::Weights<long double>;

/// The parameters whose names begin with `prefix`, without it.
inline Weights part_of(const Weights& weights, const std::string& prefix) {
  Weights part;
  for (const auto& [name, value] : weights) {
    if (name.compare(0, prefix.size(), prefix) == 0) part[name.substr(prefix.size())] = value;
  }
  return part;
}

inline Long plain_norm(const Weights& weights, Long x, NormKind kind, double eps) {
  for (Index i = 0; i < x.rows(); ++i) {
    const auto width = static_cast<long double>(x.cols());
    long double mean = 0, square = 0;
    for (Index c = 0; c < x.cols() && kind == NormKind::layer_norm; ++c) mean += x(i, c) / width;
    for (Index c = 0; c < x.cols(); ++c) square += (x(i, c) - mean) * (x(i, c) - mean) / width;
    for (Index c = 0; c < x.cols(); ++c) {
      x(i, c) = (x(i, c) - mean) / std::sqrt(square + eps) * weights.at("weight")(c, 0);
      if (kind == NormKind::layer_norm) x(i, c) += weights.at("bias")(c, 0);
    }
  }
  return x;
}

inline Long plain_feed_forward(const Weights& weights, const Long& x, Activation activation) {
  Long inner = oracle::linear(weights, "up_proj", x);
  const Long gate = activation == Activation::swiglu ? oracle::linear(weights, "gate_proj", x) : Long();
  for (Index i = 0; i < inner.size(); ++i) {
    long double& h = inner.data()[i];
    switch (activation) {
      case Activation::swiglu:
        h *= gate.data()[i] / (1 + std::exp(-gate.data()[i]));
        break;
      case Activation::gelu:
        h *= (1 + std::erf(h / std::sqrt(2.0L))) / 2;
        break;
      case Activation::gelu_tanh:
        h *= (1 + std::tanh(std::sqrt(2 / std::acos(-1.0L)) * (h + 0.044715L * h * h * h))) / 2;
        break;
      case Activation::relu:
        h = h > 0 ? h : 0;
        break;
    }
  }
  return oracle::linear(weights, "down_proj", inner);
}

template <typename S, typename Config, typename Mask>
Long plain_attention(const MultiheadDiffAttention<S>*, const Weights& w, const Config& c, const Long& x,
                     const Mask& m) {
  return oracle::multihead_diff_attention(w, c, x, m);
}
template <typename S, typename Config, typename Mask>
Long plain_attention(const MultiheadDiffAttentionV2<S>*, const Weights& w, const Config& c, const Long& x,
                     const Mask& m) {
  return oracle::multihead_diff_attention_v2(w, c, x, m);
}
template <typename S, typename Config, typename Mask>
Long plain_attention(const MultiheadAttention<S>*, const Weights& w, const Config& c, const Long& x, const Mask& m) {
  return oracle::multihead_attention(w, c, x, m);
}

/// One sequence through the encoder, as encoder.hpp says it.
template <typename S, typename Attention, typename Mask>
Long plain_encoder(const Encoder<S, Attention>& encoder, Long x, const Mask& mask) {
  const auto& config = encoder.config();
  const Weights all = oracle::weights_of<long double>(encoder);
  const bool before = config.norm_placement == NormPlacement::before;
  for (Index layer = 0; layer < config.num_layers; ++layer) {
    const Weights weights = part_of(all, "layers." + std::to_string(layer) + ".");
    const auto norm = [&](const char* name, const Long& of) {
      return plain_norm(part_of(weights, std::string(name) + "."), of, config.norm, config.norm_eps);
    };
    const auto attend = [&](const Long& to) {
      return plain_attention(static_cast<const Attention*>(nullptr), part_of(weights, "self_attn."),
                             config.attention_of(layer), to, mask);
    };
    const auto feed = [&](const Long& to) {
      return plain_feed_forward(part_of(weights, "mlp."), to, config.activation);
    };
    if (before) {
      x += attend(norm("attention_norm", x));
      x += feed(norm("feed_forward_norm", x));
    } else {
      x = norm("attention_norm", x + attend(x));
      x = norm("feed_forward_norm", x + feed(x));
    }
  }
  return before ? plain_norm(part_of(all, "norm."), x, config.norm, config.norm_eps) : x;
}

struct Choice {
  Activation activation;
  NormKind norm;
  NormPlacement placement;
};
constexpr Choice kChoices[] = {{Activation::gelu, NormKind::layer_norm, NormPlacement::before},
                               {Activation::gelu, NormKind::layer_norm, NormPlacement::after},
                               {Activation::relu, NormKind::layer_norm, NormPlacement::after},
                               {Activation::relu, NormKind::rms_norm, NormPlacement::before},
                               {Activation::swiglu, NormKind::rms_norm, NormPlacement::before},
                               {Activation::swiglu, NormKind::rms_norm, NormPlacement::after},
                               {Activation::gelu_tanh, NormKind::layer_norm, NormPlacement::before}};

template <typename Attention>
EncoderConfig<Attention> config_of(const Choice& choice) {
  return {.num_layers = 2,
          .hidden_dim = 32,
          .attention = {.embed_dim = 24, .num_heads = 2, .num_kv_heads = 1, .bias = true},
          .activation = choice.activation,
          .bias = choice.norm == NormKind::layer_norm,
          .norm = choice.norm,
          .norm_placement = choice.placement,
          .norm_eps = 1e-3,
          .seed = 4};
}

template <typename S, typename Attention>
Encoder<S, Attention> random_encoder(const Choice& choice, support::Rng& rng) {
  Encoder<S, Attention> encoder(config_of<Attention>(choice));
  encoders::randomize(encoder, rng);
  return encoder;
}

}  // namespace encoder_test

TEMPLATE_TEST_CASE("An encoder is what plain loops say", "[models][encoder]", diffattn::MultiheadDiffAttention<double>,
                   diffattn::MultiheadDiffAttentionV2<double>, diffattn::MultiheadAttention<double>) {
  using namespace encoder_test;
  auto rng = support::make_rng();
  for (const Choice& choice : kChoices) {
    const auto encoder = random_encoder<double, TestType>(choice, rng);
    const Matrix<double> x = random_matrix<double>(11, 24, rng);
    INFO("activation " << int(choice.activation) << ", norm " << int(choice.norm) << ", " << int(choice.placement));
    const auto near = [&](const Matrix<double>& y, const Long& exact) {
      return (y.cast<long double>() - exact).cwiseAbs().maxCoeff() <= 1e-12L * exact.cwiseAbs().maxCoeff();
    };
    const Long exact = plain_encoder(encoder, x.cast<long double>(), FullMask{});
    CHECK(near(encoder.forward(x), exact));
    typename Encoder<double, TestType>::Tape tape;
    CHECK(identical(encoder.forward(x, FullMask{}, tape), encoder.forward(x)));
    if (choice.activation == Activation::gelu) {
      const PaddingMask padding{7};
      CHECK(near(encoder.forward(x, padding), plain_encoder(encoder, x.cast<long double>(), padding)));
      CHECK_FALSE(near(encoder.forward(x, padding), exact));
    }
  }
}

TEMPLATE_TEST_CASE("An encoder of one token, and of odd widths", "[models][encoder]",
                   diffattn::MultiheadDiffAttention<double>, diffattn::MultiheadDiffAttentionV2<double>,
                   diffattn::MultiheadAttention<double>) {
  using namespace encoder_test;
  auto rng = support::make_rng();
  for (const Choice& choice : kChoices) {
    auto config = config_of<TestType>(choice);
    config.num_layers = 1;
    config.hidden_dim = 7;
    config.attention = {.embed_dim = 15, .num_heads = 3, .num_kv_heads = 1, .head_dim = 5};
    Encoder<double, TestType> encoder(config);
    encoders::randomize(encoder, rng);
    for (const Index n : {1, 2, 19}) {
      INFO("activation " << int(choice.activation) << ", " << int(choice.placement) << ", " << n << " tokens");
      const Matrix<double> x = random_matrix<double>(n, 15, rng);
      const Long exact = plain_encoder(encoder, x.cast<long double>(), FullMask{});
      CHECK((encoder.forward(x).template cast<long double>() - exact).norm() <= 1e-12L * exact.norm());
    }
  }
}

TEST_CASE("An encoder in float is near the truth", "[models][encoder]") {
  using namespace encoder_test;
  using Attention = MultiheadDiffAttention<float>;
  auto rng = support::make_rng();
  for (const Choice& choice : kChoices) {
    const auto encoder = random_encoder<float, Attention>(choice, rng);
    const Matrix<float> x = random_matrix<float>(40, 24, rng);
    const Long exact = plain_encoder(encoder, x.cast<long double>(), FullMask{});
    CHECK((encoder.forward(x).cast<long double>() - exact).norm() <= 1e-5L * exact.norm());
  }
}

TEST_CASE("An encoder's parameters have these names", "[models][encoder]") {
  using namespace encoder_test;
  using Attention = MultiheadDiffAttention<float>;
  const auto names_of = [](const Choice& choice) {
    auto config = config_of<Attention>(choice);
    config.num_layers = 1;
    config.attention.bias = false;
    std::string names;
    const Encoder<float, Attention> encoder(config);
    visit_parameters(encoder, [&](std::string_view name, const auto&) { names.append(name).append(" "); });
    return names;
  };
  const std::string attention =
      "layers.0.self_attn.q_proj.weight layers.0.self_attn.k_proj.weight layers.0.self_attn.v_proj.weight "
      "layers.0.self_attn.out_proj.weight layers.0.self_attn.lambda_q1 layers.0.self_attn.lambda_k1 "
      "layers.0.self_attn.lambda_q2 layers.0.self_attn.lambda_k2 layers.0.self_attn.subln.weight ";
  std::string found = names_of(kChoices[0]);
  CHECK(found.find("layers.0.attention_norm.weight layers.0.attention_norm.bias layers.0.self_attn.q_proj") == 0);
  CHECK(found.find("layers.0.feed_forward_norm.weight layers.0.feed_forward_norm.bias layers.0.mlp.up_proj.weight "
                   "layers.0.mlp.up_proj.bias layers.0.mlp.down_proj.weight layers.0.mlp.down_proj.bias norm.weight "
                   "norm.bias ") != found.npos);
  found = names_of(kChoices[5]);
  CHECK(found.find("layers.0.feed_forward_norm.weight layers.0.mlp.gate_proj.weight layers.0.mlp.up_proj.weight "
                   "layers.0.mlp.down_proj.weight ") != found.npos);
  CHECK(found.find(" norm.weight") == found.npos);  // post-norm has none at the end
  CHECK(found.find("bias") == found.npos);
}

TEST_CASE("Stacked sequences are what each is alone, bit for bit", "[models][encoder]") {
  using namespace encoder_test;
  using Attention = MultiheadDiffAttention<float>;
  auto rng = support::make_rng();
  for (const Choice& choice : {kChoices[0], kChoices[2], kChoices[5]}) {
    const auto encoder = random_encoder<float, Attention>(choice, rng);
    const std::vector<int> lengths = {7, 0, 70, 5, 20};  // fewer than five rows are multiplied in another order
    Matrix<float> x = random_matrix<float>(102, 24, rng);
    const auto check = [&](const auto& mask) {
      const Matrix<float> y = encoder.forward(x, mask, lengths);
      typename decltype(encoder)::Tape tape;
      CHECK(identical(encoder.forward(x, mask, lengths, tape), y));
      for (Index first = 0, s = 0; s < 5; first += lengths[static_cast<std::size_t>(s++)]) {
        const Index length = lengths[static_cast<std::size_t>(s)];
        CHECK(identical(encoder.forward(x.middleRows(first, length), mask), y.middleRows(first, length)));
      }
      return y;
    };
    check(PaddingMask{4});
    const Matrix<float> y = check(FullMask{});
    x.row(8).setConstant(std::numeric_limits<float>::quiet_NaN());  // in the third
    const Matrix<float> poisoned = encoder.forward(x, FullMask{}, lengths);
    CHECK(identical(poisoned.topRows(7), y.topRows(7)));
    CHECK(poisoned.middleRows(7, 70).array().isNaN().all());
    CHECK(identical(poisoned.bottomRows(25), y.bottomRows(25)));
  }
}

TEST_CASE("An encoder's rows of any strides, in place, and none", "[models][encoder]") {
  using namespace encoder_test;
  using Attention = MultiheadAttention<float>;
  auto rng = support::make_rng();
  for (const Choice& choice : {kChoices[0], kChoices[2]}) {
    const auto encoder = random_encoder<float, Attention>(choice, rng);
    const Matrix<float> wide = random_matrix<float>(11, 30, rng), x = wide.block(1, 3, 9, 24);
    const Matrix<float> expected = encoder.forward(x);
    Workspace workspace;
    Matrix<float> frame = Matrix<float>::Constant(11, 30, 7);
    encoder.forward_into(frame.block(1, 3, 9, 24), wide.block(1, 3, 9, 24), FullMask{}, workspace);
    CHECK(identical(frame.block(1, 3, 9, 24), expected));
    frame.block(1, 3, 9, 24).setConstant(7);
    CHECK((frame.array() == 7).all());
    const Eigen::MatrixXf by_columns = x;
    CHECK(identical(encoder.forward(by_columns), expected));
    Matrix<float> in_place = x;
    encoder.forward_into(in_place, in_place, FullMask{}, workspace);
    CHECK(identical(in_place, expected));
    const Eigen::Matrix<float, 9, 24, Eigen::RowMajor> fixed = x;
    Eigen::Matrix<float, 9, 24, Eigen::RowMajor> y;
    typename decltype(encoder)::Tape tape;
    encoder.forward_into(y, fixed, FullMask{}, tape, workspace);
    CHECK(identical(y, expected));

    auto grad = zeros_like(encoder), same = grad;
    const Matrix<float> dy = random_matrix<float>(9, 24, rng), dx = encoder.backward(dy, tape, grad);
    Eigen::MatrixXf d_in_place = dy;
    encoder.backward_into(d_in_place, d_in_place, tape, same, workspace);
    CHECK(identical(d_in_place, dx));
    CHECK(support::parameters_of(same) == support::parameters_of(grad));

    CHECK(encoder.forward(Matrix<float>(0, 24)).rows() == 0);
    CHECK(encoder.forward(Matrix<float>(0, 24), FullMask{}, {0, 0}, tape).rows() == 0);
    CHECK(encoder.backward(Matrix<float>(0, 24), tape, grad).rows() == 0);
    CHECK(support::parameters_of(same) == support::parameters_of(grad));
  }
}

TEST_CASE("An encoder gives the same bits on any number of threads, and asks the heap for nothing twice",
          "[models][encoder]") {
  using namespace encoder_test;
  using Attention = MultiheadDiffAttention<float>;
  auto rng = support::make_rng();
  for (const Choice& choice : {kChoices[0], kChoices[2], kChoices[5]}) {
    const auto encoder = random_encoder<float, Attention>(choice, rng);
    const std::vector<Index> lengths = {70, 3, 100};
    const Matrix<float> x = random_matrix<float>(173, 24, rng), dy = random_matrix<float>(173, 24, rng);
    typename decltype(encoder)::Tape tape;
    auto expected_grad = zeros_like(encoder);
    const Matrix<float> expected = encoder.forward(x, FullMask{}, lengths, tape);
    const Matrix<float> expected_dx = encoder.backward(dy, tape, expected_grad);
    CHECK(identical(encoder.forward(x, FullMask{}, lengths), expected));
    const auto check = [&](support::AnyExecutor executor) {
      Workspace workspace;
      Matrix<float> y(173, 24), again(173, 24), dx(173, 24);
      auto grad = zeros_like(encoder);
      const auto step = [&] {
        encoder.forward_into(again, x, FullMask{}, lengths, workspace, executor);
        encoder.forward_into(y, x, FullMask{}, lengths, tape, workspace, executor);
        encoder.backward_into(dx, dy, tape, grad, workspace, executor);
      };
      for (int warm_up = 0; warm_up < 3; ++warm_up) step();
      set_zero(grad);
      const std::size_t before = support::allocations();
      step();
      CHECK(support::allocations() == before);
      CHECK(identical(again, expected));
      CHECK(identical(y, expected));
      CHECK(identical(dx, expected_dx));
      CHECK(support::parameters_of(grad) == support::parameters_of(expected_grad));
    };
    Serial serial;
    support::Backwards backwards;
    ThreadPool pool(3);
    check(support::AnyExecutor(serial));
    check(support::AnyExecutor(backwards));
    check(support::AnyExecutor(pool));
  }
}

TEST_CASE("An encoder refuses what does not fit before any work", "[models][encoder]") {
  using namespace encoder_test;
  using Attention = MultiheadDiffAttention<float>;
  using Model = Encoder<float, Attention>;
  const auto config = config_of<Attention>(kChoices[0]);
  const auto refused = [&](auto change) {
    auto changed = config;
    change(changed);
    return thrown_by<std::invalid_argument>([&] { Model model(changed); });
  };
  CHECK(refused([](auto& c) { c.num_layers = 0; }) == "Encoder: num_layers must be at least 1, got 0");
  CHECK(refused([](auto& c) { c.hidden_dim = -2; }) == "Encoder: hidden_dim must be at least 1, got -2");
  CHECK(refused([](auto& c) { c.attention.embed_dim = 0; }) ==
        "Encoder: attention.embed_dim must be at least 1, got 0");
  CHECK(refused([](auto& c) { c.attention.num_heads = 5; }) ==
        "MultiheadDiffAttention: 2·num_heads = 10 must divide embed_dim = 24");
  CHECK(refused([](auto& c) { c.hidden_dim = Index{1} << 45; }).find("num_layers·hidden_dim·embed_dim") !=
        std::string::npos);

  const Model model(config);
  CHECK(model.config().attention.head_dim == 6);
  CHECK(model.blocks[1].attention.config().depth == 1);
  Model grad = zeros_like(model);
  const Matrix<float> x = Matrix<float>::Ones(5, 24);
  Matrix<float> y = Matrix<float>::Constant(5, 24, 7);
  Workspace workspace;
  Model::Tape tape;
  const auto shape = [](auto f) { return thrown_by<ShapeError>(f); };
  const auto invalid = [](auto f) { return thrown_by<std::invalid_argument>(f); };
  CHECK(shape([&] { model.forward(x.leftCols(23)); }) == "Encoder: x must be 5 x 24, got 5 x 23");
  CHECK(shape([&] { model.forward(x.transpose()); }) ==
        "Encoder: x must have embed_dim = 24 columns, one token a row, got 24 x 5: did you mean x.transpose()?");
  CHECK(shape([&] { model.forward_into(y, x.topRows(4), FullMask{}, workspace); }) ==
        "Encoder: y must be 4 x 24, got 5 x 24");
  CHECK(shape([&] {
          model.forward(x, FullMask{}, {2, 2});
        }) == "Encoder: the lengths of the sequences must add up to the 5 rows of x, got 4");
  CHECK(invalid([&] { model.forward(x, FullMask{}, {6, -1}); }) == "Encoder: a sequence cannot have -1 tokens");
  CHECK(invalid([&] { model.forward_into(y, x, SlidingWindowMask{-1}, tape, workspace); }) ==
        "Encoder: the window of SlidingWindowMask must be 0 or more, got -1");
  CHECK(invalid([&] { model.backward(x, tape, grad); }) ==
        "Encoder: backward needs a tape that forward(x, mask, tape) has filled");
  for (const auto& change : {+[](EncoderConfig<Attention>& c) { c.num_layers = 3; },
                             +[](EncoderConfig<Attention>& c) { c.activation = Activation::relu; },
                             +[](EncoderConfig<Attention>& c) { c.norm = NormKind::rms_norm; },
                             +[](EncoderConfig<Attention>& c) { c.norm_placement = NormPlacement::after; },
                             +[](EncoderConfig<Attention>& c) { c.attention.num_kv_heads = 2; }}) {
    auto changed = config;
    change(changed);
    const Model other(changed);
    Model::Tape of_other;
    Model other_grad = zeros_like(other);
    other.forward(x, FullMask{}, of_other);
    CHECK(invalid([&] { model.backward(x, of_other, grad); }) ==
          "Encoder: the tape was filled by an encoder of another configuration");
    model.forward(x, FullMask{}, tape);
    CHECK(invalid([&] { model.backward(x, tape, other_grad); }) ==
          "Encoder: grad must be an encoder of the same configuration");
    for (const double g : support::parameters_of(other_grad)) REQUIRE(g == 0);
  }
  CHECK(shape([&] { model.backward(x.topRows(4), tape, grad); }) == "Encoder: dy must be 5 x 24, got 4 x 24");
  CHECK(shape([&] { model.backward_into(y.topRows(4), x, tape, grad, workspace); }) ==
        "Encoder: dx must be 5 x 24, got 4 x 24");
  for (const double g : support::parameters_of(grad)) REQUIRE(g == 0);
  CHECK((y.array() == 7).all());
  // A forward that is refused leaves a tape that is not to be read.
  tape.filled = false;
  CHECK_THROWS_AS(model.forward(x.leftCols(3), FullMask{}, tape), ShapeError);
  CHECK_FALSE(tape.filled);
}
