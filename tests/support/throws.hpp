#pragma once

#include <exception>
#include <string>
#include <typeinfo>

#include "support/catch.hpp"

namespace support {

/// What `f` says when it throws, which it must: an Error and nothing derived from it.
template <typename Error, typename F>
std::string thrown_by(F&& f) {
  try {
    f();
  } catch (const std::exception& error) {
    CHECK(typeid(error) == typeid(Error));
    return error.what();
  }
  FAIL_CHECK("nothing was thrown");
  return {};
}

}  // namespace support
