// What you learn here: a model of your own around an Encoder. A small vision transformer reads images of a large digit
// among small ones and noise, once with differential attention and once with standard attention of as many parameters.
// The model is a plain struct that says what its parameters are called; training, saving and loading come with that.
// Writes, for each head, what the class token attends to over the image. `--quick` trains for a moment only.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <diffattn/diffattn.hpp>
#include <diffattn/io/parameters.hpp>
#include <diffattn/models/encoder.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <diffattn/training/gradient_norm.hpp>
#include <diffattn/training/learning_rate.hpp>
#include <exception>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "support/attention_picture.hpp"
#include "support/digit_images.hpp"

using namespace diffattn;
using example::kPatches;
using example::Palette;

namespace {

constexpr Index kTokens = kPatches + 1, kClasses = 10;  // a class token, then the patches

/// Patches become tokens, a learned token stands before them and is read at the end.
template <typename Attention>
struct VisionTransformer {
  Linear<float> patch_proj;
  Matrix<float> positions;
  Eigen::RowVectorXf class_token;
  Encoder<float, Attention> encoder;
  Linear<float> head;

  explicit VisionTransformer(const EncoderConfig<Attention>& config)
      : patch_proj(example::kPatchSize * example::kPatchSize, config.attention.embed_dim, true),
        positions(kTokens, config.attention.embed_dim),
        class_token(config.attention.embed_dim),
        encoder(config),
        head(config.attention.embed_dim, kClasses, true) {
    Initializer random(config.seed);
    random.normal(positions, 0.02);
    random.normal(class_token, 0.02);
    patch_proj.initialize(random);
    head.initialize(random);
  }

  /// All that AdamW, gradient norms, zeros_like, files and parameter_count need to know (layers/parameters.hpp).
  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("patch_proj", self.patch_proj, visitor);
    visitor("positions", self.positions);
    visitor("class_token", self.class_token);
    visit_part("encoder", self.encoder, visitor);
    visit_part("head", self.head, visitor);
  }

  /// What backward needs of a forward pass.
  struct Tape {
    Matrix<float> patches, tokens, encoded, classes;
    typename Encoder<float, Attention>::Tape encoder;
  };

  /// (images x 10) of patches (images · 36 x 16); fills the tape.
  Matrix<float> logits(const Matrix<float>& patches, Tape& tape) const {
    const Index images = patches.rows() / kPatches;
    tape.patches = patches;
    const Matrix<float> embedded = patch_proj.forward(patches);
    tape.tokens.resize(images * kTokens, positions.cols());
    for (Index i = 0; i < images; ++i) {
      auto tokens = tape.tokens.middleRows(i * kTokens, kTokens);
      tokens.row(0) = class_token;
      tokens.bottomRows(kPatches) = embedded.middleRows(i * kPatches, kPatches);
      tokens += positions;
    }
    tape.encoded =
        encoder.forward(tape.tokens, FullMask{}, std::vector<Index>(std::size_t(images), kTokens), tape.encoder);
    tape.classes = tape.encoded(Eigen::seqN(0, images, kTokens), Eigen::all);
    return head.forward(tape.classes);
  }

  /// Adds the gradients of all parameters to those of `grad`.
  void backward(const Matrix<float>& dlogits, const Tape& tape, VisionTransformer& grad) const {
    const Index images = dlogits.rows();
    Workspace workspace;
    Matrix<float> dclasses(images, positions.cols()), dpatches(tape.patches.rows(), tape.patches.cols());
    head.backward_into(dclasses, dlogits, tape.classes, grad.head, workspace);
    Matrix<float> dtokens = Matrix<float>::Zero(images * kTokens, positions.cols());
    dtokens(Eigen::seqN(0, images, kTokens), Eigen::all) = dclasses;
    dtokens = encoder.backward(dtokens, tape.encoder, grad.encoder);
    Matrix<float> dembedded(images * kPatches, positions.cols());
    for (Index i = 0; i < images; ++i) {
      const auto tokens = dtokens.middleRows(i * kTokens, kTokens);
      grad.positions += tokens;
      grad.class_token += tokens.row(0);
      dembedded.middleRows(i * kPatches, kPatches) = tokens.bottomRows(kPatches);
    }
    patch_proj.backward_into(dpatches, dembedded, tape.patches, grad.patch_proj, workspace);
  }
};

template <typename Attention>
EncoderConfig<Attention> config_with(Index num_heads) {
  return {.num_layers = 3,
          .hidden_dim = 96,
          .attention = {.embed_dim = 48, .num_heads = num_heads},
          .activation = Activation::gelu,
          .bias = true,
          .seed = 1};
}

double accuracy(const Matrix<float>& logits, const std::vector<Index>& digits) {
  Index right = 0;
  for (Index i = 0; i < logits.rows(); ++i) {
    Index answer = 0;
    logits.row(i).maxCoeff(&answer);
    right += answer == digits[std::size_t(i)] ? 1 : 0;
  }
  return double(right) / double(logits.rows());
}

