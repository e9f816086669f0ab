#pragma once

// The sizes in which the kernels take their work, why they have their values, and the words for them.
//
//   tile     kRows x kCols sums in vector registers (product/register_tile.hpp), which every product is made of
//   group    kRows query rows: as many as a tile has
//   block    the query rows of one task, some groups: while it lasts, keys and values stream past it once
//   strip    kCols columns of a right operand, packed: kCols keys, or kCols columns of the values (product/packed.hpp)
//   chunk    kChunk keys: scores become weights, and weights meet values, a chunk at a time
//   page     what a cache holds of the keys and values of some tokens, all heads of a layer (key_value_pages.hpp)
//   panel    the weights of a block for all chunks, kept until the normalisers of both maps are known
//   piece    kPieceKeys keys: what one task packs
//   wave     key heads that are packed at a time
//   sharers  query heads that read the same key and value head, num_heads / num_kv_heads of them
//   map      one softmax of a head: standard attention has one, differential attention two

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1::detail {

/// Keys in a chunk, and in a page of a cache. A tile of scores, kRows x kChunk, stays in the L1 cache beside a strip of
/// keys or values; fewer keys would make more calls of a tile, each of which reads and writes its sums. A multiple of
/// every kCols.
inline constexpr Index kChunk = 256;

/// Keys in a page of a cache, if nothing else is said: those of a chunk, which then lies in one piece. The fewest that a
/// page can have, whole strips of any target, and the most, beyond which a page is a mistake.
inline constexpr Index kPageKeys = kChunk;
inline constexpr Index kLeastPageKeys = 32;
inline constexpr Index kMostPageKeys = Index{1} << 24;

/// Query rows in a block of the forward kernels: 8 groups of 6 or 4 of 12. Keys and values are read once for each
/// block, which wants many rows; the panel of two maps, 2 · 48 · n_k, wants to stay in the L2 cache, which wants few.
inline constexpr Index kBlockRows = 48;

/// Keys that one task packs: short enough that several threads share a head of a thousand keys, a whole number of
/// strips.
inline constexpr Index kPieceKeys = 512;

/// Tasks a worker that a wave is to make, when there are several workers: enough to share them out evenly. One worker
/// packs one key head at a time, which keeps the packed copy small.
inline constexpr Index kTasksPerWorker = 32;

/// Bytes of packed keys and values that a core's own caches hold. Of those the hardware brings the next chunk in time,
/// and asking for it costs 1 or 2 %; of more, blocks fetch the next chunk themselves.
inline constexpr Index kNearBytes = Index{2} << 20;

/// Products in a chain (product/register_tile.hpp) when they make scores, where kChain serves values and linear layers:
/// most of the error of attention is that of its scores.
inline constexpr Index kScoreChain = 32;

/// So few rows take as long as reading keys and values once, and have a path that does just that (few_rows/); more gain
/// from tiles. Against pages it counts the queries, against keys that are not packed the rows of a key head: queries
/// times sharers.
inline constexpr Index kFewRows = 4;

/// Places in memory that few rows read side by side: one stream does not use all of the bandwidth that a core has.
inline constexpr Index kStreams = 4;

/// Pairs of a query and a key too few to be worth a task, or any preparation (few_rows/small_problem.hpp).
inline constexpr Index kTinyPairs = 6 * 6;

/// Weights of one map that a small problem keeps on the stack, rows padded to whole packets: kTinyPairs queries of one
/// key, with packets of 16, are 576.
inline constexpr Index kMostSmallWeights = 640;

}  // namespace diffattn::inline v0_1::detail
