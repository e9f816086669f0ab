// error: deleted

#include <array>
#include <cstdint>
#include <diffattn/training/batch_sampler.hpp>
#include <string>
#include <string_view>
#include <vector>

using Sampler = diffattn::BatchSampler<std::uint8_t>;
using Text = diffattn::BatchSampler<char>;

std::vector<std::uint8_t> tokens();

#ifdef MISUSE
auto sampler() { return Sampler(tokens(), {.length = 2}); }
#else
auto sampler(const std::vector<std::uint8_t>& corpus, std::array<std::uint8_t, 9>& small) {
  (void)Sampler(small, {.length = 2});
  (void)Sampler(std::span<const std::uint8_t>(corpus), {.length = 2});
  (void)Sampler(std::span(corpus).first(5), {.length = 2});
  (void)Text(std::string_view("a text"), {.length = 2});
  return Sampler(corpus, {.length = 2});
}
#endif
