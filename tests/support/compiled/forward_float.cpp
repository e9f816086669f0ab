#include "../compiled_kernels.hpp"

namespace diffattn::inline v0_1::detail {
DIFFATTN_KERNELS_OF(template, float)
}  // namespace diffattn::inline v0_1::detail
