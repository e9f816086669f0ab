#pragma once

// What the library throws, and the checks that throw it.
//
//   ShapeError    an argument has the wrong number of rows or columns: names the tensor, what was expected, what came
//   FormatError   a file is not what it claims to be: names the file, the tensor and why
//
// Every check runs before any work, so a call that fails changes nothing. The functions that throw are out of line and
// marked as cold, so that a check costs its caller no more than a comparison.

#include <Eigen/Core>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

/// An argument has the wrong number of rows or columns. what() names the function, the tensor, what was expected and
/// what came: "diff_attention: k2 must be 200 x 64, got 200 x 8".
class ShapeError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// A file is not what it claims to be. what() names the file, the tensor where there is one, and why.
class FormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

/// A piece of a message: text or a number. The message is put together from them only when it is thrown.
struct MessagePart {
  MessagePart(const char* t) : text(t) {}  // NOLINT(google-explicit-constructor)
  MessagePart(Index n) : number(n) {}      // NOLINT(google-explicit-constructor)
  const char* text = nullptr;
  Index number = 0;
};

/// The parts one after another, as one string.
[[gnu::cold, gnu::noinline]] inline std::string join(std::initializer_list<MessagePart> parts) {
  std::string message;
  for (const MessagePart& part : parts) message += part.text != nullptr ? part.text : std::to_string(part.number);
  return message;
}

/// Throws std::invalid_argument with the parts as its message.
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_invalid(std::initializer_list<MessagePart> parts) {
  throw std::invalid_argument(join(parts));
}

/// Throws ShapeError with the parts as its message.
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_shape(std::initializer_list<MessagePart> parts) {
  throw ShapeError(join(parts));
}

/// Throws ShapeError: `where`: `tensor` must be expected_rows x expected_cols, got rows x cols.
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_shape(const char* where, const char* tensor,
                                                               Index expected_rows, Index expected_cols, Index rows,
                                                               Index cols) {
  throw_shape({where, ": ", tensor, " must be ", expected_rows, " x ", expected_cols, ", got ", rows, " x ", cols});
}

/// Throws ShapeError unless `matrix` is rows x cols. `where` and `tensor` are the function and the operand as the
/// caller knows them.
template <typename Derived>
void check_shape(const char* where, const char* tensor, const Eigen::EigenBase<Derived>& matrix, Index rows,
                 Index cols) {
  if (matrix.rows() != rows || matrix.cols() != cols) {
    throw_shape(where, tensor, rows, cols, matrix.rows(), matrix.cols());
  }
}

/// Calls check(where, i) for each of `count` sequences. What one of them refuses is refused in the name of that
/// sequence: "Decoder: sequence 3: …". A check that is passed costs no more for it.
template <typename Check>
void check_sequences(const char* where, Index count, const Check& check) {
  for (Index i = 0; i < count; ++i) {
    try {
      check(where, i);
    } catch (const std::invalid_argument&) {
      check(join({where, ": sequence ", i}).c_str(), i);
      throw;
    }
  }
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
