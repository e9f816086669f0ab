#pragma once

// A variant of attention that is not the library's.

#include <cstdint>
#include <diffattn/layers/attention_layer.hpp>
#include <optional>
#include <string_view>

namespace layer_checks {

using diffattn::Index;
using diffattn::Matrix;

struct OwnConfig {
  Index embed_dim = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::optional<diffattn::RotaryConfig> rotary = std::nullopt;
  bool bias = false;
  std::uint64_t seed = 0;
};

/// What the library's variants do not have together: keys of a pair shared, values of width 3, one learned λ, and a
/// gain for each column of a head.
template <typename ScalarType>
struct OwnVariant {
  using Scalar = ScalarType;
  using Config = OwnConfig;
  using WeightMatrix = Matrix<Scalar>;

  diffattn::Linear<Scalar> mix;
  diffattn::Vector<Scalar> lambda;  // 1
  diffattn::Vector<Scalar> gain;    // 3

  static constexpr const char* kName = "OwnAttention";
  static constexpr Index kQueryMaps = 2, kKeyMaps = 1;
  static constexpr auto kOutput = &OwnVariant::mix;
  static constexpr auto kLambda = diffattn::LambdaSource::layer;
  static constexpr bool kFinishesHeads = true;

  explicit OwnVariant(const Config& config)
      : mix(config.num_heads * value_dim(config), config.embed_dim, config.bias), lambda(1), gain(3) {}

  static Index value_dim(const Config& /*config*/) { return 3; }
  void initialize(diffattn::Initializer& random) {
    mix.initialize(random);
    lambda.setConstant(Scalar(0.25));
    gain.setOnes();
  }
  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    diffattn::visit_part("mix", self.mix, visitor);
    visitor("lambda", self.lambda);
    visitor("gain", self.gain);
  }
  Scalar lambda_value() const { return lambda[0]; }
  void backward_lambda(Scalar dlambda, OwnVariant& grad) const { grad.lambda[0] += dlambda; }

  template <typename Y, typename X, typename E>
  void finish_heads(Y& y, const X& x, diffattn::Workspace& /*workspace*/, E& /*executor*/) const {
    for (Index i = 0; i < x.rows(); ++i) y.row(i) = x.row(i).cwiseProduct(gain.transpose());
  }
  template <typename DX, typename DY, typename X, typename E>
  void backward_heads(DX& dx, const DY& dy, const X& x, OwnVariant& grad, diffattn::Workspace& /*workspace*/,
                      E& /*executor*/) const {
    for (Index i = 0; i < x.rows(); ++i) {
      grad.gain += dy.row(i).cwiseProduct(x.row(i)).transpose();
      dx.row(i) = dy.row(i).cwiseProduct(gain.transpose());
    }
  }
};

template <typename Scalar>
using OwnAttention = diffattn::AttentionLayer<OwnVariant<Scalar>>;

inline const OwnConfig kOwnConfig{.embed_dim = 10,
                                  .num_heads = 4,
                                  .num_kv_heads = 2,
                                  .head_dim = 4,
                                  .rotary = diffattn::RotaryConfig{},
                                  .bias = true};

}  // namespace layer_checks
