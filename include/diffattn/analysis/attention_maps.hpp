#pragma once

// The attention maps of a layer, as numbers to look at: for every head the one or two softmaxes that it makes of x, and
// what it attends with.
//
//   for (const AttentionMaps<float>& head : attention_maps(layer, x)) effective_support(head.combined) …
//   attention_maps(layer, x, mask, {.first = 90, .count = 10});       the rows of ten queries, of a long sequence
//   attention_maps_cross(layer, x, memory);                           of layer.forward_cross(x, memory)
//   attention_maps(layer, tape);                                      of the forward pass that filled the tape
//
// Those of all layers of a model: models/model_maps.hpp. statistics.hpp says what is in them.
//
// Shapes   x (n x embed_dim), one sequence; every map (rows x n), a query a row; of forward_cross (rows x tokens of
//          memory). A query that sees no key has zeros. Heads in the order of the layer's; heads that share their second
//          map (num_noise_heads) each have a copy of it.
// Errors   those of layer.forward(x, mask), before any work, and std::invalid_argument for rows that x does not have,
//          for a tape that is not filled, of another layer, or of several sequences, and for a variant of your own with one
//          λ for all tokens that is hidden: lambda_value() must be public.
// Memory   maps are what a layer otherwise never holds: 3 · rows · n values a head, rows · n where a head is one softmax.
//          All rows of 4,096 tokens and 16 heads in float are 3 GB: ask for those that you want to see.
// Cost     a forward pass and O(rows·n·head_dim) plain loops a map: to understand a layer with, not to run it.

#include <limits>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/reference.hpp"
#include "diffattn/layers/attention_layer.hpp"

namespace diffattn::inline v0_1 {

/// What one head makes of some queries of a sequence of n tokens.
template <typename Scalar>
struct AttentionMaps {
  Matrix<Scalar> p1;        ///< rows x n, the first softmax
  Matrix<Scalar> p2;        ///< rows x n, the second; empty where a head is one softmax
  Matrix<Scalar> combined;  ///< rows x n, what the values are added up with: p1 − λ·p2, or p1
  Vector<Scalar> lambda;    ///< rows, all the same where the layer has one; empty where p2 is
};

/// The queries whose rows of the maps are wanted: `count` of them from `first` on.
struct MapRows {
  static constexpr Index kToTheEnd = std::numeric_limits<Index>::max();

  Index first = 0;
  Index count = kToTheEnd;  ///< left out: all from `first` on
};

namespace detail {

/// Some rows of a mask as one head sees it, for code that knows of no heads and takes them for all.
template <typename Mask>
struct MaskOfHead {
  const Mask& mask;
  Index head;
  Index first;    // of the rows
  Index queries;  // all of them

