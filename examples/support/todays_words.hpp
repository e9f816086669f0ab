#pragma once

// A text for example 11 to learn: the King James Bible as it might be said today.

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <diffattn/training/token_file.hpp>
#include <filesystem>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/fine_tune_options.hpp"

namespace example {

/// The text with its oldest words replaced.
inline std::vector<std::uint8_t> in_todays_words(std::span<const std::uint8_t> text) {
  const std::map<std::string, std::string> words = {
      {"unto", "to"},     {"thee", "you"},  {"thou", "you"},    {"ye", "you"},    {"thy", "your"},
      {"thine", "your"},  {"hath", "has"},  {"hast", "have"},   {"doth", "does"}, {"saith", "says"},
      {"shalt", "shall"}, {"wilt", "will"}, {"spake", "spoke"}, {"upon", "on"},   {"brethren", "brothers"},
      {"nigh", "near"},   {"lo", "look"}};
  std::vector<std::uint8_t> result;
  for (std::size_t at = 0; at < text.size();) {
    std::string word, lower;
    for (std::size_t i = at; i < text.size() && std::isalpha(text[i]) != 0; ++i) {
      word += static_cast<char>(text[i]);
      lower += static_cast<char>(std::tolower(text[i]));
    }
    at += std::max<std::size_t>(word.size(), 1);
    if (word.empty()) {
      result.push_back(text[at - 1]);
      continue;
    }
    if (const auto found = words.find(lower); found != words.end()) {
      const char first = word[0];
      word = found->second;
      if (std::isupper(static_cast<unsigned char>(first)) != 0) {
        word[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(word[0])));
      }
    }
    result.insert(result.end(), word.begin(), word.end());
  }
  return result;
}

/// What is to be learned: the text that was asked for, or the Bible. Throws std::runtime_error unless its last
/// twentieth, which is held out, is a sequence and the byte behind it.
inline std::vector<std::uint8_t> text_for(const FineTuneOptions& options) {
  const std::filesystem::path path = options.text.empty() ? DIFFATTN_EXAMPLE_DATA "/kjv.txt" : options.text;
  const diffattn::TokenFile<std::uint8_t> file(path);
  std::vector<std::uint8_t> text(file.tokens().begin(), file.tokens().end());
  if (options.text.empty()) text = in_todays_words(text);
  if (text.size() / 20 > static_cast<std::size_t>(options.length)) return text;
  throw std::runtime_error(path.string() + ": has " + std::to_string(text.size()) + " bytes; --length " +
                           std::to_string(options.length) + " needs at least " +
                           std::to_string(20 * (options.length + 1)));
}

}  // namespace example
