// A model of a user's own, with everything that layers/parameters.hpp says a model may have, through all that works on
// parameters.

#include <algorithm>
#include <array>
#include <cmath>
#include <diffattn/io/checkpoint.hpp>
#include <diffattn/io/parameters.hpp>
#include <diffattn/layers/layer_norm.hpp>
#include <diffattn/layers/linear.hpp>
#include <diffattn/layers/parameters.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/gradient_norm.hpp>
#include <filesystem>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/numerical_gradient.hpp"
#include "support/parameters_of.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"

namespace own_model_test {

using namespace diffattn;

/// x (n x 4) → (n x 2).
template <typename S>
struct OwnModel {
  Matrix<S> mixing{4, 4};                         // used twice: at the beginning and, transposed, at the end
  Eigen::Matrix<S, 1, Eigen::Dynamic> offset{4};  // a row
  std::vector<Linear<S>> layers;                  // as many as one likes
  std::array<LayerNorm<S>, 2> norms{LayerNorm<S>(4), LayerNorm<S>(4, 1e-5, true, false)};
  std::optional<Linear<S>> head;                    // or none
  Vector<S> scale{1};                               // one number
  Eigen::Matrix<S, 2, 4, Eigen::RowMajor> classes;  // of fixed size

  explicit OwnModel(std::size_t num_layers = 2, bool with_head = true) : layers(num_layers, Linear<S>(4, 4, true)) {
    if (with_head) head.emplace(4, 4);
    set_zero(*this);
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visitor("mixing", self.mixing);
    visitor("offset", self.offset);
    visit_part("layers", self.layers, visitor);
    visit_part("norms", self.norms, visitor);
    visit_part("head", self.head, visitor);
    visitor("scale", self.scale);
    visitor("classes", self.classes);
  }

  struct Tape {
    Matrix<S> x, last, mixed;
    std::vector<typename Linear<S>::Tape> layers;
    std::array<typename LayerNorm<S>::Tape, 2> norms;
    typename Linear<S>::Tape head;
  };

  Matrix<S> forward(const Matrix<S>& x, Tape& tape) const {
    tape.x = x;
    tape.layers.resize(layers.size());
    Matrix<S> h = (x * mixing).rowwise() + offset;
    for (std::size_t i = 0; i < layers.size(); ++i) h += Matrix<S>(layers[i].forward(h, tape.layers[i]));
    for (std::size_t i = 0; i < 2; ++i) h = norms[i].forward(h, tape.norms[i]);
    if (head) h = head->forward(h, tape.head);
    tape.last = h;
    tape.mixed = h * mixing.transpose();
    return scale(0) * tape.mixed * classes.transpose();
  }

  void backward(const Matrix<S>& dy, const Tape& tape, OwnModel& grad) const {
    grad.classes += scale(0) * dy.transpose() * tape.mixed;
    const Matrix<S> dscaled = dy * classes;
    grad.scale(0) += dscaled.cwiseProduct(tape.mixed).sum();
    const Matrix<S> dmixed = scale(0) * dscaled;
    grad.mixing += dmixed.transpose() * tape.last;
    Matrix<S> d = dmixed * mixing;
    if (head) d = head->backward(d, tape.head, *grad.head);
    for (std::size_t i = 2; i-- > 0;) d = norms[i].backward(d, tape.norms[i], grad.norms[i]);
    for (std::size_t i = layers.size(); i-- > 0;) d += Matrix<S>(layers[i].backward(d, tape.layers[i], grad.layers[i]));
    grad.offset += d.colwise().sum();
    grad.mixing += tape.x.transpose() * d;
  }
};

template <typename S>
void randomize(OwnModel<S>& model, support::Rng& rng) {
  visit_parameters(model,
                   [&](std::string_view, auto& p) { p = S(0.5) * support::random_matrix<S>(p.rows(), p.cols(), rng); });
}

template <typename Model>
std::string names_of(Model& model) {
  std::string names;
  visit_parameters(model, [&](std::string_view name, auto& p) {
    constexpr bool kReadOnly = std::is_const_v<std::remove_reference_t<decltype(p)>>;
    static_assert(kReadOnly == std::is_const_v<Model>);
    names.append(name).append(" ").append(std::to_string(p.rows())).append("x").append(std::to_string(p.cols())) += ' ';
  });
  return names;
}

/// Removed when it goes.
struct TemporaryFile {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("diffattn_own_model_" + std::to_string(std::random_device{}()));
  ~TemporaryFile() { std::filesystem::remove(path); }
};

}  // namespace own_model_test

