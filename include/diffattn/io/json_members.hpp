#pragma once

// JsonMembers: the members of a JSON object as text, to be changed one by one and written again. Members that are not
// touched stay as they are, in their order, whatever is in them.
//
//   JsonMembers members(JsonDocument(text, "config.json"));
//   members.set("pad_token_id", "0");  members.remove("rope_scaling");  write(members.text());
//
// Of equal keys the last one counts and is kept. Like JsonDocument it needs no recursion and no memory to be destroyed.

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "diffattn/io/json_document.hpp"

namespace diffattn::inline v0_1::detail {

class JsonMembers {
 public:
  /// No members.
  JsonMembers() = default;

  /// The members of the document, an object; none if it is something else.
  explicit JsonMembers(const JsonDocument& json) {
    if (json.root().type != JsonDocument::Type::object) return;
    json.for_each(json.root(), [&](const JsonDocument::Value& child) { set(child.key, json.text_of(child)); });
  }

  /// The JSON text of a member, or null if there is none.
  const std::string* find(const std::string& key) const {
    const auto found = places_.find(key);
    return found == places_.end() ? nullptr : &members_[found->second].text;
  }

  /// `text` is JSON. A member that is there keeps its place, another one comes last.
  void set(const std::string& key, std::string text) {
    const auto [place, is_new] = places_.emplace(key, members_.size());
    if (is_new) {
      members_.push_back({key, std::move(text)});
    } else {
      members_[place->second].text = std::move(text);
    }
  }

  void remove(const std::string& key) {
    const auto found = places_.find(key);
    if (found == places_.end()) return;
    members_.erase(members_.begin() + static_cast<std::ptrdiff_t>(found->second));
    for (auto& [name, place] : places_) place -= place > found->second ? 1 : 0;
    places_.erase(found);
  }

  /// Calls f(key, text) for every member, in order.
  template <typename F>
  void for_each(F&& f) const {
    for (const auto& [key, text] : members_) f(key, text);
  }

  /// The object, a line a member.
  std::string text() const {
    std::string all = "{";
    for (const auto& [key, text] : members_) {
      all += (all.size() == 1 ? "\n  " : ",\n  ") + JsonDocument::in_json(key) + ": " + text;
    }
    return all + "\n}\n";
  }

 private:
  struct Member {
    std::string key, text;
  };

  std::vector<Member> members_;
  std::map<std::string, std::size_t> places_;  // by key
};

}  // namespace diffattn::inline v0_1::detail
