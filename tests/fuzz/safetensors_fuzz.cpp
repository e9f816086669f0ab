// Any bytes as a safetensors file: they are refused with a FormatError, or every tensor lies inside them.

#include <diffattn/io/safetensors.hpp>

#include <cstdlib>
#include <memory>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // A copy of exactly this size: what is read behind its end is read from nowhere.
  const std::unique_ptr<std::byte[]> bytes(new std::byte[size]);
  if (size != 0) std::memcpy(bytes.get(), data, size);
  try {
    const auto header = diffattn::detail::SafetensorsHeaderParser(bytes.get(), size, "file").parse();
    std::size_t covered = header.data_begin;
    for (const auto& [name, info] : header.tensors) {
      if (info.begin > info.end || info.end > size - header.data_begin) std::abort();
      std::size_t elements = 1;
      for (const diffattn::Index extent : info.shape) elements *= static_cast<std::size_t>(extent);
      if (elements * diffattn::detail::describe(info.dtype).bits != 8 * (info.end - info.begin)) std::abort();
      covered += info.end - info.begin;
    }
    if (covered != size) std::abort();
  } catch (const diffattn::FormatError& error) {
    if (error.what()[0] == '\0') std::abort();
  }
  return 0;
}
