#pragma once

// AdamW (Loshchilov and Hutter, arXiv 1711.05101): Adam with decoupled weight decay, the update that torch.optim.AdamW
// documents. For every parameter p with gradient g, at step t = 1, 2, …:
//
//   p ← p − lr·weight_decay·p
//   m ← β1·m + (1 − β1)·g            v ← β2·v + (1 − β2)·g²
//   p ← p − lr · (m / (1 − β1^t)) / (sqrt(v / (1 − β2^t)) + eps)
//
// Works on any object that visit_parameters visits; the gradient is an object with the same parameters, as backward
// accumulates it. A function of the name puts each parameter into a group, which scales its rate and its decay; the
// default exempts norms, biases and λ from decay, which would otherwise be pulled to 0 for nothing.
//
// State    step count and both moments, which visit_parameters visits as first_moment.<name> and second_moment.<name>.
// Errors   ShapeError, before any work, if the parameters of model or gradient are not those it was made for;
//          std::invalid_argument for a learning rate that is not finite. std::bad_alloc comes before any work, too.
//          A NaN or Inf in the gradient goes into the parameter and its moments: look at the norm before.
// Memory   two moments of each parameter, at construction.
// Threads  element by element: the same bits for any executor.

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/layers/parameters.hpp"

namespace diffattn::inline v0_1 {

struct AdamWConfig {
  double learning_rate = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.01;
};

/// What a parameter's name changes about its update.
struct AdamWGroup {
  double learning_rate_factor = 1;
  double weight_decay_factor = 1;
};

/// No decay for norms, biases and what makes λ, told by the parts of the name: "subln", "…norm…", "bias", "lambda…".
inline AdamWGroup adamw_group(std::string_view name) {
  bool decays = true;
  for (std::size_t begin = 0; begin <= name.size();) {
    const std::size_t end = std::min(name.find('.', begin), name.size());
    const std::string_view part = name.substr(begin, end - begin);
    if (part.find("norm") != part.npos || part == "subln" || part == "bias" || part.substr(0, 6) == "lambda") {
      decays = false;
    }
    begin = end + 1;
  }
  return {.weight_decay_factor = decays ? 1.0 : 0.0};
}

namespace detail {

/// One step of AdamW on arrays, in chunks of a fixed size: every element sees the same instructions wherever it lies,
/// so results depend on neither alignment nor how the work was split.
template <typename Scalar>
struct AdamWStep {
  static constexpr Index kChunk = 64;
  using Chunk = Eigen::Array<Scalar, kChunk, 1>;

  Scalar keep;  // 1 − lr·weight_decay
  Scalar beta1, beta2;
  Scalar rest1, rest2;        // 1 − β1, 1 − β2, rounded once: 1 − float(0.999) is 0.001 to five digits only
  Scalar step_size;           // lr / (1 − β1^t)
  Scalar root_of_correction;  // sqrt(1 − β2^t)
  Scalar eps;

  void apply(Scalar* p, const Scalar* g, Scalar* m, Scalar* v, Index count) const {
    Index i = 0;
    for (; i + kChunk <= count; i += kChunk) apply_chunk(p + i, g + i, m + i, v + i);
    if (i == count) return;
    Scalar padded[4][kChunk] = {};
    const Index rest = count - i;
    std::copy_n(p + i, rest, padded[0]);
    std::copy_n(g + i, rest, padded[1]);
    std::copy_n(m + i, rest, padded[2]);
    std::copy_n(v + i, rest, padded[3]);
    apply_chunk(padded[0], padded[1], padded[2], padded[3]);
    std::copy_n(padded[0], rest, p + i);
    std::copy_n(padded[2], rest, m + i);
    std::copy_n(padded[3], rest, v + i);
  }

 private:
  void apply_chunk(Scalar* p, const Scalar* g, Scalar* m, Scalar* v) const {
    Eigen::Map<Chunk> parameter(p), first(m), second(v);
    const Eigen::Map<const Chunk> gradient(g);
    first = beta1 * first + rest1 * gradient;
    second = beta2 * second + rest2 * gradient.square();
    parameter = keep * parameter - step_size * (first / (second.sqrt() / root_of_correction + eps));
  }
};

}  // namespace detail

template <typename Scalar>
class AdamW {
 public:
  using GroupOf = std::function<AdamWGroup(std::string_view name)>;

  /// Throws std::invalid_argument for a β outside [0, 1), or an eps, rate or decay that is negative.
  template <typename Model>
  explicit AdamW(const Model& model, const AdamWConfig& config = {}, const GroupOf& group_of = adamw_group)
      : config_(checked(config)) {
    visit_parameters(model, [&](std::string_view name, const auto& parameter) {
      static_assert(std::is_same_v<typename std::decay_t<decltype(parameter)>::Scalar, Scalar>,
                    "diffattn: AdamW and the model must have the same scalar");
      const Matrix<Scalar> zero = Matrix<Scalar>::Zero(parameter.rows(), parameter.cols());
      slots_.push_back({std::string(name), group_of(name), zero, zero});
    });
  }

  /// What the optimiser was made with.
  const AdamWConfig& config() const { return config_; }

