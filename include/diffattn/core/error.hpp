#pragma once

// What the library throws, and the checks that throw it.
//
//   ShapeError    an argument has the wrong number of rows or columns: names the tensor, what was expected, what came
//   FormatError   a file is not what it claims to be: names the file, the tensor and why
//
// Every check runs before any work, so a failed call changes nothing. The throwing functions are cold and out of line,
// which keeps them out of the code that runs.

#include <Eigen/Core>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

class ShapeError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

class FormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

/// A piece of a message: text or a number. Messages are put together where they are thrown, out of line, so that a
/// check costs its caller a comparison and no string code.
struct MessagePart {
  MessagePart(const char* t) : text(t) {}  // NOLINT(google-explicit-constructor)
  MessagePart(Index n) : number(n) {}      // NOLINT(google-explicit-constructor)
  const char* text = nullptr;
  Index number = 0;
};

[[gnu::cold, gnu::noinline]] inline std::string join(std::initializer_list<MessagePart> parts) {
  std::string message;
  for (const MessagePart& part : parts) message += part.text != nullptr ? part.text : std::to_string(part.number);
  return message;
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_invalid(std::initializer_list<MessagePart> parts) {
  throw std::invalid_argument(join(parts));
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_shape(std::initializer_list<MessagePart> parts) {
  throw ShapeError(join(parts));
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_shape(const char* where, const char* tensor,
                                                               Index expected_rows, Index expected_cols, Index rows,
                                                               Index cols) {
  throw_shape({where, ": ", tensor, " must be ", expected_rows, " x ", expected_cols, ", got ", rows, " x ", cols});
}

/// Throws ShapeError unless `matrix` is rows x cols; `where` and `tensor` are the names a caller knows them by.
template <typename Derived>
void check_shape(const char* where, const char* tensor, const Eigen::EigenBase<Derived>& matrix, Index rows,
                 Index cols) {
  if (matrix.rows() != rows || matrix.cols() != cols) {
    throw_shape(where, tensor, rows, cols, matrix.rows(), matrix.cols());
  }
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
