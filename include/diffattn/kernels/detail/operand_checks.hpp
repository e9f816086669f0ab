#pragma once

// The checks of a call's operands, which know names and shapes and no types: compiled once. What is thrown says what
// was expected, what came, and what was likely meant.

#include <algorithm>
#include <string>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/sizes.hpp"
#include "diffattn/kernels/options.hpp"

namespace diffattn::inline v0_1::detail {

/// What a caller calls an operand, and its shape.
struct Operand {
  const char* name;
  Index rows;
  Index cols;
};

template <typename Derived>
Operand operand(const char* name, const Eigen::EigenBase<Derived>& matrix) {
  return {name, matrix.rows(), matrix.cols()};
}

/// The sizes of one call. q has heads.query_heads(query_maps) heads, each d wide; a head of k is key_maps · d wide: the
/// maps of a head that lie side by side in one operand.
struct CallSizes {
  Heads heads;
  Index n_q = 0;
  Index n_k = 0;
  Index d = 0;
  Index dv = 0;
  Index query_maps = 1;
  Index key_maps = 1;
};

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_operand(const char* where, const Operand& x, Index rows,
                                                                 Index cols) {
  const bool turned = x.rows == cols && x.cols == rows;
  throw_shape({where, ": ", x.name, " must be ", rows, " x ", cols, ", got ", x.rows, " x ", x.cols,
               turned ? "; did you mean " : "", turned ? x.name : "", turned ? ".transpose()?" : ""});
}

/// Throws ShapeError unless the operand is rows x cols.
inline void check_operand(const char* where, const Operand& x, Index rows, Index cols) {
  if (x.rows != rows || x.cols != cols) throw_operand(where, x, rows, cols);
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_width(const char* where, const Operand& x, Index parts) {
  const bool column = x.cols == 1 && x.rows > 1 && x.rows % parts == 0;
  const bool turned = !column && x.cols > 0 && parts > 1 && x.rows > 0 && x.rows % parts == 0;
  throw_shape({where, ": the columns of ", x.name, " must be a positive multiple of ", parts, ", got ", x.cols,
               column   ? "; a single token is a row: did you mean "
               : turned ? "; one token a row: did you mean "
                        : "",
               column || turned ? x.name : "", column || turned ? ".transpose()?" : ""});
}

/// The columns split evenly over `parts`. Throws ShapeError unless they can be.
inline Index checked_width(const char* where, const Operand& x, Index parts) {
  if (x.cols == 0 || x.cols % parts != 0) throw_width(where, x, parts);
  return x.cols / parts;
}

/// Refuses operands whose sizes multiply to more than memory holds, before they do: a Map with a stride of 0 may be of
/// any size. `heads` and `dv` are those of the output.
inline void check_operand_sizes(const char* where, const Operand& q, const Operand& k, const Operand& v, Index heads,
                                Index dv) {
  // Of what everybody calls with, no three sizes overflow: small calls take as long as a few divisions would.
  constexpr Index kAnybodys = Index{1} << 20;
  if ((q.rows | q.cols | k.rows | k.cols | v.rows | v.cols | heads | dv) < kAnybodys) return;
  for (const Operand& x : {q, k, v}) check_operand_size(where, x.name, x.rows, x.cols);
  checked_product(where, "the size of the output", {std::max<Index>(q.rows, 1), heads, dv});
}

/// The columns of the output of several heads, for those that make it. Throws like checked_sizes.
inline Index output_cols(const char* where, Heads heads, const Operand& v) {
  heads = checked_heads(where, heads);
  return checked_product(where, "the columns of the output",
                         {checked_width(where, v, heads.num_kv_heads), heads.num_heads});
}

/// Which of q, k and v somebody who keeps a token in a column has likely forgotten to transpose: that, and only that,
/// would make them fit.
enum class Turned { none, query_column, q, k, v, all };

/// `sizes` are those that q and v, as they came, would give.
inline Turned turned_operand(const CallSizes& sizes, const Operand& q, const Operand& k, const Operand& v) {
  const Index query_parts = sizes.heads.query_heads(sizes.query_maps), kv_heads = sizes.heads.num_kv_heads;
  // Whether q of this width goes with k of that one.
  const auto fits = [&](Index q_width, Index k_width) {
    if (q_width == 0 || q_width % query_parts != 0 || k_width % kv_heads != 0) return false;
    const Index d = q_width / query_parts, of_keys = k_width / kv_heads;
    return of_keys == d || (sizes.query_maps == 2 && of_keys % 2 == 0 && of_keys / 2 == d);
  };
  if (fits(q.cols, k.cols)) {
    if (v.cols == k.rows) return Turned::v;
    const bool columns = q.cols == k.cols && v.cols == k.cols && q.rows == k.rows && k.rows > 0;
    return columns && v.rows % k.rows == 0 ? Turned::all : Turned::none;
  }
  if (fits(q.rows, k.rows) && v.cols == k.cols) return Turned::all;
  if (fits(q.rows, k.cols) && v.rows == k.rows) return q.cols == 1 ? Turned::query_column : Turned::q;
  return fits(q.cols, k.rows) && v.rows == k.cols ? Turned::k : Turned::none;
}

/// k or v does not fit.
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_operands(const char* where, const CallSizes& sizes,
                                                                  const Operand& q, const Operand& k,
                                                                  const Operand& v) {
  const Index key_cols = sizes.heads.num_kv_heads * sizes.key_maps * sizes.d;
  const bool of_keys = k.cols != key_cols;
  const Operand& x = of_keys ? k : v;
  const Turned turned = turned_operand(sizes, q, k, v);
  const Index rows = turned == Turned::k ? k.cols : k.rows, cols = of_keys ? key_cols : v.cols;
  std::string message = join({where, ": ", x.name, " must be ", rows, " x ", cols, ", got ", x.rows, " x ", x.cols});
  switch (turned) {
    case Turned::none:
      break;
    case Turned::query_column:
      message +=
          join({"; ", q.name, " is ", q.rows, " x 1: a single query is a row, did you mean ", q.name, ".transpose()?"});
      break;
    case Turned::q:
      message += join(
          {"; ", q.name, " is ", q.rows, " x ", q.cols, ": one token a row, did you mean ", q.name, ".transpose()?"});
      break;
    case Turned::k:
    case Turned::v:
      message += join({": one token a row, did you mean ", x.name, ".transpose()?"});
      break;
    case Turned::all:
      message += join({": one token a row, did you mean ", q.name, ".transpose(), ", k.name, ".transpose() and ",
                       v.name, ".transpose()?"});
  }
  throw ShapeError(message);
}

/// The sizes of a call with `query_maps` maps of each head side by side in q, and as many, or one that they share, in
/// k. Throws std::invalid_argument and ShapeError.
inline CallSizes checked_sizes(const char* where, Heads heads, Index query_maps, const Operand& q, const Operand& k,
                               const Operand& v) {
  CallSizes sizes;
  sizes.heads = heads = checked_heads(where, heads, query_maps);
  sizes.n_q = q.rows;
  sizes.n_k = k.rows;
  sizes.d = checked_width(where, q, heads.query_heads(query_maps));
  sizes.dv = checked_width(where, v, heads.num_kv_heads);
  check_operand_sizes(where, q, k, v, heads.num_heads, sizes.dv);
  sizes.query_maps = query_maps;
  sizes.key_maps = k.cols == heads.num_kv_heads * sizes.d ? 1 : query_maps;
  if (k.cols != heads.num_kv_heads * sizes.key_maps * sizes.d || v.rows != k.rows) {
    throw_operands(where, sizes, q, k, v);
  }
  return sizes;
}

}  // namespace diffattn::inline v0_1::detail