  /// Updates `model` by `gradient`, which has the same parameters, at the configured learning rate. Throws ShapeError
  /// before any work for parameters that are not those it was made for.
  template <typename Model>
  void step(Model& model, const Model& gradient) {
    step(model, gradient, config_.learning_rate);
  }

  /// The same at a learning rate of its own, with work spread over `executor`. Throws std::invalid_argument, too, for a
  /// rate that is not finite.
  template <typename Model, Executor E = Serial>
  void step(Model& model, const Model& gradient, double learning_rate, E&& executor = {}) {
    check("model", model);
    check("gradient", gradient);
    if (!std::isfinite(learning_rate)) {
      detail::throw_invalid({kName, ": the learning rate must be finite, got ", std::to_string(learning_rate).c_str()});
    }
    // All lists before the first update: names are strings, and visiting may find no memory for them.
    struct Piece {
      detail::AdamWStep<Scalar> update;
      Scalar* parameter;
      const Scalar* gradient;
      Scalar *first_moment, *second_moment;
      Index count;
    };
    std::vector<Piece> pieces;
    const std::vector<const Scalar*> gradients = values_of<const Scalar>(gradient);
    std::size_t index = 0;
    visit_parameters(model, [&](std::string_view /*name*/, auto& parameter) {
      Slot& slot = slots_[index];
      const Scalar* const g = gradients[index++];
      const detail::AdamWStep<Scalar> update = update_of(slot.group, learning_rate, steps + 1);
      constexpr Index kPiece = 1 << 14;
      for (Index at = 0; at < parameter.size(); at += kPiece) {
        pieces.push_back({update, parameter.data() + at, g + at, slot.first_moment.data() + at,
                          slot.second_moment.data() + at, std::min(kPiece, parameter.size() - at)});
      }
    });
    ++steps;
    executor.run(static_cast<Index>(pieces.size()), [&](Index task, Index /*worker*/) {
      const Piece& p = pieces[static_cast<std::size_t>(task)];
      p.update.apply(p.parameter, p.gradient, p.first_moment, p.second_moment, p.count);
    });
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    for (auto& slot : self.slots_) visitor(std::string_view("first_moment." + slot.name), slot.first_moment);
    for (auto& slot : self.slots_) visitor(std::string_view("second_moment." + slot.name), slot.second_moment);
  }

  Index steps = 0;  ///< taken so far: t

 private:
  static constexpr const char* kName = "AdamW";

  struct Slot {
    std::string name;
    AdamWGroup group;
    Matrix<Scalar> first_moment, second_moment;
  };

  static AdamWConfig checked(const AdamWConfig& config) {
    // Written so that NaN fails as well.
    const auto is_beta = [](double beta) { return beta >= 0 && beta < 1; };
    if (!is_beta(config.beta1) || !is_beta(config.beta2)) {
      detail::throw_invalid({kName, ": beta1 and beta2 must be in [0, 1)"});
    }
    if (!(config.learning_rate >= 0 && config.eps >= 0 && config.weight_decay >= 0)) {
      detail::throw_invalid({kName, ": learning_rate, eps and weight_decay must not be negative"});
    }
    if (!std::isfinite(config.learning_rate + config.eps + config.weight_decay)) {
      detail::throw_invalid({kName, ": learning_rate, eps and weight_decay must be finite"});
    }
    return config;
  }

  detail::AdamWStep<Scalar> update_of(const AdamWGroup& group, double learning_rate, Index step) const {
    const auto t = static_cast<double>(step);
    const double correction1 = 1 - std::pow(config_.beta1, t), correction2 = 1 - std::pow(config_.beta2, t);
    const double rate = learning_rate * group.learning_rate_factor;
    return {.keep = static_cast<Scalar>(1 - rate * config_.weight_decay * group.weight_decay_factor),
            .beta1 = static_cast<Scalar>(config_.beta1),
            .beta2 = static_cast<Scalar>(config_.beta2),
            .rest1 = static_cast<Scalar>(1 - config_.beta1),
            .rest2 = static_cast<Scalar>(1 - config_.beta2),
            .step_size = static_cast<Scalar>(rate / correction1),
            .root_of_correction = static_cast<Scalar>(std::sqrt(correction2)),
            .eps = static_cast<Scalar>(config_.eps)};
  }

  template <typename Model>
  void check(const char* what, const Model& model) const {
    std::size_t index = 0;
    visit_parameters(model, [&](std::string_view name, const auto& parameter) {
      const std::string called(name);
      if (index == slots_.size() || slots_[index].name != name) {
        detail::throw_shape({kName, ": it was made for a model without the ", what, "'s ", called.c_str()});
      }
      const Matrix<Scalar>& moment = slots_[index++].first_moment;
      detail::check_shape(kName, ("the " + std::string(what) + "'s " + called).c_str(), parameter, moment.rows(),
                          moment.cols());
    });
    if (index != slots_.size()) {
      detail::throw_shape({kName, ": the ", what, " lacks ", slots_[index].name.c_str()});
    }
  }

  template <typename Value, typename Model>
  static std::vector<Value*> values_of(Model& model) {
    std::vector<Value*> values;
    visit_parameters(model, [&](std::string_view /*name*/, auto& p) { values.push_back(p.data()); });
    return values;
  }

  AdamWConfig config_;
  std::vector<Slot> slots_;
};

}  // namespace diffattn::inline v0_1
