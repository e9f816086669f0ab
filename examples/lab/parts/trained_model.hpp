#pragma once

// Model for any attention layer. Included by the few files that compile one: model_*.cpp.

#include <cmath>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/models/decoder.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/cross_entropy.hpp>
#include <diffattn/training/gradient_norm.hpp>
#include <span>
#include <stdexcept>
#include <type_traits>

#include "parts/model.hpp"
#include "parts/rounded.hpp"

namespace lab {

template <typename Attention>
class TrainedModel final : public Model {
 public:
  using Decoder = diffattn::Decoder<float, Attention>;

  explicit TrainedModel(const typename Decoder::Config& config)
      : decoder_(config),
        gradient_(diffattn::zeros_like(decoder_)),
        optimizer_(decoder_, {.beta2 = 0.99, .weight_decay = 0.1}) {}

  Index parameters() const override { return parameter_count(decoder_); }
  Index hidden_dim() const override { return decoder_.config().hidden_dim; }

  StepResult step(const TaskBatch& batch, double learning_rate, diffattn::ThreadPool& pool) override {
    const StepResult result = gradient(batch, pool);
    if (std::isfinite(result.loss) && std::isfinite(result.gradient_norm)) {
      optimizer_.step(decoder_, gradient_, learning_rate, pool);
    }
    return result;
  }

  StepResult gradient(const TaskBatch& batch, diffattn::ThreadPool& pool) override {
    forward(batch, pool);
    StepResult result{};
    result.loss = cross_entropy_into(logits_, logits_, batch.targets, diffattn::kIgnoreTarget, workspace_, pool).mean;
    set_zero(gradient_, pool);
    decoder_.backward(logits_, tape_, gradient_, workspace_, pool);
    result.gradient_norm = clip_gradient_norm(gradient_, 1.0, pool);
    return result;
  }

  const Matrix<float>& logits(const TaskBatch& batch, diffattn::ThreadPool& pool) override {
    forward(batch, pool);
    return logits_;
  }

  diffattn::ModelMaps<float> maps(const std::vector<Index>& tokens) const override {
    return attention_maps(decoder_, tokens);
  }

  std::vector<HeadOutputs> head_outputs(const std::vector<Index>& tokens) const override {
    std::vector<HeadOutputs> all;
    const typename Decoder::Tape tape = tape_of(tokens, {static_cast<Index>(tokens.size())});
    for (std::size_t layer = 0; layer < decoder_.blocks.size(); ++layer) {
      const auto& attention = decoder_.blocks[layer].attention;
      HeadOutputs heads;
      heads.before = tape.blocks[layer].attention.attended;
      heads.after = heads.before;
      heads.head_width = heads.before.cols() / attention.config().num_heads;
      if constexpr (requires { attention.finished(heads.before); }) {
        heads.after = attention.finished(heads.before);
      } else if constexpr (requires {
                             attention.subln;
                             attention.lambda.init;
                           }) {
        Eigen::Map<Matrix<float>> rows(heads.after.data(), heads.after.size() / heads.head_width, heads.head_width);
        rows = attention.subln.forward(Matrix<float>(rows)) * static_cast<float>(1 - attention.lambda.init);
      }
      all.push_back(std::move(heads));
    }
    return all;
  }

  std::vector<double> lambdas(const TaskBatch& batch) const override {
    std::vector<double> all;
    if constexpr (requires(const Attention& attention) { attention.lambda_value(); }) {
      for (const auto& block : decoder_.blocks) all.push_back(static_cast<double>(block.attention.lambda_value()));
    } else if constexpr (requires(const Attention& attention) { attention.lambda_proj; }) {
      const typename Decoder::Tape tape = tape_of(batch.inputs, batch.lengths);
      for (const auto& block : tape.blocks) all.push_back(static_cast<double>(block.attention.lambda.mean()));
    }
    return all;
  }

