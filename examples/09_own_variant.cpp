// What you learn here: how to make an attention layer of your own, outside the library. A variant says what it does
// otherwise than the others; masks, sequences, caches, gradients, files and whole decoders come with it. This one is
// as audio models use it: V as wide as a key, no norm, a λ that is configured: y = Concat((P1_h − λ·P2_h) V_h) W_Oᵀ.

#include <cstdio>
#include <diffattn/diffattn.hpp>
#include <diffattn/io/parameters.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/models/generate.hpp>
#include <diffattn/training/adamw.hpp>
#include <filesystem>

namespace {

using diffattn::Index;
using diffattn::Matrix;

struct AudioAttentionConfig {
  Index embed_dim = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  double lambda = 0.5;
  std::optional<diffattn::RotaryConfig> rotary = std::nullopt;
  bool bias = false;
  std::uint64_t seed = 0;
};

/// What attention_variant.hpp asks for.
template <typename ScalarType, typename Weight = Matrix<ScalarType>>
struct AudioVariant {
  using Scalar = ScalarType;
  using Config = AudioAttentionConfig;
  using WeightMatrix = Weight;

  diffattn::Linear<Scalar, Weight> out_proj;  // embed_dim x num_heads·head_dim
  Scalar lambda;
  static constexpr const char* kName = "AudioAttention";
  static constexpr Index kQueryMaps = 2, kKeyMaps = 2;
  static constexpr auto kOutput = &AudioVariant::out_proj;
  static constexpr auto kLambda = diffattn::LambdaSource::layer;
  static constexpr bool kFinishesHeads = false;

  explicit AudioVariant(const Config& config)
      : out_proj(config.num_heads * config.head_dim, config.embed_dim, config.bias), lambda(Scalar(config.lambda)) {}

  static Index value_dim(const Config& config) { return config.head_dim; }
  void initialize(diffattn::Initializer& random) { out_proj.initialize(random); }
  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    diffattn::visit_part("out_proj", self.out_proj, visitor);
  }
  Scalar lambda_value() const { return lambda; }
  void backward_lambda(Scalar /*dlambda*/, AudioVariant& /*grad*/) const {}  // nothing that could learn
};

using AudioAttention = diffattn::AttentionLayer<AudioVariant<float>>;

}  // namespace

int main() {
  const AudioAttentionConfig config{.embed_dim = 32, .num_heads = 4, .rotary = diffattn::RotaryConfig{}, .seed = 1};
  AudioAttention layer(config);
  const Matrix<float> x = Matrix<float>::Random(48, 32);

  // It learns to repeat the token before: y[i] = x[i − 1], in two sequences.
  Matrix<float> target = Matrix<float>::Zero(48, 32);
  target.bottomRows(47) = x.topRows(47);
  target.row(24).setZero();
  diffattn::AdamW<float> optimizer(layer, {.learning_rate = 1e-2});
  AudioAttention::Tape tape;
  float loss = 0;
  for (int step = 0; step < 100; ++step) {
    const Matrix<float> dy = layer.forward(x, diffattn::CausalMask{}, {24, 24}, tape) - target;
    loss = dy.squaredNorm() / target.squaredNorm();
    AudioAttention grad = zeros_like(layer);
    layer.backward(dy, tape, grad);
    optimizer.step(layer, grad);
  }

  // Token by token behind a cache: the same numbers as in one call.
  const Matrix<float> whole = layer.forward(x);
  diffattn::KvCache cache;
  float difference = 0;
  for (Index i = 0; i < x.rows(); ++i) {
    difference = std::max(difference, (layer.forward(x.row(i), cache) - whole.row(i)).cwiseAbs().maxCoeff());
  }

  // It attends to another sequence, too, whose keys and values are kept.
  const Matrix<float> memory = Matrix<float>::Random(30, 32);
  diffattn::KvCache kept;
  layer.write_memory(memory, kept);
  const Matrix<float> crossed = layer.forward_cross(x, memory);
  difference = std::max(difference, (layer.forward_cross(x, kept) - crossed).cwiseAbs().maxCoeff());

  // Saved, loaded, and the attention of a decoder.
  const auto path = std::filesystem::temp_directory_path() / "diffattn_own_variant.safetensors";
  save_parameters(layer, path);
  AudioAttention loaded(config);
  load_parameters(loaded, diffattn::Safetensors(path.string()));
  std::filesystem::remove(path);
  const bool same = loaded.forward(x) == whole;
  const diffattn::Decoder<float, AudioAttention> model(
      {.vocab_size = 50, .num_layers = 2, .hidden_dim = 64, .attention = config});
  const auto tokens = generate(model, std::vector<Index>{1, 2, 3}, {.max_new_tokens = 5});
  std::printf("%ld parameters; after 100 steps %.3f of the target is left\n", parameter_count(layer), double(loss));
  std::printf("cached: largest difference %.1e; loaded: the same bits: %s\n", double(difference), same ? "yes" : "NO");
  return loss < 0.3f && difference < 1e-5f && same && tokens.size() == 5 ? 0 : 1;
}
