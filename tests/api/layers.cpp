// Layers as users write them: it has to compile, nothing of it runs.

#include <span>
#include <string_view>
#include <vector>

#include "diffattn/diffattn.hpp"

namespace api {

using namespace diffattn;
using M = Matrix<float>;

template <typename Layer>
void layer_calls(Layer& layer, Layer& grad, const M& x) {
  const std::vector<int> lengths = {3, 4};
  const std::vector<Index> of_index = {3, 4};
  const auto mask = with_bias(both(SlidingWindowMask{8}, PaddingMask{6}), AlibiBias{alibi_slopes(4)});
  M y = layer.forward(x);
  y = layer.forward(x, mask);
  y = layer.forward(x, CausalMask{}, lengths);
  y = layer.forward(x, CausalMask{}, of_index);
  y = layer.forward(x, mask, {3, 4});

  KvCache<float> cache;
  KvCache<Eigen::half> windowed({.window = 16, .page_size = 64});
  y = layer.forward(x, cache);
  y = layer.forward(x, cache, mask);
  y = layer.forward(x, windowed, PrefixMask{4});

  const std::vector<KvCache<float>*> caches = {&cache};
  y = layer.forward(x, caches);
  y = layer.forward(x, caches, mask);
  y = layer.forward(x, std::span<KvCache<float>* const>(caches));

  typename Layer::Tape tape;
  y = layer.forward(x, CausalMask{}, tape);
  y = layer.forward(x, mask, lengths, tape);
  M dx = layer.backward(y, tape, grad);

  const M memory = x.topRows(3);
  y = layer.forward_cross(x, memory);
  y = layer.forward_cross(x, memory, mask);
  y = layer.forward_cross(x, memory, FullMask{}, lengths, {1, 2});
  layer.write_memory(memory, cache);
  const KvCache<float> kept = cache;
  y = layer.forward_cross(x, kept);
  y = layer.forward_cross(x, kept, mask);
  y = layer.forward_cross(x, memory, FullMask{}, tape);
  y = layer.forward_cross(x, memory, mask, lengths, {1, 2}, tape);
  CrossGradients<float> gradients = layer.backward_cross(y, tape, grad);
  auto [dq, dmemory] = layer.backward_cross(y, tape, grad);

  std::vector<AttentionMaps<float>> maps = attention_maps(layer, x);
  maps = attention_maps(layer, x, mask, {.first = 2, .count = 3});
  maps = attention_maps(layer, tape, MapRows{2});
  maps = attention_maps_cross(layer, x, memory);
  maps = attention_maps_cross(layer, x, memory, mask, {.first = 2});

  Workspace workspace;
  layer.forward_cross_into(y, x, memory, mask, workspace, Serial{});
  layer.forward_cross_into(y, x, memory, mask, lengths, {1, 2}, workspace, Serial{});
  layer.forward_cross_into(y, x, kept, workspace, Serial{});
  layer.forward_cross_into(y, x, kept, mask, workspace, Serial{});
  layer.forward_cross_into(y, x, memory, mask, tape, workspace, Serial{});
  layer.forward_cross_into(y, x, memory, mask, lengths, {1, 2}, tape, workspace, Serial{});
  layer.write_memory(memory, cache, workspace, Serial{});
  layer.backward_cross_into(gradients.dx, gradients.dmemory, y, tape, grad, workspace, Serial{});
  layer.forward_into(y, x, mask, workspace, Serial{});
  layer.forward_into(y, x, mask, lengths, workspace, Serial{});
  layer.forward_into(y, x, cache, workspace, Serial{});
  layer.forward_into(y, x, cache, mask, workspace, Serial{});
  layer.forward_into(y, x, caches, workspace, Serial{});
  layer.forward_into(y, x, caches, mask, workspace, Serial{});
  layer.forward_into(y, x, mask, tape, workspace, Serial{});
  layer.backward_into(dx, y, tape, grad, workspace, Serial{});

  visit_parameters(layer, [](std::string_view, auto& matrix) { matrix.setZero(); });
  const Layer& constant = layer;
  visit_parameters(constant, [](std::string_view, const auto& matrix) { (void)matrix.size(); });
  visit_part("attention", layer, [](std::string_view, auto& matrix) { matrix.setZero(); });
}

void layers(const M& x) {
  MultiheadDiffAttention<float> layer({.embed_dim = 64,
                                       .num_heads = 4,
                                       .num_kv_heads = 2,
                                       .head_dim = 8,
                                       .num_noise_heads = 2,
                                       .depth = 1,
                                       .lambda_init = 0.8,
                                       .rotary = RotaryConfig{}});
  MultiheadDiffAttentionV2<float> v2(
      {.embed_dim = 64, .num_heads = 4, .num_kv_heads = 2, .head_dim = 8, .rotary = RotaryConfig{}});
  MultiheadAttention<float> standard(
      {.embed_dim = 64, .num_heads = 4, .num_kv_heads = 2, .head_dim = 16, .rotary = RotaryConfig{}});
  static_assert(std::is_same_v<decltype(layer.query_head(3, 1)), Index>);
  static_assert(std::is_same_v<decltype(layer.heads().query_heads()), Index>);
  auto grad = layer;
  auto v2_grad = v2;
  auto standard_grad = standard;
  layer_calls(layer, grad, x);
  layer_calls(v2, v2_grad, x);
  layer_calls(standard, standard_grad, x);
}

void layers_in_bfloat16(const M& x) {
  using Narrow = Matrix<Eigen::bfloat16>;
  MultiheadDiffAttention<float, FrozenMatrix> layer(
      {.embed_dim = 64, .num_heads = 4, .arithmetic = Arithmetic::bfloat16});
  visit_parameters(layer, [](std::string_view, auto& parameter) {
    if constexpr (std::is_same_v<std::remove_reference_t<decltype(parameter)>, FrozenMatrix>) {
      parameter = FrozenMatrix(Narrow(Narrow::Zero(parameter.rows(), parameter.cols())));
    }
  });
  pack_weights(layer);
  KvCache<Eigen::bfloat16> cache;
  M y = layer.forward(x) + layer.forward(x, cache);
  Linear<float, Narrow> linear(64, 8, false, Arithmetic::bfloat16);
  linear.arithmetic = Arithmetic::scalar;
  y = linear.forward(x);
  FrozenMatrix weight(linear.weight);
  weight.pack();
  static_assert(std::is_same_v<decltype(weight.memory_bytes()), std::size_t>);
}

}  // namespace api