  bool force_lambda(double value) override {
    for (auto& block : decoder_.blocks) {
      Attention& attention = block.attention;
      if constexpr (requires { attention.force_lambda(1.0F); }) {
        attention.force_lambda(static_cast<float>(value));
      } else if constexpr (requires { attention.lambda.q1; }) {
        // λ = exp(λq1·λk1) − exp(λq2·λk2) + λ_init, and λ_init also scales the heads: so one exponential is 1 and the
        // other what is missing.
        auto& lambda = attention.lambda;
        for (auto* vector : {&lambda.q1, &lambda.k1, &lambda.q2, &lambda.k2}) vector->setZero();
        const double more = value - lambda.init;
        (more > 0 ? lambda.q1 : lambda.q2)(0) = static_cast<float>(std::log1p(std::abs(more)));
        (more > 0 ? lambda.k1 : lambda.k2)(0) = 1;
      } else {
        return false;
      }
    }
    return true;
  }

  Matrix<float> rounded(const std::vector<Index>& tokens, int bits, InnerValues* seen) const override {
    if constexpr (std::is_same_v<Attention, diffattn::MultiheadAttention<float>> ||
                  std::is_same_v<Attention, diffattn::MultiheadDiffAttention<float>>) {
      return rounded_logits(decoder_, tokens, bits, seen);
    } else {
      throw std::runtime_error("scores can be rounded of transformer, differential and grouped only");
    }
  }

  void decode(const std::vector<Index>& tokens, Index prompt, const std::function<void()>& between) const override {
    auto cache = decoder_.make_cache();
    diffattn::Workspace workspace;
    Matrix<float> logits(1, decoder_.config().vocab_size);
    decoder_.last_logits_into(logits, std::span(tokens).first(static_cast<std::size_t>(prompt)), cache,
                              diffattn::CausalMask{}, prompt, workspace);
    between();
    for (std::size_t i = static_cast<std::size_t>(prompt); i < tokens.size(); ++i) {
      decoder_.logits_into(logits, std::span(tokens).subspan(i, 1), cache, diffattn::CausalMask{}, workspace);
    }
    between();
  }

  Index steps_done() const override { return optimizer_.steps; }
  void save(const std::filesystem::path& path, const diffattn::TrainingState& state) const override {
    save_checkpoint(decoder_, optimizer_, path, state);
  }
  diffattn::TrainingState load(const std::filesystem::path& path) override {
    return load_checkpoint(decoder_, optimizer_, path);
  }

  const Decoder& decoder() const { return decoder_; }

 private:
  void forward(const TaskBatch& batch, diffattn::ThreadPool& pool) {
    logits_.resize(static_cast<Index>(batch.inputs.size()), decoder_.config().vocab_size);
    decoder_.logits_into(logits_, batch.inputs, batch.lengths, tape_, workspace_, pool);
  }

  typename Decoder::Tape tape_of(const std::vector<Index>& tokens, const std::vector<Index>& lengths) const {
    typename Decoder::Tape tape;
    decoder_.logits(tokens, lengths, tape);
    return tape;
  }

  Decoder decoder_, gradient_;
  diffattn::AdamW<float> optimizer_;
  typename Decoder::Tape tape_;
  diffattn::Workspace workspace_;
  Matrix<float> logits_;
};

/// The configuration of a decoder that has nothing of its own but its attention.
template <typename Attention>
diffattn::DecoderConfig<Attention> decoder_config(const ModelSpec& spec, const typename Attention::Config& attention) {
  diffattn::DecoderConfig<Attention> config;
  config.vocab_size = spec.vocab_size;
  config.num_layers = spec.layers;
  config.hidden_dim = spec.hidden_dim;
  config.attention = attention;
  config.attention.embed_dim = spec.width;
  config.attention.rotary = diffattn::RotaryConfig{};
  config.tied_head = true;
  config.seed = spec.seed;
  return config;
}

/// With a hidden_dim of 0 the one that brings the model nearest to `wanted` parameters.
template <typename Attention>
std::unique_ptr<Model> fitted_model(ModelSpec spec, const typename Attention::Config& attention, Index wanted) {
  if (spec.hidden_dim == 0) {
    spec.hidden_dim = 1;
    const Index of_one =
        parameter_count(diffattn::Decoder<float, Attention>(decoder_config<Attention>(spec, attention)));
    const Index each = 3 * spec.width * spec.layers;
    spec.hidden_dim = std::max<Index>(1, 1 + (wanted - of_one + each / 2) / each);
  }
  return std::make_unique<TrainedModel<Attention>>(decoder_config<Attention>(spec, attention));
}

}  // namespace lab