TEST_CASE("A model of one's own is visited part by part", "[training][own_model]") {
  using namespace own_model_test;
  OwnModel<float> model;
  const OwnModel<float>& constant = model;
  const std::string
      begin =
          "mixing 4x4 offset 1x4 layers.0.weight 4x4 layers.0.bias 4x1 layers.1.weight 4x4 layers.1.bias 4x1 "
          "norms.0.weight 4x1 norms.0.bias 4x1 norms.1.weight 4x1 ",
      end = "scale 1x1 classes 2x4 ";
  CHECK(names_of(model) == begin + "head.weight 4x4 " + end);
  CHECK(names_of(constant) == names_of(model));
  CHECK(names_of(constant) == names_of(static_cast<OwnModel<float>&>(model)));
  OwnModel<float> without(2, false);
  CHECK(names_of(without) == begin + end);
  CHECK(parameter_count(model) == 16 + 4 + 2 * 20 + 8 + 4 + 16 + 1 + 8);
  CHECK(parameter_count(without) == parameter_count(model) - 16);

  std::string of_parts;
  visit_part("whole", constant, [&](std::string_view name, const auto&) { of_parts.append(name) += ' '; });
  CHECK(of_parts.find("whole.layers.1.bias whole.norms.0.weight") != of_parts.npos);
}

TEST_CASE("A model of one's own has the gradients that differences say", "[training][own_model][gradients]") {
  using namespace own_model_test;
  auto rng = support::make_rng();
  OwnModel<double> model, grad = zeros_like(model);
  randomize(model, rng);
  const auto zeros = support::parameters_of(zeros_like(model));
  CHECK(std::all_of(zeros.begin(), zeros.end(), [](double v) { return v == 0; }));
  const Matrix<double> x = support::random_matrix<double>(7, 4, rng), dy = support::random_matrix<double>(7, 2, rng);
  OwnModel<double>::Tape tape;
  const auto loss = [&] { return model.forward(x, tape).cwiseProduct(dy).sum(); };
  loss();
  model.backward(dy, tape, grad);
  std::map<std::string, Matrix<double>> gradients;
  visit_parameters(grad, [&](std::string_view name, const auto& g) { gradients[std::string(name)] = g; });
  visit_parameters(model, [&](std::string_view name, auto& p) {
    INFO(std::string(name));
    const Matrix<double> numeric = support::numerical_gradient(p, loss, 1e-4);
    CHECK(support::excess(gradients.at(std::string(name)), numeric) <= 0);
    CHECK_FALSE(numeric.isZero(1e-6));
  });

  double squares = 0;
  for (const double g : support::parameters_of(grad)) squares += g * g;
  const double norm = std::sqrt(squares);
  CHECK(std::abs(gradient_norm(grad) - norm) <= 1e-14 * norm);
  CHECK(std::abs(clip_gradient_norm(grad, norm / 4) - norm) <= 1e-14 * norm);
  CHECK(std::abs(gradient_norm(grad) - norm / 4) <= 1e-5 * norm);
  set_zero(grad);
  CHECK(gradient_norm(grad) == 0);
}

TEST_CASE("A model of one's own is trained, saved and loaded", "[training][own_model]") {
  using namespace own_model_test;
  auto rng = support::make_rng();
  OwnModel<float> model;
  randomize(model, rng);
  const Matrix<float> x = support::random_matrix<float>(30, 4, rng), target = x.leftCols(2);
  OwnModel<float>::Tape tape;
  const auto error = [&] { return (model.forward(x, tape) - target).squaredNorm() / target.squaredNorm(); };
  const float before = error();
  AdamW<float> optimizer(model, {.learning_rate = 1e-2});
  const auto train = [&](OwnModel<float>& which, AdamW<float>& by, int steps) {
    for (int step = 0; step < steps; ++step) {
      OwnModel<float> grad = zeros_like(which);
      which.backward(which.forward(x, tape) - target, tape, grad);
      by.step(which, grad);
    }
  };
  train(model, optimizer, 200);
  CHECK(error() < 0.5f * before);

  const TemporaryFile file, checkpoint, headless;
  save_parameters(model, file.path, "own.");
  OwnModel<float> loaded;
  load_parameters(loaded, Safetensors(file.path.string()), "own.");
  CHECK(support::parameters_of(loaded) == support::parameters_of(model));
  CHECK(loaded.forward(x, tape) == model.forward(x, tape));

  save_checkpoint(model, optimizer, checkpoint.path);
  OwnModel<float> resumed;
  AdamW<float> its_optimizer(resumed, {.learning_rate = 1e-2});
  load_checkpoint(resumed, its_optimizer, checkpoint.path);
  train(resumed, its_optimizer, 5);
  train(model, optimizer, 5);
  CHECK(support::parameters_of(resumed) == support::parameters_of(model));

  // Another shape of the same class is told what it lacks, and stays as it was.
  OwnModel<float> without(1, false);
  CHECK_THROWS_AS(optimizer.step(without, without), ShapeError);
  CHECK_THROWS_AS(load_parameters(without, Safetensors(file.path.string()), "own."), FormatError);
  const auto untouched = support::parameters_of(without);
  CHECK(std::all_of(untouched.begin(), untouched.end(), [](double v) { return v == 0; }));
}
