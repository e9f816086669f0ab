#pragma once

// What a recorded layer in examples/data says about itself in its metadata.

#include <diffattn/diffattn.hpp>
#include <diffattn/io/safetensors.hpp>
#include <string>

namespace example {

inline diffattn::MultiheadDiffAttentionConfig recorded_config(const diffattn::Safetensors& file) {
  const auto number = [&](const char* key) -> diffattn::Index { return std::stol(file.metadata().at(key)); };
  return {.embed_dim = number("embed_dim"),
          .num_heads = number("num_heads"),
          .num_kv_heads = number("num_kv_heads"),
          .depth = number("depth"),
          .rotary = diffattn::RotaryConfig{.base = static_cast<double>(number("rope_base"))}};
}

}  // namespace example
