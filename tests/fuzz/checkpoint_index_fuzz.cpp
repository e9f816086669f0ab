// Any text as a model.safetensors.index.json: it is refused with a FormatError, or it names plain files.

#include <diffattn/io/sharded_safetensors.hpp>

#include <cstdint>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const std::string text(reinterpret_cast<const char*>(data), size);
    for (const auto& [tensor, file] : diffattn::detail::parse_checkpoint_index(text, "index")) {
      if (file.empty() || std::filesystem::path(file).has_parent_path() || file == "..") std::abort();
    }
  } catch (const diffattn::FormatError& error) {
    if (error.what()[0] == '\0') std::abort();
  }
  return 0;
}
