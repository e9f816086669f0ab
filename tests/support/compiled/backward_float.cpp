#include "../compiled_kernels.hpp"

namespace diffattn::inline v0_1::detail {
DIFFATTN_BACKWARD_OF(template, float, PlainMaskView<float>)
}  // namespace diffattn::inline v0_1::detail
