#pragma once

// Attention layers of the lab's own: differential attention with its parts taken away one by one, and ordinary
// attention with the parts of the differential one added. What a variant has to say: attention_variant.hpp; the
// simplest is example 09.

#include <cmath>
#include <cstdint>
#include <diffattn/layers/attention_layer.hpp>
#include <diffattn/layers/lambda.hpp>
#include <diffattn/layers/rms_norm.hpp>
#include <optional>

namespace lab {

using diffattn::Index;

/// How the λ of a layer is made.
enum class LambdaForm {
  paper,  ///< exp(λq1·λk1) − exp(λq2·λk2) + λ_init, eq. (2)
  raw,    ///< one learned number, which begins at λ_init
  fixed,  ///< λ_init, for ever
};

struct AblatedConfig {
  Index embed_dim = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  Index depth = 0;
  std::optional<double> lambda_init = std::nullopt;
  std::optional<diffattn::RotaryConfig> rotary = std::nullopt;
  bool bias = false;
  std::uint64_t seed = 0;
  LambdaForm lambda_form = LambdaForm::paper;
  bool head_norm = true;
  bool head_scale = true;  ///< the factor 1 − λ_init
};

/// MultiheadDiffAttention, of which every part can be left out; with all of them it is the same.
template <typename ScalarType, typename Weight = diffattn::Matrix<ScalarType>>
class AblatedVariant {
 public:
  using Scalar = ScalarType;
  using Config = AblatedConfig;
  using WeightMatrix = Weight;

  Scalar lambda_value() const {
    if (forced_) return *forced_;
    if (form_ == LambdaForm::paper) return lambda.value();
    return form_ == LambdaForm::raw ? raw_lambda(0) : static_cast<Scalar>(lambda.init);
  }

  /// From now on λ is this number; what it was made of stays as it is.
  void force_lambda(Scalar value) { forced_ = value; }

  diffattn::Linear<Scalar, Weight> out_proj;
  diffattn::DiffLambda<Scalar> lambda;
  diffattn::RmsNorm<Scalar> subln;
  diffattn::Vector<Scalar> raw_lambda;

 protected:
  static constexpr const char* kName = "AblatedDiffAttention";
  static constexpr Index kQueryMaps = 2, kKeyMaps = 2;
  static constexpr auto kOutput = &AblatedVariant::out_proj;
  static constexpr auto kLambda = diffattn::LambdaSource::layer;
  static constexpr bool kFinishesHeads = true;

  explicit AblatedVariant(const Config& config)
      : out_proj(config.num_heads * value_dim(config), config.embed_dim, config.bias),
        lambda(config.lambda_form == LambdaForm::paper ? config.head_dim : 0,
               config.lambda_init.value_or(diffattn::lambda_init(static_cast<double>(config.depth)))),
        subln(value_dim(config), 1e-5, config.head_norm),
        form_(config.lambda_form),
        head_norm_(config.head_norm),
        scale_(config.head_scale ? static_cast<Scalar>(1 - lambda.init) : Scalar(1)) {
    if (form_ == LambdaForm::raw) raw_lambda.setConstant(1, static_cast<Scalar>(lambda.init));
  }

  static Index value_dim(const Config& config) { return 2 * config.head_dim; }
  void initialize(diffattn::Initializer& random) {
    out_proj.initialize(random);
    lambda.initialize(random);
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    diffattn::visit_part("out_proj", self.out_proj, visitor);
    if (self.form_ == LambdaForm::paper) diffattn::visit_parameters(self.lambda, visitor);
    if (self.form_ == LambdaForm::raw) visitor("lambda", self.raw_lambda);
    diffattn::visit_part("subln", self.subln, visitor);
  }

  void backward_lambda(Scalar dlambda, AblatedVariant& grad) const {
    if (form_ == LambdaForm::paper) lambda.backward(dlambda, grad.lambda);
    if (form_ == LambdaForm::raw) grad.raw_lambda(0) += dlambda;
  }