  KeyRange visible_keys(Index query, Index /*n_q*/, Index n_k) const {
    return mask.visible_keys(first + query, queries, n_k);
  }
  auto bias(Index /*head*/, Index query, Index key, Index /*n_q*/, Index n_k) const requires HasBias<Mask> {
    return mask.bias(head, first + query, key, queries, n_k);
  }
};

/// The rows, counted. Throws std::invalid_argument unless the queries, of which there are n, have them.
inline MapRows checked_map_rows(const char* where, MapRows rows, Index n) {
  if (rows.first >= 0 && rows.first <= n && rows.count == MapRows::kToTheEnd) rows.count = n - rows.first;
  if (rows.first < 0 || rows.count < 0 || rows.first > n || rows.count > n - rows.first) {
    if (rows.count == MapRows::kToTheEnd) {
      throw_invalid({where, ": rows.first = ", rows.first, " is out of range: there are ", n, " queries"});
    }
    throw_invalid({where, ": rows.first = ", rows.first, " and rows.count = ", rows.count,
                   " are out of range: there are ", n, " queries"});
  }
  return rows;
}

/// λ of some queries of a head. A layer with one for all has it in public: lambda_value().
template <typename Layer>
Vector<typename Layer::Scalar> lambda_of_head(const Layer& layer, const typename Layer::Tape& tape, Index head,
                                              const MapRows& rows) {
  if (tape.lambda.cols() != 0) return tape.lambda.col(head).segment(rows.first, rows.count);
  if constexpr (requires { layer.lambda_value(); }) {
    return Vector<typename Layer::Scalar>::Constant(rows.count, layer.lambda_value());
  } else {
    throw_invalid({"attention_maps: the layer has two maps a head and no lambda_value() that can be called"});
  }
}

/// The maps of every head from the queries and keys that a forward pass has left on its tape.
template <typename Variant, typename Mask>
std::vector<AttentionMaps<typename Variant::Scalar>> maps_of_tape(const AttentionLayer<Variant>& layer,
                                                                  const typename AttentionLayer<Variant>::Tape& tape,
                                                                  const Mask& mask, const MapRows& rows) {
  using Scalar = typename Variant::Scalar;
  const auto& config = layer.config();
  const Index d = config.head_dim, heads = config.num_heads, heads_per_kv = heads / config.num_kv_heads;
  const Index key_maps = tape.k.cols() / (config.num_kv_heads * d);
  // Heads come in groups that share a second map, whose queries stand behind those of the group (as the paper has it, a
  // group is one head).
  const Index noise_heads = tape.q.cols() / d - heads, group = noise_heads == 0 ? 1 : heads / noise_heads;
  const Index group_queries = noise_heads == 0 ? 1 : group + 1;

  std::vector<AttentionMaps<Scalar>> all;
  for (Index h = 0; h < heads; ++h) {
    const MaskOfHead<Mask> mask_of_head{mask, h, rows.first, tape.q.rows()};
    const auto map = [&](Index query_head, Index key_map) {
      return reference::attention_map(tape.q.block(rows.first, query_head * d, rows.count, d),
                                      tape.k.middleCols((h / heads_per_kv * key_maps + key_map) * d, d), mask_of_head);
    };
    const Index first_query_head = h / group * group_queries;
    AttentionMaps<Scalar> maps;
    maps.p1 = map(first_query_head + h % group, 0);
    maps.combined = maps.p1;
    if (noise_heads != 0) {
      maps.p2 = map(first_query_head + group, key_maps - 1);
      maps.lambda = lambda_of_head(layer, tape, h, rows);
      maps.combined -= maps.lambda.asDiagonal() * maps.p2;
    }
    all.push_back(std::move(maps));
  }
  return all;
}

}  // namespace detail

/// The maps of every head of a layer from the tape that its forward, or forward_cross, has filled with one sequence. The
/// parameters of the layer must not have changed since.
template <typename Variant>
std::vector<AttentionMaps<typename Variant::Scalar>> attention_maps(const AttentionLayer<Variant>& layer,
                                                                    const typename AttentionLayer<Variant>::Tape& tape,
                                                                    const MapRows& rows = {}) {
  constexpr const char* where = "attention_maps";
  if (!tape.filled) detail::throw_invalid({where, ": the tape is empty, forward(x, mask, tape) fills it"});
  if (tape.x.cols() != layer.config().embed_dim || tape.q.cols() != layer.q_proj.weight.rows() ||
      tape.k.cols() != layer.k_proj.weight.rows()) {
    detail::throw_invalid({where, ": the tape was filled by a layer of another configuration"});
  }
  if (tape.lengths.size() != 1) {
    detail::throw_invalid({where, ": the tape must hold one sequence, got ", static_cast<Index>(tape.lengths.size())});
  }
  const MapRows wanted = detail::checked_map_rows(where, rows, tape.q.rows());
  std::vector<AttentionMaps<typename Variant::Scalar>> maps;
  tape.mask.visit([&](const auto& mask) { maps = detail::maps_of_tape(layer, tape, mask, wanted); });
  return maps;
}

/// The maps of every head of a layer on x: all rows, or those of some queries.
template <typename Variant, typename X, AttentionMask Mask = CausalMask>
std::vector<AttentionMaps<typename Variant::Scalar>> attention_maps(const AttentionLayer<Variant>& layer,
                                                                    const Eigen::MatrixBase<X>& x,
                                                                    const Mask& mask = {}, const MapRows& rows = {}) {
  const MapRows wanted = detail::checked_map_rows("attention_maps", rows, x.rows());
  typename AttentionLayer<Variant>::Tape tape;  // its q and k are those that the kernels were given
  layer.forward(x, mask, tape);
  return detail::maps_of_tape(layer, tape, mask, wanted);
}

/// The maps of layer.forward_cross(x, memory, mask): queries from x, keys from memory.
template <typename Variant, typename X, typename Memory, AttentionMask Mask = FullMask>
std::vector<AttentionMaps<typename Variant::Scalar>> attention_maps_cross(const AttentionLayer<Variant>& layer,
                                                                          const Eigen::MatrixBase<X>& x,
                                                                          const Eigen::MatrixBase<Memory>& memory,
                                                                          const Mask& mask = {},
                                                                          const MapRows& rows = {}) {
  const MapRows wanted = detail::checked_map_rows("attention_maps_cross", rows, x.rows());
  typename AttentionLayer<Variant>::Tape tape;
  layer.forward_cross(x, memory, mask, tape);
  return detail::maps_of_tape(layer, tape, mask, wanted);
}

}  // namespace diffattn::inline v0_1
