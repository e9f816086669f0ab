#pragma once

// λ of a differential attention layer, eq. (2): exp(λq1·λk1) − exp(λq2·λk2) + λ_init.

#include <cmath>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/layers/initialization.hpp"

namespace diffattn::inline v0_1 {

/// 0.8 − 0.6·exp(−0.3·depth), depth the 0-based index of the layer (the paper's l − 1).
inline double lambda_init(double depth) { return 0.8 - 0.6 * std::exp(-0.3 * depth); }

/// The four learned vectors of width d, shared by all heads of a layer, and the constant λ_init.
template <typename Scalar>
class DiffLambda {
 public:
  /// Vectors of 0. Throws std::invalid_argument for a d that is negative or that no memory holds.
  DiffLambda(Index d, double lambda_init_value)
      : init(lambda_init_value), q1(detail::checked_product("DiffLambda", "d", {d})), k1(d), q2(d), k2(d) {
    for (Vector<Scalar>* vector : {&q1, &k1, &q2, &k2}) vector->setZero();
  }

  /// N(0, 0.1²), as the official code does it.
  void initialize(Initializer& random) {
    for (Vector<Scalar>* vector : {&q1, &k1, &q2, &k2}) random.normal(*vector, 0.1);
  }

  /// Any real number: nothing bounds it to [0, 1].
  Scalar value() const { return std::exp(dot(q1, k1)) - std::exp(dot(q2, k2)) + static_cast<Scalar>(init); }

  /// From the gradient of value(): what its vectors get is added to those of `grad`. λ_init is a constant.
  void backward(Scalar dvalue, DiffLambda& grad) const {
    const Scalar first = dvalue * std::exp(dot(q1, k1)), second = -dvalue * std::exp(dot(q2, k2));
    grad.q1 += first * k1;
    grad.k1 += first * q1;
    grad.q2 += second * k2;
    grad.k2 += second * q2;
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visitor("lambda_q1", self.q1);
    visitor("lambda_k1", self.k1);
    visitor("lambda_q2", self.q2);
    visitor("lambda_k2", self.k2);
  }

  double init;
  Vector<Scalar> q1, k1, q2, k2;

 private:
  static Scalar dot(const Vector<Scalar>& a, const Vector<Scalar>& b) {
    Scalar sum = 0;
    for (Index i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
  }
};

}  // namespace diffattn::inline v0_1
