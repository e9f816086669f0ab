#pragma once

// The attention maps of all layers of a model, to look at: maps[layer][head].combined and what else attention_maps.hpp
// has of a head.
//
//   const auto maps = attention_maps(model, tokens);                   a Decoder or a DiffLlama
//   attention_maps(model, tokens, mask, {.first = 90, .count = 10});   the rows of ten queries
//   attention_maps(encoder, x);                                        x (tokens x embed_dim)
//
// Models   whatever has what these have: `blocks`, each with its `attention`, and either embed_into(x, tokens) and
//          blocks with a norm before their attention (Decoder), or forward(x, mask, tape) and a tape of `blocks` with
//          the tape of each `attention` (Encoder); or decoder(), which has (DiffLlama). For any other model of your own:
//          attention_maps(layer, tape) for each of its layers, after a forward pass with tapes.
// Errors   those of the model for its tokens or its x, and std::invalid_argument for rows that they do not have; before
//          any work.
// Memory   3 · rows · tokens values a head of every layer: ask for few rows of a long text. An encoder's tape besides.
// Cost     two forward passes of the attention, one of the rest, and O(rows·tokens·head_dim) plain loops a map.

#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "diffattn/analysis/attention_maps.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1 {

/// The maps of every layer of a model and every head of it, one vector a layer.
template <typename Scalar>
using ModelMaps = std::vector<std::vector<AttentionMaps<Scalar>>>;

/// The scalar of a model with blocks of attention.
template <typename Model>
using ScalarOfBlocks =
    typename std::remove_cvref_t<decltype(std::declval<const Model&>().blocks.front().attention)>::Scalar;

/// A model of text that goes through its blocks one by one: Decoder.
template <typename Model>
concept EmbedsTokens = requires(const Model& model, MatrixMap<ScalarOfBlocks<Model>>& x) {
  model.embed_into(x, std::span<const Index>());
  model.blocks.front().attention_norm.forward(x);
};

/// A model of rows that leaves on its tape what each attention did: Encoder.
template <typename Model>
concept FillsTapes = requires(const Model& model, const Matrix<ScalarOfBlocks<Model>>& x, typename Model::Tape& tape) {
  model.forward(x, FullMask{}, tape);
  tape.blocks.front().attention;
};

/// What runs such a model of text: DiffLlama.
template <typename Model>
concept HasDecoder = EmbedsTokens<std::remove_cvref_t<decltype(std::declval<const Model&>().decoder())>>;

/// The maps of a model on some tokens: all rows, or those of some queries.
template <EmbedsTokens Model, typename Tokens, AttentionMask Mask = CausalMask>
ModelMaps<ScalarOfBlocks<Model>> attention_maps(const Model& model, const Tokens& tokens, const Mask& mask = {},
                                                const MapRows& rows = {}) {
  using Scalar = ScalarOfBlocks<Model>;
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

/// The same for tokens in braces.
template <EmbedsTokens Model>
ModelMaps<ScalarOfBlocks<Model>> attention_maps(const Model& model, std::initializer_list<Index> tokens) {
  return attention_maps(model, std::span(tokens));
}

/// The maps of a DiffLlama: those of its decoder.
template <HasDecoder Model, typename Tokens, AttentionMask Mask = CausalMask>
auto attention_maps(const Model& model, const Tokens& tokens, const Mask& mask = {}, const MapRows& rows = {}) {
  return attention_maps(model.decoder(), tokens, mask, rows);
}

/// The same for tokens in braces.
template <HasDecoder Model>
auto attention_maps(const Model& model, std::initializer_list<Index> tokens) {
  return attention_maps(model.decoder(), tokens);
}

/// The maps of an Encoder on x (n x embed_dim): all rows, or those of some queries.
template <FillsTapes Model, typename X, AttentionMask Mask = FullMask>
ModelMaps<ScalarOfBlocks<Model>> attention_maps(const Model& model, const Eigen::MatrixBase<X>& x,
                                                const Mask& mask = {}, const MapRows& rows = {}) {
  const MapRows wanted = detail::checked_map_rows("attention_maps", rows, x.rows());
  typename Model::Tape tape;
  model.forward(x, mask, tape);
  ModelMaps<ScalarOfBlocks<Model>> all;
  for (std::size_t layer = 0; layer < model.blocks.size(); ++layer) {
    all.push_back(attention_maps(model.blocks[layer].attention, tape.blocks[layer].attention, wanted));
  }
  return all;
}

}  // namespace diffattn::inline v0_1
