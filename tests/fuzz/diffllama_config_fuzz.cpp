// Any text as a config.json: it is refused with a FormatError, or it is a configuration that can be written and read
// back.

#include <diffattn/hugging_face/diffllama_config.hpp>

#include <cstdint>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using diffattn::DiffLlamaConfig;
  try {
    const auto config = DiffLlamaConfig::parse(std::string(reinterpret_cast<const char*>(data), size), "config.json");
    if (config.num_attention_heads % config.num_key_value_heads != 0 || config.head_dim < 1) std::abort();
    const std::string text = config.to_json();
    if (DiffLlamaConfig::parse(text, "again").to_json() != text) std::abort();
    // What the layers would be built with is accepted by them.
    diffattn::Rotary<float>({.base = config.rope_theta,
                             .dim = std::min<diffattn::Index>(config.head_dim, 64),
                             .table_positions = 2,
                             .scaling = config.rope_scaling},
                            std::min<diffattn::Index>(config.head_dim, 64));
  } catch (const diffattn::FormatError& error) {
    if (error.what()[0] == '\0') std::abort();
  }
  return 0;
}
