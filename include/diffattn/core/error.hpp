#pragma once

// What the library throws, and the checks that throw it.
//
//   ShapeError    an argument has the wrong number of rows or columns: names the tensor, what was expected, what came
//   FormatError   a file is not what it claims to be: names the file, the tensor and why
//
// Every check runs before any work, so a failed call changes nothing. The throwing functions are cold and out of line,
// which keeps them out of the code that runs.

#include <Eigen/Core>

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

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_invalid(const std::string& message) {
  throw std::invalid_argument(message);
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_shape(const std::string& message) {
  throw ShapeError(message);
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_shape(const char* where, const char* tensor,
                                                               Index expected_rows, Index expected_cols, Index rows,
                                                               Index cols) {
  throw ShapeError(std::string(where) + ": " + tensor + " must be " + std::to_string(expected_rows) + " x " +
                   std::to_string(expected_cols) + ", got " + std::to_string(rows) + " x " + std::to_string(cols));
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
