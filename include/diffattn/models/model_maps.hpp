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
// Memory   3 · rows · tokens values a head of every layer, and a tape of the model. Ask for few rows of a long text.
// Cost     a forward pass and O(rows·tokens·head_dim) plain loops a map.
//
// Tested by tests/models/model_maps_test.cpp.

#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <span>
#include <vector>

#include "diffattn/analysis/attention_maps.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/models/decoder.hpp"

namespace diffattn::inline v0_1 {

/// The maps of every layer of a model and every head of it, one vector a layer.
template <typename Scalar>
using ModelMaps = std::vector<std::vector<AttentionMaps<Scalar>>>;

namespace detail {

/// The maps of all blocks from the tapes that they have filled.
template <typename Scalar, typename Blocks, typename Tapes>
ModelMaps<Scalar> maps_of_blocks(const Blocks& blocks, const Tapes& tapes, const MapRows& rows) {
  ModelMaps<Scalar> all;
  for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
    all.push_back(attention_maps(blocks[layer].attention, tapes[layer].attention, rows));
  }
  return all;
}

}  // namespace detail

/// The maps of a Decoder on some tokens: all rows, or those of some queries.
template <typename Scalar, typename Attention, typename Tokens, AttentionMask Mask = CausalMask>
ModelMaps<Scalar> attention_maps(const Decoder<Scalar, Attention>& model, const Tokens& tokens, const Mask& mask = {},
                                 const MapRows& rows = {}) {
  const auto n = static_cast<Index>(std::size(tokens));
  const MapRows wanted = detail::checked_map_rows("attention_maps", rows, n);
  typename Decoder<Scalar, Attention>::Tape tape;
  model.logits(tokens, mask, {n}, tape);
  return detail::maps_of_blocks<Scalar>(model.blocks, tape.blocks, wanted);
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

}  // namespace diffattn::inline v0_1
