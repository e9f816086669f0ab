// The gradients of whole encoders by differences: every attention, norm and feed-forward layer.

#include <diffattn/kernels/bias.hpp>
#include <diffattn/kernels/learned_bias.hpp>
#include <diffattn/models/encoder.hpp>
#include <map>
#include <string>

#include "layers/layer_oracle.hpp"
#include "models/encoders.hpp"
#include "support/catch.hpp"
#include "support/numerical_gradient.hpp"
#include "support/random.hpp"

namespace encoder_gradients_test {

using namespace diffattn;
using support::excess;
using support::numerical_gradient;
using support::random_matrix;

template <typename Attention, typename Mask>
void check_gradients(const EncoderConfig<Attention>& config, const Mask& mask, support::Rng& rng) {
  Encoder<double, Attention> encoder(config);
  typename Encoder<double, Attention>::Tape tape;
  const std::vector<Index> lengths = {4, 1, 3};
  Matrix<double> x, dy = random_matrix<double>(8, config.attention.embed_dim, rng);
  const auto loss = [&] { return encoder.forward(x, mask, lengths, tape).cwiseProduct(dy).sum(); };
  for (double nearest = 0; nearest < 5e-3;) {  // of ReLU's inputs to its kink, across which no difference is a gradient
    encoders::randomize(encoder, rng);
    x = random_matrix<double>(8, config.attention.embed_dim, rng);
    loss();
    nearest = HUGE_VAL;
    for (const auto& block : tape.blocks) {
      if (config.activation == Activation::relu)
        nearest = std::min(nearest, block.feed_forward.up.cwiseAbs().minCoeff());
    }
  }

  auto grad = zeros_like(encoder);
  encoders::randomize(grad, rng);  // gradients are added to what is there
  const auto before = oracle::weights_of<double>(grad);
  const Matrix<double> dx = encoder.backward(dy, tape, grad);
  const auto after = oracle::weights_of<double>(grad);
  CHECK(excess(dx, numerical_gradient(x, loss, 1e-4)) <= 0);
  visit_parameters(encoder, [&](std::string_view view, auto& parameter) {
    const std::string name(view);
    INFO(name);
    CHECK(excess(after.at(name) - before.at(name), numerical_gradient(parameter, loss, 1e-4)) <= 0);
    CHECK_FALSE(after.at(name) == before.at(name));
  });
}

}  // namespace encoder_gradients_test

TEMPLATE_TEST_CASE("An encoder's gradients are what differences say", "[models][encoder][gradients]",
                   diffattn::MultiheadDiffAttention<double>, diffattn::MultiheadDiffAttentionV2<double>,
                   diffattn::MultiheadAttention<double>, encoders::OwnAttention<double>) {
  using namespace encoder_gradients_test;
  auto rng = support::make_rng();
  int number = 0;
  for (const auto placement : {NormPlacement::before, NormPlacement::after}) {
    for (const auto activation : {Activation::gelu, Activation::relu, Activation::swiglu}) {
      INFO("activation " << static_cast<int>(activation) << ", norms " << static_cast<int>(placement));
      const bool layer_norm = number++ % 2 == 0;
      const EncoderConfig<TestType> config{
          .num_layers = 2,
          .hidden_dim = 5,
          .attention = {.embed_dim = 8, .num_heads = 2, .num_kv_heads = 1, .bias = layer_norm},
          .activation = activation,
          .bias = layer_norm,
          .norm = layer_norm ? NormKind::layer_norm : NormKind::rms_norm,
          .norm_placement = placement,
          .norm_eps = 1e-3};
      if (number == 1) {
        check_gradients(config, with_bias(PaddingMask{3}, AlibiBias(alibi_slopes(2))), rng);
      } else {
        check_gradients(config, FullMask{}, rng);
      }
    }
  }
}

TEST_CASE("A bias that all layers of an encoder share is learned", "[models][encoder][gradients]") {
  using namespace encoder_gradients_test;
  using Attention = MultiheadDiffAttention<double>;
  auto rng = support::make_rng();
  const EncoderConfig<Attention> config{
      .num_layers = 2, .hidden_dim = 5, .attention = {.embed_dim = 8, .num_heads = 2}, .norm_eps = 1e-3};
  Encoder<double, Attention> encoder(config), grad = zeros_like(encoder), again = grad;
  encoders::randomize(encoder, rng);
  Matrix<double> table = random_matrix<double>(2, 5, rng), dbias = random_matrix<double>(2, 5, rng);
  const Matrix<double> before = dbias, x = random_matrix<double>(8, 8, rng), dy = random_matrix<double>(8, 8, rng);
  const std::vector<Index> lengths = {5, 3};
  Encoder<double, Attention>::Tape tape;
  const auto loss = [&] {
    return encoder.forward(x, with_bias(FullMask{}, RelativeBias(table)), lengths, tape).cwiseProduct(dy).sum();
  };
  loss();
  const Matrix<double> dx = encoder.backward(dy, tape, grad, dbias);
  CHECK(dx == encoder.backward(dy, tape, again));
  CHECK(excess(dbias - before, numerical_gradient(table, loss, 1e-4)) <= 0);
  loss();
  Matrix<double> narrow = table.leftCols(3);
  CHECK_THROWS_AS(encoder.backward(dy, tape, grad, narrow), ShapeError);
  encoder.forward(x, FullMask{}, lengths, tape);
  CHECK_THROWS_AS(encoder.backward(dy, tape, grad, dbias), std::invalid_argument);
  CHECK(oracle::weights_of<double>(grad) == oracle::weights_of<double>(again));  // nothing was added
}
