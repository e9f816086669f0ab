#include "../compiled_kernels.hpp"

namespace diffattn::inline v0_1::detail {
DIFFATTN_KERNELS_OF(template, double)
}  // namespace diffattn::inline v0_1::detail
