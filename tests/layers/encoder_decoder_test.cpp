// An encoder and a decoder in a model of somebody's own: the decoder attends to itself behind a cache and to what the
// encoder made, which is kept. Token by token it is what it is at once, and it can be trained.

#include <diffattn/layers/kv_cache.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>

#include "layers/layer_checks.hpp"

namespace {

using diffattn::CausalMask;
using diffattn::FullMask;
using diffattn::Index;
using diffattn::KvCache;
using diffattn::Matrix;

/// source, target: tokens x embed_dim, already embedded.
class Translator {
  using Layer = diffattn::MultiheadDiffAttention<double>;
  using Rows = Matrix<double>;

 public:
  Translator()
      : encoder_({.embed_dim = 12, .num_heads = 2, .rotary = diffattn::RotaryConfig{}, .seed = 1}),
        decoder_({.embed_dim = 12, .num_heads = 2, .num_kv_heads = 1, .rotary = diffattn::RotaryConfig{}, .seed = 2}),
        cross_({.embed_dim = 12, .num_heads = 2, .num_kv_heads = 1, .depth = 2, .bias = true, .seed = 3}) {}

  struct Tape {
    Layer::Tape encoder, decoder, cross;
  };
  /// What a translation has so far: its own tokens, and the source.
  struct State {
    KvCache<double> own, memory;
  };

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    diffattn::visit_part("encoder", self.encoder_, visitor);
    diffattn::visit_part("decoder", self.decoder_, visitor);
    diffattn::visit_part("cross", self.cross_, visitor);
  }

  Rows forward(const Rows& source, const Rows& target, Tape& tape) const {
    const Rows memory = source + encoder_.forward(source, FullMask{}, tape.encoder);
    const Rows own = target + decoder_.forward(target, CausalMask{}, tape.decoder);
    return own + cross_.forward_cross(own, memory, FullMask{}, tape.cross);
  }

  /// {dsource, dtarget}
  std::pair<Rows, Rows> backward(const Rows& dy, const Tape& tape, Translator& grad) const {
    const auto [dx, dmemory] = cross_.backward_cross(dy, tape.cross, grad.cross_);
    const Rows down = dy + dx;
    return {dmemory + encoder_.backward(dmemory, tape.encoder, grad.encoder_),
            down + decoder_.backward(down, tape.decoder, grad.decoder_)};
  }

  State start(const Rows& source) const {
    State state;
    cross_.write_memory(source + encoder_.forward(source, FullMask{}), state.memory);
    return state;
  }

  Rows step(const Rows& tokens, State& state) const {
    const Rows own = tokens + decoder_.forward(tokens, state.own);
    return own + cross_.forward_cross(own, state.memory);
  }

 private:
  Layer encoder_, decoder_, cross_;
};

}  // namespace

TEST_CASE("A translation token by token is that at once", "[layers][cross_attention][kv_cache]") {
  auto rng = make_rng();
  Translator model;
  layer_checks::randomize(model, rng);
  const Matrix<double> source = random_matrix<double>(19, 12, rng), target = random_matrix<double>(31, 12, rng);
  Translator::Tape tape;
  const Matrix<double> whole = model.forward(source, target, tape);
  Translator::State state = model.start(source);
  Matrix<double> steps(31, 12);
  steps.topRows(7) = model.step(target.topRows(7), state);  // a beginning that is given
  Translator::State other = state;                          // two continuations of it
  for (Index i = 7; i < 31; ++i) steps.row(i) = model.step(target.row(i), state);
  CHECK((steps - whole).cwiseAbs().maxCoeff() <= 1e-12 * whole.cwiseAbs().maxCoeff());
  for (Index i = 7; i < 31; ++i) CHECK(identical(model.step(target.row(i), other), steps.row(i)));
  CHECK(state.memory.position() == 19);
  CHECK(state.own.position() == 31);
}

TEST_CASE("A model with cross-attention has the gradients that differences say",
          "[layers][cross_attention][gradients]") {
  auto rng = make_rng();
  Translator model, grad = diffattn::zeros_like(model);
  layer_checks::randomize(model, rng);
  Matrix<double> source = random_matrix<double>(4, 12, rng), target = random_matrix<double>(3, 12, rng);
  const Matrix<double> dy = random_matrix<double>(3, 12, rng);
  Translator::Tape tape;
  const auto loss = [&] { return model.forward(source, target, tape).cwiseProduct(dy).sum(); };
  model.forward(source, target, tape);
  const auto [dsource, dtarget] = model.backward(dy, tape, grad);
  CHECK(support::excess(dsource, support::numerical_gradient(source, loss)) <= 0);
  CHECK(support::excess(dtarget, support::numerical_gradient(target, loss)) <= 0);
  layer_checks::parameter_gradients(model, grad, loss);
}
