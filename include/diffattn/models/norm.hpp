#pragma once

// Norm: a LayerNorm or an RmsNorm, whichever a configuration names. What they compute, and what an encoder asks of
// either, stands in layer_norm.hpp and rms_norm.hpp.
//
// Parameters (visit_parameters): weight, and of a LayerNorm bias.
//
// Tested by tests/models/encoder_test.cpp.

#include <variant>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/layers/layer_norm.hpp"
#include "diffattn/layers/rms_norm.hpp"

namespace diffattn::inline v0_1 {

enum class NormKind { layer_norm, rms_norm };

template <typename Scalar>
class Norm {
 public:
  /// Weight 1, bias 0. Throws std::invalid_argument for a width that is negative or that no memory holds.
  Norm(NormKind kind, Index width, double eps) : norm_(LayerNorm<Scalar>(width, eps)) {
    if (kind == NormKind::rms_norm) norm_ = RmsNorm<Scalar>(width, eps);
  }

  /// Which norm it is.
  NormKind kind() const { return norm_.index() == 0 ? NormKind::layer_norm : NormKind::rms_norm; }

  /// y = norm(x) for `rows` rows, one after another in memory; y may be x.
  template <Executor E>
  void forward_rows(Scalar* y, const Scalar* x, Index rows, E& executor) const {
    visit_norm([&](const auto& norm) { norm.forward_rows(y, x, rows, executor); });
  }

  /// sum += x, y = norm(sum); y may be sum.
  template <Executor E>
  void add_forward_rows(Scalar* y, Scalar* sum, const Scalar* x, Index rows, E& executor) const {
    visit_norm([&](const auto& norm) { norm.add_forward_rows(y, sum, x, rows, executor); });
  }

  /// dx, which may be dy, from dy and the x that forward_rows was given; the parameters' gradients are added to those
  /// of `grad`. Throws std::invalid_argument for a `grad` of another kind, ShapeError for one of another width.
  template <Executor E>
  void backward_rows(Scalar* dx, const Scalar* dy, const Scalar* x, Index rows, Norm& grad, Store store,
                     Workspace& workspace, E& executor) const {
    if (grad.kind() != kind()) detail::throw_invalid({"Norm: grad must be a norm of the same kind"});
    visit_norm([&]<typename Kind>(const Kind& norm) {
      norm.backward_rows(dx, dy, x, rows, *std::get_if<Kind>(&grad.norm_), store, workspace, executor);
    });
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    std::visit([&](auto& norm) { visit_parameters(norm, visitor); }, self.norm_);
  }

 private:
  template <typename F>
  void visit_norm(F&& f) const {
    std::visit(f, norm_);
  }

  std::variant<LayerNorm<Scalar>, RmsNorm<Scalar>> norm_;
};

}  // namespace diffattn::inline v0_1
