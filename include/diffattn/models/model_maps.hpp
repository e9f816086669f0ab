#pragma once

// The attention maps of all layers of a model, to look at: maps[layer][head].combined and what else attention_maps.hpp
// has of a head.
//
//   const auto maps = attention_maps(model, tokens);                   a Decoder or a DiffLlama
//   attention_maps(model, tokens, mask, {.first = 90, .count = 10});   the rows of ten queries
//   attention_maps(encoder, x);                                        x (tokens x embed_dim)
//
// A model of your own: attention_maps(layer, tape) for each of its layers, after a forward pass with tapes.
//
// Errors   those of the model for its tokens or its x, and std::invalid_argument for rows that they do not have; before
//          any work.
// Memory   3 · rows · tokens values a head of every layer: ask for few rows of a long text. An Encoder's tape besides.
// Cost     two forward passes of the attention, one of the rest, and O(rows·tokens·head_dim) plain loops a map.
//
// Tested by tests/models/model_maps_test.cpp.

#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <span>
#include <vector>

#include "diffattn/analysis/attention_maps.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/models/decoder.hpp"
#include "diffattn/models/encoder.hpp"

namespace diffattn::inline v0_1 {

/// The maps of every layer of a model and every head of it, one vector a layer.
template <typename Scalar>
using ModelMaps = std::vector<std::vector<AttentionMaps<Scalar>>>;

/// The maps of a Decoder on some tokens: all rows, or those of some queries.
template <typename Scalar, typename Attention, typename Tokens, AttentionMask Mask = CausalMask>
ModelMaps<Scalar> attention_maps(const Decoder<Scalar, Attention>& model, const Tokens& tokens, const Mask& mask = {},
                                 const MapRows& rows = {}) {
  const auto n = static_cast<Index>(std::size(tokens));
  const MapRows wanted = detail::checked_map_rows("attention_maps", rows, n);
  Workspace workspace;
  Serial serial;
  Matrix<Scalar> hidden(n, model.config().attention.embed_dim);
  MatrixMap<Scalar> x(hidden.data(), n, hidden.cols());
  model.embed_into(x, tokens);
  ModelMaps<Scalar> all;
  for (const auto& block : model.blocks) {
    all.push_back(attention_maps(block.attention, block.attention_norm.forward(x), mask, wanted));
    if (&block != &model.blocks.back()) block.forward_in_place(x, mask, workspace, serial);
  }
  return all;
}
template <typename Scalar, typename Attention>
ModelMaps<Scalar> attention_maps(const Decoder<Scalar, Attention>& model, std::initializer_list<Index> tokens) {
  return attention_maps(model, std::span(tokens));
}

/// The same for what runs a Decoder: a DiffLlama.
template <typename Model, typename Tokens, AttentionMask Mask = CausalMask>
requires requires(const Model& model) { model.decoder().blocks; }
auto attention_maps(const Model& model, const Tokens& tokens, const Mask& mask = {}, const MapRows& rows = {}) {
  return attention_maps(model.decoder(), tokens, mask, rows);
}
template <typename Model>
requires requires(const Model& model) { model.decoder().blocks; }
auto attention_maps(const Model& model, std::initializer_list<Index> tokens) {
  return attention_maps(model.decoder(), tokens);
}

/// The maps of an Encoder on x (n x embed_dim): all rows, or those of some queries.
template <typename Scalar, typename Attention, typename X, AttentionMask Mask = FullMask>
ModelMaps<Scalar> attention_maps(const Encoder<Scalar, Attention>& model, const Eigen::MatrixBase<X>& x,
                                 const Mask& mask = {}, const MapRows& rows = {}) {
  const MapRows wanted = detail::checked_map_rows("attention_maps", rows, x.rows());
  typename Encoder<Scalar, Attention>::Tape tape;
  model.forward(x, mask, tape);
  ModelMaps<Scalar> all;
  for (std::size_t layer = 0; layer < model.blocks.size(); ++layer) {
    all.push_back(attention_maps(model.blocks[layer].attention, tape.blocks[layer].attention, wanted));
  }
  return all;
}

}  // namespace diffattn::inline v0_1
