// Models, training and files as users write them: it has to compile, nothing of it runs.

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "diffattn/diffattn.hpp"
#include "diffattn/hugging_face/diffllama.hpp"
#include "diffattn/hugging_face/diffllama_export.hpp"
#include "diffattn/hugging_face/diffllama_import.hpp"
#include "diffattn/io/checkpoint.hpp"
#include "diffattn/io/parameters.hpp"
#include "diffattn/io/safetensors.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/models/encoder.hpp"
#include "diffattn/models/generate.hpp"
#include "diffattn/training/adamw.hpp"

namespace api {

using namespace diffattn;
using M = Matrix<float>;

template <typename Attention>
void decoder_calls(const std::filesystem::path& path) {
  Decoder<float, Attention> model(
      {.vocab_size = 256, .num_layers = 2, .hidden_dim = 64, .attention = {.embed_dim = 32, .num_heads = 2}});
  auto grad = model;
  const std::vector<int> tokens = {1, 2, 3}, lengths = {1, 2};
  M logits = model.logits({1, 2, 3});
  auto cache = model.make_cache({.window = 64});
  logits = model.logits(tokens, cache);
  typename Decoder<float, Attention>::Tape tape;
  logits = model.logits(tokens, lengths, tape);
  model.backward(logits, tape, grad);
  Workspace workspace;
  model.logits_into(logits, tokens, workspace, Serial{});
  model.logits_into(logits, tokens, cache, workspace, Serial{});
  const std::vector<DecoderCache<float>*> caches = {&cache};
  logits = model.logits(tokens, caches);
  logits = model.logits(tokens, std::span<DecoderCache<float>* const>(caches), SlidingWindowMask{8});
  model.logits_into(logits, tokens, caches, workspace, Serial{});
  ModelMaps<float> maps = attention_maps(model, {1, 2, 3});
  maps = attention_maps(model, tokens);
  maps = attention_maps(model, tokens, SlidingWindowMask{8}, {.first = 1, .count = 2});
  std::vector<Index> text = generate(model, {1, 2}, {.max_new_tokens = 4});
  const std::vector<std::vector<Index>> prompts = {{1, 2}, {3}};
  const std::vector<GenerateOptions> options(2);
  std::vector<std::vector<Index>> texts = generate(model, prompts, {.max_new_tokens = 4});
  texts = generate(model, prompts, options, Serial{});
  texts = generate(model, prompts, options, caches, Serial{});
  texts = generate(model, prompts, {.max_new_tokens = 4}, caches, CausalMask{}, Serial{});
  text = generate(model, tokens, {.max_new_tokens = 4}, Serial{});

  AdamW<float> optimizer(model);
  save_checkpoint(model, optimizer, path);
  const TrainingState state = load_checkpoint(model, optimizer, path);
  save_checkpoint(model, optimizer, path, {.windows_drawn = state.windows_drawn});
}

template <typename Attention>
void encoder_calls(const M& x, const std::filesystem::path& path) {
  Encoder<float, Attention> encoder({.num_layers = 2,
                                     .hidden_dim = 64,
                                     .attention = {.embed_dim = 32, .num_heads = 2},
                                     .activation = Activation::gelu,
                                     .bias = true,
                                     .norm = NormKind::layer_norm,
                                     .norm_placement = NormPlacement::before});
  auto grad = zeros_like(encoder);
  const std::vector<int> lengths = {1, 2};
  M y = encoder.forward(x);
  y = encoder.forward(x, PaddingMask{3});
  y = encoder.forward(x, FullMask{}, lengths);
  typename Encoder<float, Attention>::Tape tape;
  y = encoder.forward(x, FullMask{}, tape);
  y = encoder.forward(x, FullMask{}, lengths, tape);
  M dx = encoder.backward(y, tape, grad);
  Workspace workspace;
  encoder.forward_into(y, x, FullMask{}, workspace, Serial{});
  encoder.forward_into(y, x, FullMask{}, lengths, workspace, Serial{});
  encoder.forward_into(y, x, FullMask{}, lengths, tape, workspace, Serial{});
  encoder.backward_into(dx, y, tape, grad, workspace, Serial{});
  AdamW<float>(encoder).step(encoder, grad);
  save_parameters(encoder, path);
  FeedForward<float> feed_forward(32, 64, Activation::relu, true);
  y = feed_forward.forward(x);
}

void models(const std::filesystem::path& path) {
  encoder_calls<MultiheadDiffAttention<float>>(M::Ones(3, 32), path);
  decoder_calls<MultiheadDiffAttention<float>>(path);
  decoder_calls<MultiheadDiffAttentionV2<float>>(path);
  decoder_calls<MultiheadAttention<float>>(path);

  MultiheadDiffAttention<float> layer({.embed_dim = 32, .num_heads = 2});
  const Safetensors file(path);
  const M matrix = file.matrix<float>("name");
  const auto& metadata = file.metadata();
  load_parameters(layer, file);
  load_parameters(layer, file, "prefix.");
  save_parameters(layer, path);
  save_parameters(layer, path, "prefix.", metadata);

  const DiffLlamaOptions bfloat16{.arithmetic = Arithmetic::bfloat16, .packed_weights = false};
  M logits = DiffLlama<float>::load(path, bfloat16).logits({1, 2, 3});
  const auto model = DiffLlama<float>::load(path);
  logits = model.logits({1, 2, 3});
  auto cache = model.make_cache();
  logits = model.logits({1, 2, 3}, cache);
  Workspace workspace;
  model.logits_into(logits, std::vector<int>{1, 2}, cache, workspace, Serial{});
  const std::vector<Index> text = model.generate({1, 2}, {.max_new_tokens = 4});
  const std::vector<DecoderCache<float>*> caches = {&cache};
  logits = model.logits({1}, caches);
  logits = model.logits(std::vector<int>{1, 2}, cache, SlidingWindowMask{8}, Serial{});
  const std::vector<std::vector<int>> prompts = {{1, 2}, {3}};
  std::vector<std::vector<Index>> texts = model.generate(prompts, {.max_new_tokens = 4}, Serial{});
  texts = model.generate(prompts, std::vector<GenerateOptions>(2), caches, Serial{});

  Decoder<float, MultiheadDiffAttention<float>> trainable = load_diffllama<float>(path);
  save_diffllama(trainable, path);
  save_diffllama(trainable, path,
                 {.max_position_embeddings = 512,
                  .eos_token_ids = {1, 2},
                  .bos_token_id = 0,
                  .pad_token_id = 0,
                  .dtype = Dtype::BF16});
  save_diffllama(model, path);
  model.save(path);
}

}  // namespace api
