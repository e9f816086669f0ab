// Masks, biases and kernels as users write them: it has to compile, nothing of it runs.

#include <type_traits>
#include <vector>

#include "diffattn/diffattn.hpp"
#include "diffattn/kernels/attention_in_phases.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/bias.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/partial_attention.hpp"
#include "diffattn/kernels/reference.hpp"

namespace api {

using namespace diffattn;
using M = Matrix<float>;

template <typename Mask>
void kernels_under(const Mask& mask, const M& x, const Matrix<float>& column) {
  static_assert(std::is_same_v<decltype(diff_attention(x, x, x, x, x, 0.5, mask)), M>);
  static_assert(std::is_same_v<decltype(diff_attention(x, x, x, x, x, column.col(0), mask)), M>);
  static_assert(std::is_same_v<decltype(attention(x, x, x, mask)), M>);
  M out = reference::diff_attention(x, x, x, x, x, 0.5f, mask) + reference::attention(x, x, x, mask);
  const auto grad = diff_attention_backward(x, x, x, x, x, 0.5f, out, mask);
  out += grad.dq1 + grad.dk1 + grad.dq2 + grad.dk2 + grad.dv;
  static_assert(std::is_same_v<decltype(grad.dlambda), float>);
  const auto per_row = diff_attention_backward(x, x, x, x, x, Vector<float>(column.col(0)), out, mask);
  static_assert(std::is_same_v<decltype(per_row.dlambda), Vector<float>>);
  const auto standard = attention_backward(x, x, x, out, mask);
  out += standard.dq + standard.dk + standard.dv;
  out += multihead_diff_attention(x, x, x, 0.5f, Heads{4, 1, 2}, mask);
  const auto many = multihead_diff_attention_backward(x, x, x, 0.5f, out, Heads{2, 1}, mask);
  out += many.dq + many.dk + many.dv;
  Workspace workspace;
  diff_attention_into(out, x, x, x, x, x, 0.5f, mask, {.scale = 0.1}, workspace, Serial{});
  attention_into(out, x, x, x, mask, {}, workspace, Serial{});
}

template <typename Mask>
void parts_under(const Mask& mask, const KeyValuePages<float>& pages, const M& x) {
  PartialAttention<float> part =
      merge(partial_attention(x, x, x, mask), multihead_partial_attention(x, x, x, Heads{2, 1}, mask));
  const PartialDiffAttention<float> maps = partial_diff_attention(x, x, x, x, x, mask);
  M out = merge(maps, multihead_partial_diff_attention(x, x, x, Heads{2, 1}, mask)).difference(0.5f);
  out += log_sum_exp(merge(part.statistics, reference::softmax_statistics(x, x, mask)));
  Workspace workspace;
  DiffSoftmaxStatistics<float> statistics;
  const auto exchange = [](DiffSoftmaxStatistics<float>& own) { own.first = merge(own.first, own.first); };
  multihead_partial_attention_into(part, x, x, x, Heads{2, 1}, mask, {}, workspace, Serial{});
  multihead_diff_attention_in_phases_into(out, statistics, x, x, x, 0.5f, Heads{2, 1}, exchange, mask, {}, workspace);
  decode_diff_attention_in_phases_into(out, statistics, x, pages, x, Heads{2, 1}, exchange, mask, {}, workspace);
  decode_partial_attention_into(part, x, pages, Heads{2, 1}, mask, {}, workspace, Serial{});
}

template <typename Mask>
void decode_under(const Mask& mask, const KeyValuePages<float>& pages, const M& q) {
  Workspace workspace;
  M out = decode_diff_attention(q, pages, 0.5f, Heads{2, 1}, mask) + decode_attention(q, pages, Heads{2, 1}, mask);
  decode_diff_attention_into(out, q, pages, 0.5f, Heads{2, 1}, mask, {}, workspace, Serial{});
  decode_attention_into(out, q, pages, Heads{2, 1}, mask, {}, workspace, Serial{});
}

void kernels(const M& x, const Matrix<double>& biases, const KeyValuePages<float>& pages) {
  static_assert(std::is_same_v<decltype(attention(x, x, x)), M>);
  static_assert(std::is_same_v<decltype(diff_attention(x, x, x, x, x, 1)), M>);
  constexpr Heads grouped{.num_heads = 4, .num_kv_heads = 1, .num_noise_heads = 2};
  static_assert(grouped.query_heads() == 6 && grouped.query_head(3, 0) == 4 && grouped.query_head(3, 1) == 5);
  static_assert(grouped.noise_sharers() == 2);
  static_assert(std::is_same_v<decltype(decode_attention(x, pages, Heads{2, 1})), M>);
  using Narrow = Matrix<Eigen::bfloat16>;
  const Narrow narrow = x.cast<Eigen::bfloat16>();
  static_assert(std::is_same_v<decltype(diff_attention(narrow, narrow, narrow, narrow, narrow, 0.5f)), Narrow>);
  M wide = x;
  attention_into(wide, narrow, narrow, narrow);
  const std::vector<double> slopes = alibi_slopes(8);
  const auto own = [](Index head, Index query, Index key, Index n_q, Index n_k) {
    return static_cast<double>(head + query - key + n_q - n_k);
  };
  const auto nested = with_bias(both(PrefixMask{3}, PaddingMask{40}), AlibiBias{slopes});
  parts_under(CausalMask{}, pages, x);
  kernels_under(FullMask{}, x, x);
  kernels_under(CausalMask{}, x, x);
  kernels_under(SlidingWindowMask{5}, x, x);
  kernels_under(nested, x, x);
  kernels_under(with_bias(CausalMask{}, MatrixBias(biases)), x, x);
  kernels_under(with_bias(FullMask{}, own), x, x);
  static_assert(std::is_same_v<decltype(nested.same_for_all_heads(Index{3})), bool>);
  static_assert(std::is_convertible_v<decltype(nested.bias(Index{0}, Index{1}, Index{2}, Index{3}, Index{4})), double>);
  decode_under(CausalMask{}, pages, x);
  decode_under(nested, pages, x);
}

}  // namespace api