  template <typename Y, typename X, diffattn::Executor E>
  void finish_heads(Y& y, const X& x, diffattn::Workspace& workspace, E& executor) const {
    if (head_norm_) {
      subln.forward_into(y, x, workspace, executor, scale_);
    } else {
      y = scale_ * x;
    }
  }
  template <typename DX, typename DY, typename X, diffattn::Executor E>
  void backward_heads(DX& dx, const DY& dy, const X& x, AblatedVariant& grad, diffattn::Workspace& workspace,
                      E& executor) const {
    if (head_norm_) {
      subln.backward_into(dx, dy, x, grad.subln, workspace, executor, scale_);
    } else {
      dx = scale_ * dy;
    }
  }

 private:
  LambdaForm form_;
  std::optional<Scalar> forced_;
  bool head_norm_;
  Scalar scale_;
};

struct ControlConfig {
  Index embed_dim = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::optional<diffattn::RotaryConfig> rotary = std::nullopt;
  bool bias = false;
  std::uint64_t seed = 0;
  Index value_heads = 1;   ///< how many times as wide as a key a value is
  bool head_norm = false;  ///< an RMSNorm of every head, as the Differential Transformer has it
  bool head_sign = false;  ///< every head's result times a learned number, which begins at 1 and −1 by turns
};

/// MultiheadAttention with parts of the differential one, but without a difference.
template <typename ScalarType, typename Weight = diffattn::Matrix<ScalarType>>
class ControlVariant {
 public:
  using Scalar = ScalarType;
  using Config = ControlConfig;
  using WeightMatrix = Weight;

  diffattn::Linear<Scalar, Weight> out_proj;
  diffattn::RmsNorm<Scalar> subln;
  diffattn::Vector<Scalar> head_sign;  ///< num_heads, or none

 protected:
  static constexpr const char* kName = "ControlAttention";
  static constexpr Index kQueryMaps = 1, kKeyMaps = 1;
  static constexpr auto kOutput = &ControlVariant::out_proj;
  static constexpr auto kLambda = diffattn::LambdaSource::none;
  static constexpr bool kFinishesHeads = true;

  explicit ControlVariant(const Config& config)
      : out_proj(config.num_heads * value_dim(config), config.embed_dim, config.bias),
        subln(value_dim(config), 1e-5, config.head_norm),
        head_norm_(config.head_norm) {
    if (!config.head_sign) return;
    head_sign.resize(config.num_heads);
    for (Index head = 0; head < config.num_heads; ++head) head_sign(head) = Scalar(head % 2 == 0 ? 1 : -1);
  }

  static Index value_dim(const Config& config) { return config.value_heads * config.head_dim; }
  void initialize(diffattn::Initializer& random) { out_proj.initialize(random); }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    diffattn::visit_part("out_proj", self.out_proj, visitor);
    diffattn::visit_part("subln", self.subln, visitor);
    // "lambda", so that it does not decay.
    if (self.head_sign.size() != 0) visitor("lambda_sign", self.head_sign);
  }

  template <typename Y, typename X, diffattn::Executor E>
  void finish_heads(Y& y, const X& x, diffattn::Workspace& workspace, E& executor) const {
    if (head_norm_) {
      subln.forward_into(y, x, workspace, executor, Scalar(1));
    } else {
      y = x;
    }
    for (Index row = 0; head_sign.size() != 0 && row < y.rows(); ++row) {
      y.row(row) *= head_sign(row % head_sign.size());
    }
  }

  /// With a norm the sign stands behind it: its gradient is taken first, from the row as the norm left it.
  template <typename DX, typename DY, typename X, diffattn::Executor E>
  void backward_heads(DX& dx, const DY& dy, const X& x, ControlVariant& grad, diffattn::Workspace& workspace,
                      E& executor) const {
    dx = dy;
    if (head_sign.size() != 0) {
      diffattn::Vector<Scalar> normed(x.cols());
      for (Index row = 0; row < x.rows(); ++row) {
        normed = x.row(row).transpose();
        if (head_norm_) subln.apply(normed.data());
        const Index head = row % head_sign.size();
        grad.head_sign(head) += dx.row(row).dot(normed.transpose());
        dx.row(row) *= head_sign(head);
      }
    }
    if (head_norm_) subln.backward_into(dx, dx, x, grad.subln, workspace, executor, Scalar(1));
  }

 private:
  bool head_norm_;
};

using AblatedDiffAttention = diffattn::AttentionLayer<AblatedVariant<float>>;
using ControlAttention = diffattn::AttentionLayer<ControlVariant<float>>;

}  // namespace lab
