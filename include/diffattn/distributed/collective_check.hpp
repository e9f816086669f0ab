#pragma once

// Checks that all ranks make together, so that what is wrong on one of them is an error on all and never a hang.
//
//   check_on_all(communicator, "my_function", [&](Agreed& agreed) {
//     if (q.cols() != k.cols()) throw ShapeError("…");           // an error of one rank
//     agreed.add("head_dim", q.cols());                          // what has to be the same on every rank
//     agreed.add("lambda", lambda);
//   });
//
// A step that may throw on one rank (a mask of the user, a lack of memory) can stand in it as well, as long as it does
// not communicate itself: check_on_all(communicator, "step", [&] { forward(); backward(); }).
//
// Errors   the rank whose check throws throws that. The others throw the same kind of error (ShapeError,
//          std::invalid_argument, else RankError) with the message of the lowest such rank: "rank 2: …". If none throws
//          and they disagree, all throw std::invalid_argument: "my_function: ranks disagree on head_dim: rank 0 has 64,
//          rank 1 has 32".
// Cost     one all_reduce of three numbers, and no heap, when all is well.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/distributed/communicator.hpp"
#include "diffattn/distributed/detail/error_text.hpp"

namespace diffattn::inline v0_1 {

/// What has to be the same on every rank, by name: up to kMost values. Names are literals; they and their order count.
class Agreed {
 public:
  static constexpr std::size_t kMost = 32;

  /// A number: compared by its bits, so that NaN agrees with NaN. Throws std::length_error for more than kMost.
  template <typename Number>
  requires std::is_arithmetic_v<Number>
  void add(const char* name, Number value) {
    Value added{name, std::is_floating_point_v<Number> ? Kind::real : Kind::integer, 0};
    if constexpr (std::is_floating_point_v<Number>) {
      const auto real = static_cast<double>(value);
      std::memcpy(&added.bits, &real, sizeof(real));
    } else {
      added.bits = static_cast<std::uint64_t>(value);
    }
    add(added);
  }

  /// Bytes: a text, or what an object consists of, such as a mask without padding between its members. Ranks whose bytes
  /// differ are told so, and not how.
  void add(const char* name, std::string_view bytes) { add({name, Kind::bytes, mixed(kSeed, bytes)}); }

 private:
  template <Communicator C, typename Check>
  friend void check_on_all(C& communicator, const char* where, Check&& check);

  enum class Kind : std::uint8_t { integer, real, bytes };
  struct Value {
    const char* name = "";
    Kind kind = Kind::integer;
    std::uint64_t bits = 0;
  };
  static constexpr std::uint64_t kSeed = 0xcbf29ce484222325;

  // FNV-1a.
  static std::uint64_t mixed(std::uint64_t hash, std::string_view bytes) {
    for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3;
    return hash;
  }

  void add(const Value& value) {
    if (count_ == kMost) throw std::length_error("Agreed: more than 32 values");
    values_[count_++] = value;
  }

  // Of a name and its value, and of all of them.
  static std::uint64_t hash_of(const Value& value) {
    char bits[sizeof(value.bits)];
    std::memcpy(bits, &value.bits, sizeof(bits));
    return mixed(mixed(kSeed, value.name), {bits, sizeof(bits)});
  }
  std::uint64_t hash() const {
    std::uint64_t all = kSeed;
    for (std::size_t i = 0; i < count_; ++i) all = (all ^ hash_of(values_[i])) * 0x100000001b3;
    return all;
  }

  static std::string text_of(Kind kind, std::uint64_t bits) {
    if (kind == Kind::bytes) return "another";
    if (kind == Kind::integer) return std::to_string(static_cast<std::int64_t>(bits));
    double real = 0;
    std::memcpy(&real, &bits, sizeof(real));
    char text[32];
    std::snprintf(text, sizeof(text), "%.17g", real);
    return text;
  }

  // Collective. On every rank what the lowest rank that differs from rank 0 says about it.
  template <Communicator C>
  std::string disagreement(C& communicator) const {
    std::array<std::uint64_t, 2 * kMost> first{};  // hashes of rank 0, and bits
    for (std::size_t i = 0; i < count_; ++i) {
      first[2 * i] = hash_of(values_[i]);
      first[2 * i + 1] = values_[i].bits;
    }
    const auto mine = first;
    communicator.broadcast(std::span<std::uint64_t>(first), 0);
    std::size_t at = 0;
    while (at < count_ && first[2 * at] == mine[2 * at]) ++at;
    const bool differs = first != mine;
    std::string text = "what they were called with";
    if (differs && at < count_) {
      const Value& value = values_[at];
      Value of_first = value;
      of_first.bits = first[2 * at + 1];
      if (hash_of(of_first) == first[2 * at]) {  // the same name there
        text = std::string(value.name) + ": rank 0 has " + text_of(value.kind, of_first.bits) + ", rank " +
               std::to_string(communicator.rank()) + " has " + text_of(value.kind, value.bits);
        if (value.kind == Kind::bytes) text = value.name;
      }
    }
    Index lowest = differs ? Index{communicator.size()} - Index{communicator.rank()} : 0;
    communicator.all_reduce(std::span<Index>(&lowest, 1), Reduction::max);
    return detail::broadcast_text(communicator, text, Index{communicator.size()} - lowest);
  }

  std::array<Value, kMost> values_{};
  std::size_t count_ = 0;
};

/// Calls check() or check(agreed) on every rank and returns if it has thrown on none and all agree; throws on every rank
/// otherwise, as said above. `where` is the function in whose name ranks disagree. Collective: all ranks call it.
template <Communicator C, typename Check>
void check_on_all(C& communicator, const char* where, Check&& check) {
  Agreed agreed;
  std::exception_ptr error;
  try {
    if constexpr (std::is_invocable_v<Check&, Agreed&>) {
      check(agreed);
    } else {
      check();
    }
  } catch (...) {
    error = std::current_exception();
  }
  // The largest hash is the smallest one exactly if all are the same: the smallest is the complement of the largest
  // complement.
  const Index size = communicator.size();
  const std::uint64_t hash = agreed.hash();
  const auto failed = static_cast<std::uint64_t>(error != nullptr ? size - Index{communicator.rank()} : 0);
  std::array<std::uint64_t, 3> words = {failed, hash, ~hash};
  communicator.all_reduce(std::span<std::uint64_t>(words), Reduction::max);
  if (words[0] != 0) {
    detail::throw_error_of(communicator, size - static_cast<Index>(words[0]), error);
  }
  if (words[1] != ~words[2]) {
    const std::string text = agreed.disagreement(communicator);
    detail::throw_invalid({where, ": ranks disagree on ", text.c_str()});
  }
}

}  // namespace diffattn::inline v0_1
