#include "../compiled_kernels.hpp"

namespace diffattn::inline v0_1::detail {
DIFFATTN_BACKWARD_OF(template, double, PlainMaskView<double>)
}  // namespace diffattn::inline v0_1::detail