/// Trains on fresh images, or by heart on the same few, and returns the last loss.
template <typename Model>
double train(Model& model, Index steps, bool by_heart) {
  constexpr Index kBatch = 32;
  example::DigitPainter painter(7);
  AdamW<float> optimizer(model, {.weight_decay = 0.01});
  const LearningRate rate({.peak = 3e-3, .warmup_steps = steps / 10, .total_steps = steps});
  Model grad = zeros_like(model);
  typename Model::Tape tape;
  Workspace workspace;
  double loss = 0;
  for (Index step = 0; step < steps; ++step) {
    if (by_heart) painter = example::DigitPainter(7);
    const example::DigitImages batch = painter.paint(kBatch);
    Matrix<float> dlogits = model.logits(batch.patches, tape);
    loss = cross_entropy_into(dlogits, dlogits, batch.digits, kIgnoreTarget, workspace).mean;
    set_zero(grad);
    model.backward(dlogits, tape, grad);
    clip_gradient_norm(grad, 1.0);
    optimizer.step(model, grad, rate.at(step));
    if ((step + 1) % (steps / 4) == 0) {
      std::printf("  step %4ld  loss %.3f\n", step + 1, loss);
      std::fflush(stdout);
    }
  }
  return loss;
}

/// What the class token attends to, over the pixels of an image; returns where the picture is.
std::string save_attention(const std::string& name, std::size_t head, const AttentionMaps<float>& maps,
                           const Eigen::MatrixXd& image) {
  constexpr Index kAcross = example::kImageSize / example::kPatchSize;
  std::vector<example::Panel> panels{{"image", 0 * image, Palette::red, image}};
  const auto add = [&](const std::string& title, const Matrix<float>& map, Palette palette) {
    Eigen::MatrixXd weights(image.rows(), image.cols());
    for (Index y = 0; y < image.rows(); ++y) {
      for (Index x = 0; x < image.cols(); ++x) {
        weights(y, x) = double(map(0, 1 + y / example::kPatchSize * kAcross + x / example::kPatchSize));
      }
    }
    panels.push_back({title, weights, palette, image});
  };
  if (maps.p2.size() != 0) {
    add("P1", maps.p1, Palette::red);
    add("P2", maps.p2, Palette::blue);
  }
  add(maps.p2.size() != 0 ? "P1 - lambda P2" : "P", maps.combined, Palette::diverging);
  const std::string file = "digit_attention_" + name + "_head_" + std::to_string(head) + ".png";
  const std::string title = "The class token's attention, " + name + ", last layer, head " + std::to_string(head);
  return example::save_picture(file, title, panels, 10);
}

/// How much of the class token's attention in the last layer is on the large digit, a mean over heads and images; and
/// of the first image a picture for each head.
template <typename Attention>
void show_attention(const VisionTransformer<Attention>& model, const example::DigitImages& images,
                    const std::string& name) {
  constexpr Index kShown = 200;
  double share = 0;
  for (Index i = 0; i < kShown; ++i) {
    typename VisionTransformer<Attention>::Tape tape;
    model.logits(images.patches.middleRows(i * kPatches, kPatches), tape);
    const auto& attention = model.encoder.blocks.back().attention;
    const auto maps = attention_maps(attention, tape.encoder.blocks.back().attention.x, FullMask{});
    for (std::size_t head = 0; head < maps.size(); ++head) {
      const Eigen::RowVectorXd weights = maps[head].combined.row(0).tail(kPatches).template cast<double>().cwiseAbs();
      share +=
          weights(images.digit_patches[std::size_t(i)]).sum() / weights.sum() / double(kShown * Index(maps.size()));
      if (i == 0) std::printf("  %s\n", save_attention(name, head, maps[head], image_of(images, 0)).c_str());
    }
  }
  std::printf("  of the class token's attention to patches, %.2f is on the large digit\n", share);
}

struct Result {
  Index parameters;
  double loss, accuracy;
  bool same_after_loading;
};

template <typename Attention>
Result try_model(const std::string& name, Index num_heads, bool quick, const example::DigitImages& test) {
  const auto config = config_with<Attention>(num_heads);
  VisionTransformer<Attention> model(config), loaded(config);
  std::printf("%s attention, %ld heads: %ld parameters\n", name.c_str(), num_heads, parameter_count(model));
  const auto begin = std::chrono::steady_clock::now();
  Result result{parameter_count(model), train(model, quick ? 60 : 900, quick), 0, false};
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();

  const auto path = std::filesystem::temp_directory_path() / ("diffattn_digits_" + name + ".safetensors");
  save_parameters(model, path);
  load_parameters(loaded, Safetensors(path.string()));
  std::filesystem::remove(path);
  typename VisionTransformer<Attention>::Tape tape;
  const Matrix<float> logits = model.logits(test.patches, tape);
  result.same_after_loading = loaded.logits(test.patches, tape) == logits;
  result.accuracy = accuracy(logits, test.digits);
  std::printf("  %.1f s; right about %.3f of %zu images that it has not seen\n", seconds, result.accuracy,
              test.digits.size());
  show_attention(model, test, name);
  return result;
}

}  // namespace

int main(int argc, char** argv) try {
  const bool quick = argc > 1 && std::string_view(argv[1]) == "--quick";
  const example::DigitImages test = example::DigitPainter(1234).paint(quick ? 200 : 1000);
  const Result results[] = {try_model<MultiheadDiffAttention<float>>("differential", 2, quick, test),
                            try_model<MultiheadAttention<float>>("standard", 4, quick, test)};
  bool good = std::abs(double(results[0].parameters) / double(results[1].parameters) - 1) < 0.01;
  for (const Result& result : results) {
    good = good && result.same_after_loading && (quick ? result.loss < 0.5 : result.accuracy > 0.9);
  }
  std::printf(good ? "As it should be.\n" : "NOT as it should be.\n");
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return EXIT_FAILURE;
}
