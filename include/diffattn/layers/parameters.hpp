#pragma once

// The one list of a model's parameters and their names: saving, loading, counting, optimising, zeros_like and gradient
// norms all go through it, for the layers and models of this library and for those of your own.
//
//   visit_parameters(layer, [](std::string_view name, auto& parameter) { … });
//
// Names are the official state-dict keys (q_proj.weight, lambda_q1, subln.weight, …), in the order in which the
// official code declares them. A parameter is a Matrix<Scalar>, or a Vector<Scalar> where PyTorch has rank 1; const if
// the layer is.
//
// A model of your own is a class that can be copied and has one static member, a template on both of its arguments:
//
//   struct Classifier {
//     Linear<float> input;                        // a part: whatever has visit() itself
//     std::vector<Block> blocks;                  // parts, called blocks.0, blocks.1, …
//     std::optional<Linear<float>> head;          // a part that may be missing
//     Matrix<float> positions;                    // a parameter, or a Vector, an Eigen::RowVectorXf, or of fixed size
//
//     template <typename Self, typename Visitor>  // Self is Classifier or const Classifier
//     static void visit(Self& self, Visitor& visitor) {
//       visit_part("input", self.input, visitor);
//       visit_part("blocks", self.blocks, visitor);
//       visit_part("head", self.head, visitor);
//       visitor("positions", self.positions);
//     }
//   };
//
// Names must differ, and stay what they are: files and optimizers know parameters by them, AdamW also which of them
// not to decay ("norm", "bias", "lambda"). The order of the calls is the order in files and optimizers.
// Matrices must be row-major, as diffattn::Matrix is. All parameters of one model have one scalar type where it is
// trained. Weights that two parts share are visited once, under one name; their gradient is the sum of both. A single
// number is a Vector of one. What is not learned (a configuration, a tape, a workspace) is not visited.
// A gradient is an object of the same class: zeros_like(model). Examples 09 and 10 have a layer and a model of their own.

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// Stands for any visitor in what is asked of a class below.
struct AnyVisitor {
  template <typename Parameter>
  void operator()(std::string_view /*name*/, Parameter& /*parameter*/) const {}
};

template <typename Layer>
concept Visitable = requires(Layer& layer, AnyVisitor& visitor) {
  std::remove_const_t<Layer>::visit(layer, visitor);
};

template <typename Part>
concept OptionalPart = requires(Part& part) {
  part.has_value();
  *part;
};

template <typename Part>
concept SeveralParts = requires(Part& part) {
  part.size();
  part[0];
};

}  // namespace detail

/// Calls visit(name, parameter) for every parameter. A layer lists its own in a static member visit(self, visitor).
template <typename Layer, typename Visitor>
void visit_parameters(Layer& layer, Visitor&& visitor) {
  static_assert(detail::Visitable<std::remove_const_t<Layer>>,
                "diffattn: the class must list its parameters: template <typename Self, typename Visitor> static void "
                "visit(Self& self, Visitor& visitor), as layers/parameters.hpp says");
  static_assert(detail::Visitable<const Layer> || !detail::Visitable<std::remove_const_t<Layer>>,
                "diffattn: visit(self, visitor) must take a const object too: make it a template on the type of self");
  std::remove_const_t<Layer>::visit(layer, visitor);
}

/// Visits the parameters of `part`, a layer inside a layer or model of yours, their names prefixed with "<name>.": what
/// visit() of the whole calls for each of its parts. A std::optional that is empty has none; the parts of a std::vector
/// or std::array are called <name>.0, <name>.1, ….
template <typename Part, typename Visitor>
void visit_part(std::string_view name, Part& part, Visitor&& visitor) {
  if constexpr (detail::Visitable<std::remove_const_t<Part>>) {
    visit_parameters(part, [&](std::string_view inner, auto& parameter) {
      visitor(std::string_view(std::string(name).append(".").append(inner)), parameter);
    });
  } else if constexpr (detail::OptionalPart<Part>) {
    if (part.has_value()) visit_part(name, *part, visitor);
  } else if constexpr (detail::SeveralParts<Part>) {
    for (std::size_t i = 0; i < part.size(); ++i) {
      visit_part(std::string(name).append(".").append(std::to_string(i)), part[i], visitor);
    }
  } else {
    visit_parameters(part, visitor);  // says what is missing
  }
}

/// How many numbers a layer learns.
template <typename Layer>
Index parameter_count(const Layer& layer) {
  Index count = 0;
  visit_parameters(layer, [&](std::string_view /*name*/, const auto& parameter) { count += parameter.size(); });
  return count;
}

namespace detail {

/// Calls f(piece, values, count) for pieces of all parameters, numbered from 0, spread over the executor in one run.
/// Where one ends and the next begins follows from the sizes alone. `begin` is told before how many there are.
template <typename Layer, Executor E, typename Begin, typename F>
void for_each_piece(Layer& layer, E& executor, Begin&& begin, F&& f) {
  constexpr Index kPiece = 1 << 14;
  struct Piece {
    const void* values;
    Index count;
    void (*call)(F& f, Index piece, const void* values, Index count);
  };
  std::vector<Piece> pieces;
  visit_parameters(layer, [&](std::string_view /*name*/, auto& parameter) {
    using Values = decltype(parameter.data());
    for (Index at = 0; at < parameter.size(); at += kPiece) {
      const auto call = [](F& to_call, Index piece, const void* values, Index count) {
        to_call(piece, const_cast<Values>(static_cast<std::add_const_t<std::remove_pointer_t<Values>>*>(values)),
                count);
      };
      pieces.push_back({parameter.data() + at, std::min(kPiece, parameter.size() - at), call});
    }
  });
  begin(pieces.size());
  executor.run(static_cast<Index>(pieces.size()), [&](Index task, Index /*worker*/) {
    const Piece& piece = pieces[static_cast<std::size_t>(task)];
    piece.call(f, task, piece.values, piece.count);
  });
}

}  // namespace detail

/// Sets every parameter to 0: an object for gradients to be added to.
template <typename Layer, Executor E = Serial>
void set_zero(Layer& layer, E&& executor = {}) {
  detail::for_each_piece(
      layer, executor, [](std::size_t /*pieces*/) {},
      [](Index /*piece*/, auto* values, Index count) {
        std::fill_n(values, count, std::remove_reference_t<decltype(*values)>(0));
      });
}

/// A layer of the same configuration with every parameter 0.
template <typename Layer>
Layer zeros_like(const Layer& layer) {
  Layer zeros = layer;
  set_zero(zeros);
  return zeros;
}

namespace detail {

/// Throws ShapeError unless `gradient` has the parameters of `layer`: the same names and shapes.
template <typename Layer>
void check_gradient(const char* where, const Layer& layer, const Layer& gradient) {
  struct Shape {
    std::string name;
    Index rows, cols;
  };
  std::vector<Shape> expected;
  visit_parameters(layer, [&](std::string_view name, const auto& p) {
    expected.push_back({std::string(name), p.rows(), p.cols()});
  });
  std::size_t at = 0;
  visit_parameters(gradient, [&](std::string_view name, const auto& p) {
    if (at == expected.size() || expected[at].name != name) {
      throw_shape({where, ": the gradient has a ", std::string(name).c_str(), ", and the layer has none there"});
    }
    check_shape(where, ("the gradient's " + expected[at].name).c_str(), p, expected[at].rows, expected[at].cols);
    ++at;
  });
  if (at != expected.size()) throw_shape({where, ": the gradient lacks ", expected[at].name.c_str()});
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
