#pragma once

// How the error of one rank reaches the others.

#include <array>
#include <exception>
#include <span>
#include <stdexcept>
#include <string>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/distributed/communicator.hpp"

namespace diffattn::inline v0_1::detail {

/// What f() throws, or null.
template <typename F>
std::exception_ptr error_of(const F& f) {
  try {
    f();
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}
inline void rethrow_if_any(const std::exception_ptr& error) {
  if (error != nullptr) std::rethrow_exception(error);
}

/// What an exception says.
inline std::string text_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& known) {
    return known.what();
  } catch (...) {
    return "an exception that is no std::exception";
  }
}

/// The text of rank `root`, on every rank.
template <Communicator C>
std::string broadcast_text(C& communicator, std::string text, Index root) {
  auto length = static_cast<Index>(text.size());
  communicator.broadcast(std::span<Index>(&length, 1), root);
  text.resize(static_cast<std::size_t>(length));
  communicator.broadcast(std::span<char>(text.data(), text.size()), root);
  return text;
}

/// Throws on every rank: `error` where there is one, elsewhere the error of rank `root` in its name. Collective.
template <Communicator C>
[[noreturn]] void throw_error_of(C& communicator, Index root, const std::exception_ptr& error) {
  enum Kind : Index { other, invalid, shape };
  Index kind = other;
  if (error != nullptr) {
    try {
      std::rethrow_exception(error);
    } catch (const ShapeError&) {
      kind = shape;
    } catch (const std::invalid_argument&) {
      kind = invalid;
    } catch (...) {
    }
  }
  communicator.broadcast(std::span<Index>(&kind, 1), root);
  const std::string what = broadcast_text(communicator, error != nullptr ? text_of(error) : std::string(), root);
  if (error != nullptr) std::rethrow_exception(error);
  const std::string text = "rank " + std::to_string(root) + ": " + what;
  if (kind == shape) throw ShapeError(text);
  if (kind == invalid) throw std::invalid_argument(text);
  throw RankError(text);
}

}  // namespace diffattn::inline v0_1::detail
